"""The house: imports go one way, nothing happens at import, README's commands and paths exist."""

import ast
import re
import subprocess
import sys

import pytest

from helpers import configs
from helpers.runs import ROOT
from sprint_jax import __main__

pytestmark = pytest.mark.second_pass

PACKAGE = ROOT / "sprint_jax"

# Who may import whom, between areas; what is not listed is forbidden. Reading order, leaves first.
ALLOWED = {
    "errors": set(),
    "runtime": {"errors"},
    "storage": {"errors"},
    "ops": set(),
    "models": {"ops"},
    "diffusion": {"errors"},
    "toy": set(),
    "conversion": {"errors", "storage", "models"},
    "conditioning": {"errors", "storage", "conversion"},
    "encoders": {"errors", "models", "toy"},
    "data": {"errors", "storage", "conditioning", "toy"},
    "optim": set(),
    "objectives": {"diffusion", "models", "optim"},
    "config": {"errors", "encoders", "objectives", "optim"},
    "reporting": {"errors", "storage"},
    "planning": {"errors"},
    "build": {"errors", "config", "conversion", "encoders", "models", "ops", "storage"},
    "sampling": {"errors", "build", "config", "conversion", "diffusion", "encoders", "models", "ops", "storage"},
    "evaluation": {"errors", "conditioning", "sampling", "storage", "toy"},
    "training": {"errors", "build", "conditioning", "config", "data", "diffusion", "encoders", "evaluation", "models", "objectives", "optim", "reporting", "sampling", "storage", "toy"},
    "serving": {"errors", "storage"},
    "commands": {"errors", "build", "conditioning", "config", "conversion", "data", "encoders", "evaluation", "models", "planning", "reporting", "runtime", "sampling", "serving", "storage", "toy", "training"},
    "main": {"commands", "config", "runtime", "training"},
    "__main__": set(),
}  # fmt: skip


def area(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Modules of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sprint_jax":
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "sprint_jax")


def files():
    return [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]


def test_imports_go_one_way():
    for path in files():
        for name in imports(path):
            target = name.split(".")[1]
            assert target == area(path) or target in ALLOWED[area(path)], f"{path} imports {name}"


def test_no_cycles_inside_an_area():
    graph = {p: set() for p in files()}
    for path in graph:
        for name in imports(path):
            for depth in (2, 3, 4):
                target = PACKAGE.joinpath(*name.split(".")[1:depth]).with_suffix(".py")
                if target in graph:
                    graph[path].add(target)
    done = set()
    while len(done) < len(graph):
        ready = {p for p in graph if p not in done and graph[p] <= done}
        assert ready, f"cycle among {sorted(map(str, graph.keys() - done))}"
        done |= ready


def test_inits_are_empty_and_nothing_private_is_imported():
    for path in PACKAGE.rglob("__init__.py"):
        assert path.read_text() == ""
    for path in files():
        assert "jax._src" not in path.read_text(), path


def test_nothing_happens_at_import():
    """Importing every module starts no device and changes no environment variable."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files()]
    program = (
        "import os, importlib, jax; before = dict(os.environ)\n"  # JAX itself sets two variables
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import threading\n"
        "assert dict(os.environ) == before\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


def readme():
    return (ROOT / "README.md").read_text()


def test_readme_paths_exist():
    named = set(
        re.findall(
            r"`((?:sprint_jax|configs|tests|benchmarks|launch|notebooks|docs)/[\w./]*)`", readme()
        )
    )
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_readme_modules_presets_and_functions_exist():
    text = readme()
    modules = set(re.findall(r"python -m ((?:sprint_jax|benchmarks)\.\w+)", text))
    commands = set(re.findall(r"python -m sprint_jax (\w+)", text))
    assert commands <= set(__main__.COMMANDS), commands
    presets = re.findall(r"configs/sprint\.py:(\w+)", text)
    functions = re.findall(r"`((?!configs/)\w+(?:/\w+)*\.py):(\w+)`", text)
    assert modules and presets and functions
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for preset in presets:
        assert preset in configs.presets()
    for file, function in functions:
        source = (PACKAGE / file).read_text()
        assert re.search(rf"^(?:def|class) {function}\b", source, re.M), f"{file}:{function}"


def test_ci_calls_readmes_test_command():
    commands = re.findall(r"^python -m pytest.*$", readme(), re.M)
    assert commands == ["python -m pytest"]
    assert commands[0] in (ROOT / ".ci/run").read_text()
