"""The house: imports go one way, nothing happens at import, README's commands and paths exist."""

import ast
import re
import subprocess
import sys

from conftest import ROOT

PACKAGE = ROOT / "sprint_jax"

# Who may import whom, between areas; what is not listed is forbidden. Reading order, leaves first.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "revision": set(),
    "workdir": set(),
    "cli": {"errors"},
    "huge_pages": set(),
    "compile_cache": set(),
    "quick_compile": set(),
    "model_flags": {"errors"},
    "distributed": {"errors"},
    "diffusion": {"errors"},
    "kernels": set(),
    "models": {"kernels"},
    "data": {"errors", "files", "pictures"},
    "config": {"errors", "data", "kernels", "models"},
    "weights": {"errors", "files"},
    "pictures": {"errors", "files"},
    "resolutions": set(),
    "reporting": {"errors", "files", "workdir"},
    "run_flag": {"errors"},
    "planning": {"errors"},
    "conversion": {"errors", "weights", "models"},
    "parts": {"errors", "data", "models"},
    "evaluation": {"errors", "files", "data", "models", "conversion"},
    "training": {"errors", "files", "workdir", "config", "pictures", "diffusion", "models"},
    "build": {"errors", "config", "kernels", "weights", "conversion", "data", "models", "training"},
    "generation": {"diffusion"},
    "strips": {"build", "config", "diffusion", "generation", "models", "pictures", "resolutions"},
    "drawing": {"errors", "data", "diffusion"},
    "pipeline": {"errors", "config", "kernels", "weights", "workdir", "data", "diffusion", "models", "build", "conversion", "drawing", "generation", "parts"},
    "inputs": {"errors", "config", "weights", "data", "build", "parts", "pipeline"},
    "run": {"errors", "files", "workdir", "config", "weights", "pictures", "diffusion", "evaluation", "training", "build", "generation", "inputs", "revision", "strips", "reporting"},
    "fit_codec": {"errors", "cli", "weights", "data"},
    "emoji": {"errors", "cli", "pictures", "data"},
    "encode": {"errors", "cli", "compile_cache", "files", "config", "weights", "resolutions", "data", "parts", "pipeline", "inputs", "lines"},
    "config_flag": {"errors"},
    "workdir_flag": set(),
    "main": {"cli", "compile_cache", "config", "config_flag", "huge_pages", "quick_compile", "workdir_flag", "distributed", "run", "training"},
    "report": {"cli", "run_flag", "reporting"},
    "average": {"errors", "cli", "weights", "workdir", "conversion", "pipeline"},
    "extract": {"errors", "cli", "files", "run_flag", "weights", "workdir", "config", "build", "training"},
    "exported": {"errors", "weights", "data", "drawing"},
    "export": {"errors", "cli", "files", "weights", "data", "drawing", "exported", "parts", "pipeline", "revision"},
    "plan": {"errors", "cli", "files", "config", "config_flag", "planning", "build", "inputs", "run", "training"},
    "sample": {"errors", "cli", "compile_cache", "files", "drawing", "exported", "model_flags", "pictures", "pipeline", "resolutions"},
    "lines": {"weights", "conversion", "data", "models"},
    "condition": {"errors", "cli", "compile_cache", "files", "pictures", "data", "models", "conversion", "evaluation", "lines"},
    "serving": {"errors", "pictures"},
    "app": {"errors", "cli", "compile_cache", "drawing", "exported", "pipeline", "serving"},
    "gallery": {"errors", "files", "pictures", "revision", "workdir", "evaluation", "pipeline"},
    "evaluate": {"errors", "cli", "compile_cache", "model_flags", "revision", "workdir", "data", "evaluation", "pipeline", "gallery"},
    "convert": {"errors", "cli", "conversion", "models", "pipeline"},
    "benchmarking": {"errors", "files", "revision", "config", "kernels", "weights", "workdir", "diffusion", "models", "training", "build", "inputs", "parts", "run"},
    "benchmark": {"errors", "cli", "benchmarking"},
    "ablation": {"errors", "files", "revision", "workdir", "config", "weights", "diffusion", "evaluation", "training", "build", "generation", "inputs", "run"},
    "ablate": {"errors", "cli", "compile_cache", "huge_pages", "revision", "workdir_flag", "ablation", "training", "run"},
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
            for depth in (2, 3):
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
    presets = re.findall(r"configs/sprint\.py:(\w+)", text)
    functions = re.findall(r"`((?!configs/)\w+(?:/\w+)*\.py):(\w+)`", text)
    assert modules and presets and functions
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    namespace = {}
    exec((ROOT / "configs/sprint.py").read_text(), namespace)
    for preset in presets:
        assert preset in namespace["PRESETS"]
    for file, function in functions:
        source = (PACKAGE / file).read_text()
        assert re.search(rf"^(?:def|class) {function}\b", source, re.M), f"{file}:{function}"


def test_ci_calls_readmes_test_command():
    commands = re.findall(r"^python -m pytest.*$", readme(), re.M)
    assert commands == ["python -m pytest"]
    assert commands[0] in (ROOT / ".ci/run").read_text()
