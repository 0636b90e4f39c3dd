"""Text in files: what is written comes back, whatever characters it holds."""

import json

import pytest

from sprint_jax import files


@pytest.mark.parametrize("text", ["a red circle", "a\u2028b", "a\x85b\x0cc", "caf\udce9.png", "half an emoji \ud83d", "Zürich 東京"])
def test_json_lines_come_back(tmp_path, text):
    """U+2028 ends no line; half a surrogate pair, as in file names that are no UTF-8, is written at all."""
    path = tmp_path / "rows.jsonl"
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ({"text": text}, {"text": "b"})))
    assert [json.loads(line)["text"] for line in files.read_lines(path) if line] == [text, "b"]
    assert list(tmp_path.iterdir()) == [path]
