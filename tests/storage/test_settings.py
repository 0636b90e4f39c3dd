"""A folder that keeps to its settings, apart from any command."""

import json
import subprocess
import sys

import pytest

from sprint_jax.errors import UserError
from sprint_jax.storage.settings import Keeper

PLAIN = Keeper(file="made.json", flag="out")


def test_other_settings_are_refused_by_the_first_that_differs(tmp_path):
    """Fails when keys are not sorted, or a tuple differs from the list that JSON makes of it."""
    PLAIN.claim(tmp_path / "a/b", {"sizes": (1, 2), "steps": 2, "net": {"depth": 3, "width": 8}})
    before = (tmp_path / "a/b/made.json").read_bytes()
    PLAIN.claim(tmp_path / "a/b", {"sizes": [1, 2], "steps": 2, "net": {"depth": 3, "width": 8}})
    with pytest.raises(UserError) as raised:
        PLAIN.claim(tmp_path / "a/b", {"sizes": (1, 2), "steps": 3, "net": {"depth": 4}})
    assert str(raised.value) == (
        f"{tmp_path / 'a/b'} was made with net.depth=3, now 4: use the same, or another --out"
    )
    with pytest.raises(UserError, match="was made with more=None, now 1"):
        PLAIN.check(tmp_path / "a/b", json.loads(before) | {"more": 1})
    assert (tmp_path / "a/b/made.json").read_bytes() == before
    assert [child.name for child in (tmp_path / "a/b").iterdir()] == ["made.json"]


def test_free_keys_may_differ_and_are_recorded(tmp_path):
    """Fails when `free` is ignored, or when a free key hides one that is not."""
    keeper = Keeper(file="made.json", flag="out", free=("mesh.",))
    keeper.claim(tmp_path, {"mesh": {"data": 1}, "seed": 1})
    keeper.claim(tmp_path, {"mesh": {"data": 2}, "seed": 1})
    assert keeper.recorded(tmp_path) == {"mesh": {"data": 2}, "seed": 1}
    with pytest.raises(UserError, match="seed=1, now 2"):
        keeper.claim(tmp_path, {"mesh": {"data": 3}, "seed": 2})


def test_defaults_are_values_of_keys_that_older_files_lack(tmp_path):
    keeper = Keeper(file="made.json", flag="out", defaults={"condition": "none"})
    (tmp_path / "made.json").write_text('{"steps": 1}')
    keeper.check(tmp_path, {"steps": 1, "condition": "none"})
    with pytest.raises(UserError, match="condition=none, now edges"):
        keeper.check(tmp_path, {"steps": 1, "condition": "edges"})


def test_a_folder_without_output_may_be_claimed_again(tmp_path):
    """Fails when names of `no_output` count as output, or when output does not."""
    keeper = Keeper(file="made.json", flag="out", reclaimable=True, no_output=("events",))
    keeper.claim(tmp_path, {"seed": 1})
    (tmp_path / "events").mkdir()
    keeper.claim(tmp_path, {"seed": 2})
    assert keeper.recorded(tmp_path) == {"seed": 2}
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="seed=2, now 3"):
        keeper.claim(tmp_path, {"seed": 3})


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    keeper = Keeper(
        file="made.json",
        flag="out",
        required=frozenset({"seed"}),
        foreign="{folder} holds {found}: choose another --{flag}",
    )
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.tex: choose another --out"):
        keeper.claim(tmp_path, {"seed": 1})
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.tex"]
    for foreign in ('{"model_type": "gemma2"}', "[1]", "{"):
        (tmp_path / "made.json").write_text(foreign)
        with pytest.raises(UserError, match=r"made.json cannot be read \(.*\): choose another"):
            keeper.claim(tmp_path, {"seed": 1})
        assert (tmp_path / "made.json").read_text() == foreign


def test_a_section_leaves_the_rest_of_its_file(tmp_path):
    keeper = Keeper(file="made.json", flag="out", section="settings", free=("more",))
    keeper.claim(tmp_path, {"steps": 1})
    content = json.loads((tmp_path / "made.json").read_text()) | {"made_by": ["a machine"]}
    (tmp_path / "made.json").write_text(json.dumps(content))
    keeper.claim(tmp_path, {"steps": 1, "more": 1})
    assert json.loads((tmp_path / "made.json").read_text()) == {
        "settings": {"steps": 1, "more": 1},
        "made_by": ["a machine"],
    }
    with pytest.raises(UserError, match="steps=1, now 2"):
        keeper.check(tmp_path, {"steps": 2})


def test_a_folder_that_another_process_holds(tmp_path):
    keeper = Keeper(file="made.json", flag="out", busy="{folder} is busy: wait, or change --{flag}")
    program = (
        "import pathlib, sys\n"
        "from sprint_jax.storage.settings import Keeper\n"
        f"with Keeper(file='made.json', flag='out').hold(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="is busy: wait, or change --out"):
            with keeper.hold(tmp_path):
                pass
        other.stdin.close()
    with keeper.hold(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for act in (lambda f: PLAIN.claim(f, {}), lambda f: PLAIN.hold(f).__enter__()):
        with pytest.raises(UserError, match=r"cannot write in .*file.* \(.*\): choose another"):
            act(tmp_path / "file/below")
