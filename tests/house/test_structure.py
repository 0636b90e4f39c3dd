"""The house: imports go one way and nothing happens at import."""

import ast
import re
import subprocess
import sys

import pytest

from helpers.runs import ROOT

PACKAGE = ROOT / "sprint_jax"

# Who may import whom, between areas; what is not listed is forbidden. Reading order, leaves first.
ALLOWED = {
    "errors": set(),
    "storage": {"errors"},
    "runtime": {"errors", "storage"},
    "ops": set(),
    "models": {"ops"},
    "diffusion": {"errors"},
    "optim": {"errors"},
    "toy": set(),
    "conversion": {"errors", "storage", "models"},
    "conditioning": {"errors", "storage", "conversion"},
    "encoders": {"errors", "conversion", "models", "storage", "toy"},
    "data": {"errors", "storage", "conditioning", "encoders", "toy"},
    "objectives": {"diffusion", "models", "optim"},
    "config": {"errors", "diffusion", "encoders", "objectives", "optim", "runtime", "storage"},
    "reporting": {"errors", "storage"},
    "build": {"errors", "config", "conversion", "encoders", "models", "ops", "storage"},
    "sampling": {"errors", "build", "config", "conversion", "data", "diffusion", "encoders",
        "models", "ops", "storage"},
    "evaluation": {"errors", "conditioning", "conversion", "diffusion", "encoders", "sampling",
        "storage", "toy"},
    "training": {"errors", "build", "conditioning", "config", "conversion", "data", "diffusion",
        "encoders", "evaluation", "models", "objectives", "optim", "reporting", "runtime",
        "sampling", "storage", "toy"},
    "planning": {"errors", "config", "storage", "training"},
    "serving": {"errors", "encoders", "runtime", "sampling", "storage"},
    "commands": {"errors", "build", "conditioning", "config", "conversion", "data", "encoders",
        "evaluation", "models", "planning", "reporting", "runtime", "sampling", "serving",
        "storage", "toy", "training"},
    "main": {"errors", "commands", "runtime", "storage"},
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


def test_areas_are_in_reading_order():
    """Fails when an area may import a later one, and when the house grows past its rooms."""
    seen = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= seen, f"{name} may import {sorted(allowed - seen)}, which comes later"
        seen.add(name)
    assert {area(path) for path in files()} == seen and len(seen) <= 26
    assert len(list(PACKAGE.glob("*.py"))) <= 6


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
    beside = {"benchmarks", "experiments", "faults", "helpers", "house"}
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


def functions(path):
    """Yield (whether it is public, function) of all that a module defines, methods included."""
    tree = ast.parse(path.read_text())
    outer = {
        id(node)
        for body in (
            tree,
            *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"),
        )
        for node in body.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield id(node) in outer and not node.name.startswith("_"), node


def lines_of_code(node):
    """Count the lines of a function without its docstring."""
    doc = node.body[0] if ast.get_docstring(node) else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_functions_are_short_and_annotated(path):
    """Fails for 61 lines of code, a seventh positional parameter, or a public one without types."""
    for public, node in functions(path):
        where = f"{path.name}:{node.lineno} {node.name}"
        positional = [
            a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")
        ]
        assert lines_of_code(node) <= 60, where
        assert len(positional) <= 6, where
        if public:
            assert node.returns is not None, where
            assert all(a.annotation for a in (*positional, *node.args.kwonlyargs)), where
            assert ast.get_docstring(node) or node.body[0].lineno == node.lineno, where


@pytest.mark.parametrize("path", files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_dataclasses_with_many_fields_are_keyword_only(path):
    """Fails when a dataclass with more than four fields takes them by position."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        made = [ast.unparse(d) for d in node.decorator_list if "dataclass" in ast.unparse(d)]
        fields = [
            n
            for n in node.body
            if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n)
        ]
        marked = [i for i, n in enumerate(fields) if "KW_ONLY" in ast.unparse(n.annotation)]
        if made and len(fields[: marked[0]] if marked else fields) > 4 and "flax" not in made[0]:
            assert "kw_only=True" in made[0], f"{path.name}:{node.lineno} {node.name}"


# Words of a language that readers had to decode; see CONTRIBUTING.md.
ODD = re.compile(
    r"\b(whoever|so many|goes on|what is there|of which|is told|are told|told the|mend(?:s|ed)?)\b",
    re.I,
)


def prose():
    """Return the files with sentences for readers; the lab notebook quotes old output."""
    folders = ("sprint_jax", "configs", "experiments", "benchmarks", "examples")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    pages = [p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "lab-notebook"]
    return sorted({*found, *pages, ROOT / "README.md"})


@pytest.mark.parametrize("path", prose(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_sentences_are_plain(path):
    """Fails for a word that the project's prose avoids."""
    found = ODD.search(path.read_text())
    assert not found, f"{path.name}: {found.group()}"


# {the room: the calls that it alone makes}.
ROOMS = {
    "json_files.py": {"json.load", "json.loads"},
    "files.py": {"os.walk", "os.listdir", "os.scandir", ".rglob", ".iterdir"},
}


def called(call):
    """Return "module.function" and ".method" of a call."""
    if not isinstance(call.func, ast.Attribute):
        return {call.func.id} if isinstance(call.func, ast.Name) else set()
    names = {"." + call.func.attr}
    if isinstance(call.func.value, ast.Name):
        names.add(f"{call.func.value.id}.{call.func.attr}")
    return names


def writes(call):
    """Return whether a call opens a path for writing beside the `partial` of files.whole."""
    names = called(call)
    receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
    opens = bool(names & {"open", ".open"})
    path = call.args[0] if names & {"open"} and call.args else receiver
    modes = [a.value for a in [*call.args, *(k.value for k in call.keywords)]
        if isinstance(a, ast.Constant) and isinstance(a.value, str)]  # fmt: skip
    mode = opens and any(re.fullmatch("[wax]b?[+]?|r[+]b?|rb[+]", m) for m in modes)
    text = bool(names & {".write_text", ".write_bytes"}) and "files.write_text" not in names
    return (mode or text) and not (isinstance(path, ast.Name) and path.id in ("partial", "archive"))


def calls():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node


def test_walking_and_reading_json_have_one_room_each():
    for path, call in calls():
        for room, names in ROOMS.items():
            found = called(call) & names
            assert not found or path.name == room, f"{path}:{call.lineno} {found}: use {room}"


def test_files_are_opened_for_writing_in_storage_alone():
    for path, call in calls():
        inside = area(path) == "storage"
        assert inside or not writes(call), f"{path}:{call.lineno}: use storage/files.py"
