"""Which source this is."""

import pathlib
import subprocess


def commit() -> str:
    """Commit of the source tree, with + where it has changes; "unknown" outside one."""
    here = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return "unknown"
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout else "")
    except FileNotFoundError:
        return "unknown"
