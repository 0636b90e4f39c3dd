"""Options of the benchmark commands."""

import argparse


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose description is the first line of a module's docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
