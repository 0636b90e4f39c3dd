"""A short form of `python -m benchmarks.fuzz`: few calls of every reader, and the attack itself."""

import json
import time

import pytest

from sprint_jax.errors import UserError

pytest.importorskip("hypothesis")
from benchmarks.fuzz import attack, formats

CALLS = {"diffusers folder": 10, "converted folder": 10, "exported file": 15, "checkpoints": 20}


@pytest.mark.parametrize("form", formats.formats(), ids=lambda form: form.name)
def test_damaged_files_end_in_one_line(form):
    outcome = attack.attack(form, CALLS.get(form.name, 60), seed=0, shrink=False)
    assert not outcome.failure, outcome.failure
    assert sum(outcome.counts.values()) >= 1


def _make(folder):
    (folder / "a.json").write_text(json.dumps({"a": {"b": [1, 2]}}))


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda folder: json.loads((folder / "a.json").read_text())["a"]["b"][1], "Error"),
        (lambda folder: _raise_lines(folder), "not one line"),
    ],
)
def test_an_attack_finds_what_a_person_would_see(read, words):
    """Fails when damage never reaches a value, or errors of several lines pass."""
    outcome = attack.attack(formats.Format("faulty", _make, read, 1), 200, seed=0)
    assert words in outcome.failure
    assert "damaged=a.json: " in outcome.failure


def _raise_lines(folder):
    try:
        json.loads((folder / "a.json").read_bytes())
    except (ValueError, OSError, RecursionError):
        raise UserError("one line\nand another") from None


def test_a_hang_is_a_failure(monkeypatch):
    monkeypatch.setattr(attack, "SECONDS", 0.2)
    whole = json.dumps({"a": {"b": [1, 2]}})

    def read(folder):
        path = folder / "a.json"
        if not path.exists() or path.read_bytes() != whole.encode():
            time.sleep(2)

    outcome = attack.attack(formats.Format("slow", _make, read, 1), 3, seed=0, shrink=False)
    assert "more than 0.2 s" in outcome.failure


def test_an_error_line_keeps_its_beginning_and_its_remedy():
    """Fails when a value from a damaged file fills the line."""
    line = str(UserError(f"a.json is damaged (text is '{'[' * 100_000}'): copy it again"))
    assert len(line) < 1100
    assert line.startswith("a.json is damaged (text is '[[[") and line.endswith(": copy it again")
