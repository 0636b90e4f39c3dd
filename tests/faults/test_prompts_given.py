"""Faults that public reports show in files of prompts: encodings, tables, ids and late refusals."""

import csv
import json

import numpy as np
import pytest

from sprint_jax.encoders import instruction
from sprint_jax.errors import UserError
from sprint_jax.evaluation import checks, dpg, images, prompt_sets
from sprint_jax.evaluation import options as evaluation_options
from sprint_jax.evaluation import run as evaluation
from sprint_jax.sampling import loading, prompt_files, sample
from sprint_jax.sampling.options import SHIPPED, SampleOptions
from sprint_jax.storage import json_lines
from sprint_jax.training import average

DPG = """item_id,text,keywords,proposition_id,dependency
lake,"a lake, at dusk",,1,0
lake,"a lake, at dusk",,2,1
fox,a red fox,,1,0
"""


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.JSONL", '{"prompt": "one, a"}\n{"prompt": "two"}\n'),
        ("a.Json", '{"x": {"prompt": "one, a"}, "y": {"prompt": "two"}}'),
        ("a.CSV", 'prompt,tag\n"one, a",s\ntwo,\n'),
        ("a.csv", "id;Prompt\n00;one, a\n01;two\n"),
        ("a.TSV", "Prompt\tCategory\r\none, a\tAnimals\r\ntwo\t\r\n"),
        ("a.tsv", '\ufeffid\tcaption\n1\t"one, a"\n2\ttwo'),
        ("a.TXT", "one, a\n\ntwo\n"),
    ],
)
def test_tables_of_prompts_are_read_by_both_commands(tmp_path, name, content):
    """Fails when an ending counts by its case, or a line of a table is taken as a prompt."""
    path = written(tmp_path, name, content)
    for read in (prompt_sets.read, prompt_files.read):
        assert [prompt.text for prompt in read(path)] == ["one, a", "two"]
    given = sample.read_prompts(SampleOptions(prompts=str(path)))
    assert [prompt.text for prompt in given] == ["one, a", "two"]


@pytest.mark.parametrize("name", ["dpg_bench.csv", "DPG_BENCH.CSV", "dpg.TSV"])
def test_the_table_of_dpg_bench(tmp_path, name):
    """The suite reads its questions; sample draws each prompt once."""
    if name.endswith("TSV"):
        rows = csv.reader(DPG.splitlines())
        text = "".join("\t".join(cells) + "\n" for cells in rows)
    else:
        text = DPG
    path = written(tmp_path, name, text)
    found = prompt_sets.read(path)
    assert [(p.id, p.text) for p in found] == [("lake", "a lake, at dusk"), ("fox", "a red fox")]
    assert all(isinstance(prompt.row, dpg.Item) for prompt in found)
    assert [p.text for p in prompt_files.read(path)] == ["a lake, at dusk", "a red fox"]
    other = written(tmp_path, "other.csv", "prompt,a\nx,y\n")
    asked = evaluation_options.Options(suite="dpg", model="m", prompts=str(other), out="x")
    with pytest.raises(UserError, match="--suite=dpg reads dpg_bench.csv"):
        images.prompts(asked)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", '{"prompt": "one"}\n', r"line 1 is JSON, not a prompt: .* \.jsonl"),
        ("a", 'one\n["two"]\n', "line 2 is JSON, not a prompt"),
        ("a.txt", "id\tprompt\n1\tone\n", r"line 1 is the head of a table, .* \.csv or \.tsv"),
        ("a.csv", "a,b\n1,2\n", "has no column prompt, caption, text, it has a, b"),
        ("a.tsv", "prompt,id\none,1\n", "has no column prompt"),
        ("a.csv", "", "has no column prompt, caption, text, it has no head"),
        ("a.csv", "id,prompt\n1,one, two\n", "line 2 has 3 cells, not 2"),
        ("a.csv", 'id,prompt\n1,"one\n2,two\n', "not a table of prompts"),
        ("a.jsonl", '"one"\n', "line 1 is not a JSON object"),
        ("a.txt", "caf\xe9\n".encode("latin-1"), "line 1 is not UTF-8, byte 0xe9, as in Latin-1"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "line 2 is not UTF-8"),
        ("a.csv", "prompt\nfigs\n".encode("utf-16"), "UTF-16 or UTF-32, by its byte-order mark"),
        ("a.txt", "figs\n".encode("utf-16-le"), "null characters, as UTF-16 without a mark"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "it is compressed: unpack it"),
        ("a.jsonl", json.dumps({"id": "x" * 300, "prompt": "a"}), "has 300 letters, too many"),
        ("a.json", json.dumps({"é" * 120: {"prompt": "a"}}), "has 120 letters, too many"),
        ("a.jsonl", json.dumps({"id": "/" * 300, "prompt": "a"}), "cannot name a file: use letter"),
        ("a.json", json.dumps({"y" * 300: {"prompt": 3}}), "is not text"),
        ("a.jsonl", "[" * 100_000, "line 1 is not a JSON object"),
    ],
)
def test_unusable_files_of_prompts_are_one_line(tmp_path, name, content, words):
    path = written(tmp_path, name, content)
    for read in (prompt_sets.read, prompt_files.read):
        with pytest.raises(UserError, match=words) as error:
            read(path)
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_other_texts_name_the_encoding(tmp_path):
    latin = written(tmp_path, "a.txt", "caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="line 1 is not UTF-8, byte 0xe9, as in Latin-1"):
        instruction.published(str(latin))
    with pytest.raises(UserError, match="--answers=.*line 1 is not UTF-8"):
        json_lines.read(latin, "answers", lambda row: row, kind="an answer", form="x")
    wide = written(tmp_path, "b.txt", "draw: ".encode("utf-16"))
    with pytest.raises(UserError, match="by its byte-order mark"):
        instruction.published(str(wide))
    marked = written(tmp_path, "c.txt", b"\xef\xbb\xbfdraw:\r\nthis ")
    assert instruction.published(str(marked)) == "draw:\nthis "


LATE = [*(["a red circle"] * 130), "a red zebra", "a blue square"]


@pytest.mark.parametrize(
    "name, content, place",
    [
        ("p.txt", "\n".join(["", *LATE]), "p.txt line 132: word 'zebra'"),
        ("p.jsonl", "\n".join(json.dumps({"prompt": p}) for p in LATE), "p.jsonl line 131: word"),
        ("p.tsv", "prompt\tn\n" + "".join(f"{p}\t1\n" for p in LATE), "p.tsv line 132: word"),
        ("p.jsonl", '{"prompt": "a circle"}\n{"prompt": " "}', "p.jsonl line 2: the prompt is em"),
        ("p.txt", f"a circle\n{'a ' * 40}", "p.txt line 2: prompt of 40 words is too long"),
    ],
)
def test_all_prompts_are_checked_before_the_first_is_drawn(
    tmp_path, monkeypatch, name, content, place
):
    """Fails when images are drawn, or a folder claimed, before the last prompt is known."""
    drawn = []
    monkeypatch.setattr(
        "sprint_jax.sampling.generation.generate", lambda *a, **k: drawn.append(a) or np.zeros(0)
    )
    path, out = written(tmp_path, name, content), tmp_path / "out"
    with pytest.raises(UserError, match=place):
        sample.sample(SampleOptions(prompts=str(path), out=str(out)))
    asked = evaluation_options.Options(
        suite="imagereward", hook="helpers.rewards:reward", model=str(SHIPPED), prompts=str(path),
        out=str(out)
    )  # fmt: skip
    checks.check(asked)
    with pytest.raises(UserError, match=place):
        evaluation.run(asked)
    assert not drawn and not [path for path in out.iterdir() if path.name != ".lock"]


def test_prompts_of_the_command_line_are_named_by_their_number(tmp_path):
    for prompts, place in ((["a zebra"], "--prompt: word"), (["a circle", "a fox"], "number 2: w")):
        with pytest.raises(UserError, match=place):
            sample.sample(SampleOptions(prompt=prompts, out=str(tmp_path)))


def test_one_run_is_not_averaged_twice(tmp_path, monkeypatch):
    """Neither by the same path nor by a link, and nothing is written."""
    (tmp_path / "b").symlink_to(SHIPPED)
    monkeypatch.setattr(average, "_check_given", lambda run, config: None)
    for other in (SHIPPED, tmp_path / "b", SHIPPED / ".." / SHIPPED.name):
        with pytest.raises(UserError, match="are one run, which would count twice: name each once"):
            average.write(tmp_path / "made", SHIPPED, average.average([SHIPPED, other]))
    assert not (tmp_path / "made").exists()


def test_warnings_name_the_place_of_a_prompt(monkeypatch):
    """A prompt that is cut is named by its line, once, not by a number within its batch."""
    import warnings

    from sprint_jax.encoders import prompts as prompts_lib
    from sprint_jax.sampling import generation

    pipe = loading.load(SHIPPED, dtype="float32")

    def prepare(prompts):
        for i, prompt in enumerate(prompts):
            if "long" in prompt:
                warnings.warn(f"prompt {i} has 400 tokens", prompts_lib.CutWarning, stacklevel=1)

    monkeypatch.setattr(type(pipe.text), "prepare", lambda self, prompts: prepare(prompts))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with generation.checked(pipe, ["a", "long"], ["f line 1", "f line 2"]):
            prepare(["a", "long"])
    assert [str(w.message) for w in said] == ["f line 2: the prompt has 400 tokens"]
    assert said[0].category is prompts_lib.CutWarning
