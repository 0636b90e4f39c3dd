"""Check the built wheel: its files, and its commands in an environment of their own."""

import pathlib
import subprocess
import sys
import tempfile
import time
import venv
import zipfile

WANTED = (
    "sprint_jax/py.typed",
    "sprint_jax/cards/sprint.py",
    "sprint_jax/assets/shapes/student.safetensors",
    "sprint_jax/assets/shapes/config.json",
    "sprint_jax/serving/page.js",
)
COMMANDS = "average condition convert encode evaluate export extract plan report sample serve train"


def main() -> None:
    """Raise for a wheel that lacks a file or whose commands do not start."""
    (wheel,) = pathlib.Path(sys.argv[1]).resolve().glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in WANTED if name not in names]
    assert not missing, f"{wheel} lacks {missing}"
    with tempfile.TemporaryDirectory() as folder:
        # The dependencies of this environment, and the wheel alone beside them.
        venv.create(folder, with_pip=True, system_site_packages=False)
        python = f"{folder}/bin/python"
        here = next(p for p in sys.path if p.endswith("site-packages"))
        run(python, "-m", "pip", "install", "-q", "--no-deps", str(wheel))
        site = next(pathlib.Path(folder).glob("lib/*/site-packages"))
        (site / "dependencies.pth").write_text(here + "\n")
        shown = run(f"{folder}/bin/sprint-jax", "--help")
        assert all(command in shown for command in COMMANDS.split()), shown
        begin = time.perf_counter()
        run(python, "-c", "import sprint_jax, sys; assert 'jax' not in sys.modules")
        print(f"import sprint_jax: {time.perf_counter() - begin:.2f} s with Python's own start")
        run(f"{folder}/bin/sprint-jax", "train", "--config=sprint:smoke", f"--workdir={folder}/run")
        assert (pathlib.Path(folder) / "run" / "report.html").is_file()
    print(f"{wheel.name}: {len(names)} files, commands start, the smoke card trains")


def run(*words: str) -> str:
    """Run a command outside the checkout and return what it prints; raise where it fails."""
    done = subprocess.run(words, cwd=tempfile.gettempdir(), capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
