"""Rows of files that a killed command may have damaged."""

import pytest

from sprint_jax.errors import UserError
from sprint_jax.storage import json_lines


def test_damaged_lines_are_no_rows(tmp_path):
    """Fails when bytes that are no UTF-8, other JSON or an object of other keys pass for a row."""
    path = tmp_path / "metrics.jsonl"
    assert json_lines.rows(path) == []
    good = b'{"step": 1}\n'
    path.write_bytes(good + b'{"ste\n\xff\n[1]\n\n{"other": 2}\n' + good + b'{"step": 3')
    assert json_lines.rows(path, ("step",)) == [{"step": 1}, {"step": 1}]
    assert {"other": 2} in json_lines.rows(path)


def test_where_every_line_is_dear_only_the_last_may_be_damaged(tmp_path):
    """Fails when a damaged line in the middle is left out in silence."""
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"run": 1}\n{"run": 2')
    assert json_lines.rows(path, ("run",), kind="a result") == [{"run": 1}]
    path.write_bytes(b'{"run": 1}\n{"run": 2\n{"run": 3}\n')
    with pytest.raises(UserError, match=r"results.jsonl line 2 is not a result: remove that line"):
        json_lines.rows(path, ("run",), kind="a result")


def test_rows_are_read_as_they_were_written(tmp_path):
    """Fails when floats lose digits, or a line is cut at U+2028."""
    rows = [{"prompt": "a\u2028b é", "value": 0.1 + 0.2}, {"value": float("inf")}]
    json_lines.write(tmp_path / "rows.jsonl", rows)
    json_lines.append(tmp_path / "rows.jsonl", {"last": None})
    assert json_lines.rows(tmp_path / "rows.jsonl") == [*rows, {"last": None}]
