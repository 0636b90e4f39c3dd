"""Cards by name and by file, and the values that replace theirs."""

import pytest

from helpers.runs import ROOT
from sprint_jax.cards import sprint
from sprint_jax.errors import UserError
from sprint_jax.runtime import cards


def test_a_card_by_name_and_by_file_is_the_same():
    for preset in ("", ":smoke"):
        by_name = cards.load(f"sprint{preset}")
        assert by_name == cards.load(f"{ROOT / 'configs/sprint.py'}{preset}")
        assert by_name == sprint.get_config(*filter(None, [preset.strip(":")]))


def test_the_shipped_cards_are_those_of_the_checkout():
    files = {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")}
    assert set(cards.shipped()) == files


def test_values_are_replaced_with_their_types():
    """Fails when a text stays a text, and when an override changes the card that others load."""
    pairs = ["seed=7", "model.qk_norm=false", "phases.sprint.objective.guidance=(1.0, 2.0)"]
    card = cards.load("sprint:smoke", pairs)
    assert (card.seed, card.model.qk_norm) == (7, False)
    assert card.phases.sprint.objective.guidance == (1.0, 2.0)
    assert cards.load("sprint:smoke").seed == 0


@pytest.mark.parametrize(
    "card, pairs, message",
    [
        ("", [], "--config is missing: use --config=configs/sprint.py"),
        ("sprnt", [], "no card --config=sprnt: use one of controlnet, sprint, teacher"),
        ("configs/absent.py:smoke", [], "no config file --config=configs/absent.py:smoke"),
        ("sprint:absent", [], "unknown preset 'absent'"),
        ("sprint", ["seeds=1"], 'unknown config key config.seeds: Did you mean "seed"'),
        ("sprint", ["teacher.steps=1"], "it is config.phases.teacher.steps now"),
        ("sprint", ["seed=many"], "config.seed=many"),
    ],
)
def test_what_is_refused(card, pairs, message):
    with pytest.raises(UserError) as error:
        cards.load(card, pairs)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [("1 / 0", "ZeroDivisionError: division by zero"), ("x = 1", "has no get_config")],
)
def test_a_file_that_is_no_card(tmp_path, text, message):
    (tmp_path / "card.py").write_text(text)
    with pytest.raises(UserError, match=message):
        cards.load(str(tmp_path / "card.py"))


def test_a_folder_by_the_name_of_a_card_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cards.is_card("sprint") and cards.is_card("x/card.py:a")
    (tmp_path / "sprint").mkdir()
    assert not cards.is_card("sprint") and not cards.is_card("models/sana")
