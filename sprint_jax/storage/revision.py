"""The commit of the source tree."""

import pathlib
import subprocess


def commit() -> str:
    """Return the commit of the source tree, with + if files were changed; "unknown" outside one."""
    folder = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    try:
        found = git("rev-parse", "HEAD")
        if found.returncode:
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no").stdout
        return found.stdout.strip() + ("+" if changed else "")
    except FileNotFoundError:
        return "unknown"
