"""The house: imports go one way and nothing happens at import."""

import ast
import subprocess
import sys

import pytest

from helpers.runs import ROOT

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
    "encoders": {"errors", "conversion", "models", "toy"},
    "data": {"errors", "storage", "conditioning", "encoders", "toy"},
    "optim": set(),
    "objectives": {"diffusion", "models", "optim"},
    "config": {"errors", "encoders", "objectives", "optim", "runtime"},
    "reporting": {"errors", "storage"},
    "planning": {"errors", "config", "storage", "training"},
    "build": {"errors", "config", "conversion", "encoders", "models", "ops", "storage"},
    "sampling": {"errors", "build", "config", "conversion", "data", "diffusion", "encoders",
        "models", "ops", "storage"},
    "evaluation": {"errors", "conditioning", "sampling", "storage", "toy"},
    "training": {"errors", "build", "conditioning", "config", "conversion", "data", "diffusion",
        "encoders", "evaluation", "models", "objectives", "optim", "reporting", "sampling",
        "storage", "toy"},
    "serving": {"errors", "sampling", "storage"},
    "commands": {"errors", "build", "conditioning", "config", "conversion", "data", "encoders",
        "evaluation", "models", "planning", "reporting", "runtime", "sampling", "serving",
        "storage", "toy", "training"},
    "main": {"errors", "commands", "runtime"},
    "__main__": {"commands", "runtime"},
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
        assert path.parent == PACKAGE or path.read_text() == ""
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


def test_folders_of_tests_mirror_the_package():
    """Fails when a test file lies beside the folders, or in a folder without a counterpart."""
    beside = {"benchmarks", "experiments", "helpers", "house"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests").as_posix()
        assert folder in beside or (PACKAGE / folder).is_dir(), path


def test_no_test_imports_another():
    """Fails when a test imports a test file instead of `helpers`."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(a.name for a in node.names)]
            for part in ".".join(names).split("."):
                assert part != "conftest" and not part.startswith("test_"), f"{path}: {names}"


def test_commands_are_short():
    """Each holds its options and a call; what it does is in the rooms."""
    for path in (PACKAGE / "commands").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path
