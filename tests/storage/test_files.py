"""Text files: what is written is read back, whatever characters it contains."""

import json

import pytest

from sprint_jax.storage import files


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a\u2028b",
        "a\x85b\x0cc",
        "caf\udce9.png",
        "half an emoji \ud83d",
        "Zürich 東京",
    ],
)
def test_json_lines_are_read_back(tmp_path, text):
    """U+2028 ends no line.

    Half of a surrogate pair, as in file names that are not UTF-8, can be written.
    """
    path = tmp_path / "rows.jsonl"
    files.write_text(
        path,
        "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in ({"text": text}, {"text": "b"})
        ),
    )
    assert [json.loads(line)["text"] for line in files.read_lines(path) if line] == [text, "b"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red circle\na square")
    assert files.read_lines(tmp_path / "prompts.txt") == ["a red circle", "a square"]


def test_files_below_a_folder_are_found_through_links_once(tmp_path):
    """Fails when links are not followed, and when a link that leads back is followed forever."""
    (tmp_path / "root/a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("root/one", "root/a/two", "elsewhere/three"):
        (tmp_path / name).touch()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/back").symlink_to(tmp_path / "root")
    (tmp_path / "root/0_early").symlink_to(
        tmp_path / "root/a"
    )  # the folder's own name counts, not that of the first link
    (tmp_path / "root/gone").symlink_to(tmp_path / "nowhere")
    found = sorted(
        p.relative_to(tmp_path / "root").as_posix() for p in files.below(tmp_path / "root")
    )
    assert found == ["a/two", "link/three", "one"]
