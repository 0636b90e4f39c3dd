"""The page of a run, finished or not: python -m sprint_jax report --run_dir=DIR

Writes DIR/report.html, as every run does at its end.
"""

import sys

from absl import app, flags

from sprint_jax.commands import run_flag
from sprint_jax.reporting import page
from sprint_jax.runtime import cli

flags.adopt_module_key_flags(run_flag)  # --help shows it here


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        print(f"wrote {page.write(run_flag.given())}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
