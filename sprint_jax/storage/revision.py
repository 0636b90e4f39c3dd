"""Which source tree made something."""

import pathlib
import subprocess


def commit() -> str:
    """Commit of the source tree, with + where it has changes; "unknown" outside one."""
    here = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
    try:
        found = git("rev-parse", "HEAD")
        if found.returncode:
            return "unknown"
        return found.stdout.strip() + (
            "+" if git("status", "--porcelain", "--untracked-files=no").stdout else ""
        )
    except FileNotFoundError:
        return "unknown"
