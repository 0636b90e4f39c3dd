"""README and the pages of docs/: what they name exists, and they keep their form."""

import importlib.util
import pathlib
import re
import sys

import pytest

from helpers import configs
from helpers.runs import ROOT

README = ROOT / "README.md"
# The lab notebook is dated: it names what existed on its day.
PAGES = [README, *sorted(p for p in (ROOT / "docs").rglob("*.md") if "lab-notebook" not in p.parts)]
_FOLDERS = "sprint_jax|configs|tests|benchmarks|launch|notebooks|docs|experiments|examples"

sys.path.insert(0, str(ROOT / "docs"))
HOOKS = importlib.import_module("hooks")
sys.path.pop(0)
OPTIONS = HOOKS.options()

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


_PATH = rf"`((?:{_FOLDERS})/[\w./-]*)`"
_COMMAND = r"(?:python -m sprint_jax|sprint-jax) ([a-z_]+)"
_MODULE = r"python -m ((?:sprint_jax|benchmarks|experiments)[.\w]*)"
_PRESET = r"(configs/\w+\.py):(\w+)"
_FUNCTION = r"`((?!configs/)\w+(?:/\w+)*\.py):(\w+)`"


@pytest.mark.parametrize("pattern", [_PATH, _COMMAND, _MODULE, _PRESET, _FUNCTION])
def test_the_pages_name_what_is_looked_for(pattern):
    """Fails when a pattern finds nothing, with which the tests below would pass empty."""
    assert any(re.search(pattern, page.read_text()) for page in PAGES)


@every_page
def test_paths_exist(page):
    for path in re.findall(_PATH, page.read_text()):
        assert (ROOT / path).exists(), path


@every_page
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@every_page
def test_commands_and_modules_exist(page):
    text = page.read_text()
    commands = set(re.findall(_COMMAND, text))
    assert commands <= OPTIONS.keys(), commands
    for module in set(re.findall(_MODULE, text)):
        assert importlib.util.find_spec(module), module
    for script in set(re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", text)):
        assert (ROOT / script).exists(), script


@every_page
def test_presets_exist(page):
    for card, preset in set(re.findall(_PRESET, page.read_text())):
        assert preset in configs.presets(pathlib.PurePath(card).stem), f"{card}:{preset}"


@every_page
def test_functions_exist(page):
    for file, name in re.findall(_FUNCTION, page.read_text()):
        source = (ROOT / "sprint_jax" / file).read_text()
        assert re.search(rf"^(?:def|class) {name}\b", source, re.M), f"{file}:{name}"


@every_page
def test_lines_are_short(page):
    """Lines have at most 100 columns, except in tables and images.

    Fails where a page is not wrapped.
    """
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 100 or line.startswith(("|", "![")), f"{page}:{number}"


def test_readme_is_short_and_timeless():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    hashes = [w for w in re.findall(r"\b[0-9a-f]{7,40}\b", text) if re.search(r"[a-f]", w)]
    assert not [w for w in hashes if re.search(r"[0-9]", w)], hashes


def test_ci_calls_readmes_test_command():
    commands = re.findall(r"^python -m pytest.*$", README.read_text(), re.M)
    assert commands == ["python -m pytest"]
    assert commands[0] in (ROOT / ".ci/run").read_text()


def test_every_equation_has_its_function():
    """Eq. 4 to 12 of the paper. Fails when a row of the table is lost."""
    page = ROOT / "docs/method/equations.md"
    rows = [line for line in page.read_text().splitlines() if re.match(r"\| Eq\. \d+", line)]
    assert [int(re.match(r"\| Eq\. (\d+)", row).group(1)) for row in rows] == list(range(4, 13))
    assert all(re.search(r"`\w+(/\w+)+\.py:\w+`", row) for row in rows)


@every_page
def test_config_keys_exist(page):
    """Fails when a key that a page names is renamed."""
    cards = [configs.card(preset=preset).to_dict() for preset in configs.presets()]
    phases = {name: phase for card in cards for name, phase in card["phases"].items()}
    card = cards[0] | {"phases": phases}
    for name in set(
        re.findall(r"\bconfig\.((?!py\b|md\b|json\b)[a-z_]+(?:\.[a-z_]+)*)", page.read_text())
    ):
        section = card
        for word in name.split("."):
            assert word in section, f"config.{name}"
            section = section[word]


@every_page
def test_options_of_commands_exist(page):
    """Check commands in code blocks. Fails when an option is renamed."""
    known = {name: {f.name.rstrip("_") for f in fields} for name, (_, fields) in OPTIONS.items()}
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    for name, rest in re.findall(r"(?:python -m sprint_jax|sprint-jax) ([a-z]+)(.*)", text):
        for option in re.findall(r"(?<=\s)--([a-z_]+)(?=[=\s]|$)", rest):
            assert option in known[name], f"sprint-jax {name} --{option}"


def test_every_option_and_key_is_explained():
    """Check the generated references. Fails when a field loses its docstring."""
    rows = f"{HOOKS.commands()}\n{HOOKS.configuration()}".splitlines()
    keys = [row for row in rows if row.startswith(("| `--", "| `config."))]
    assert len(keys) > 200
    assert not [row for row in keys if row.endswith("|  |")]


def test_the_configuration_reference_has_every_key_of_the_default_card():
    """Fails when a section of the configuration is not reached from its root."""
    text = HOOKS.configuration()
    for section, values in configs.card(preset="sprint").to_dict().items():
        assert f"| `config.{section}" in text
        for key in values if isinstance(values, dict) and section != "phases" else ():
            assert f"| `config.{section}.{key}` |" in text


def test_the_drawing_has_every_room():
    """Fails when a room is missing from the page on architecture."""
    drawn = re.findall(r"<text[^>]*>([^<]+)</text>", HOOKS.rooms())
    assert sorted(drawn) == sorted(HOOKS._allowed().keys() - {"__main__"})
