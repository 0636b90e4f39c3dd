"""One student out of several: python -m sprint_jax average --runs=DIR,DIR --averaged=DIR

Means of the weights of students that were distilled from one teacher with different seeds ("model soups", arXiv
2203.05482): what a run owes to its own batches and its own discriminator falls against what all have learnt. The folder
holds a student and a config as a run's does, so it is a --model for every command that takes one.
"""

import dataclasses
import pathlib
import shutil
import sys

from absl import app, flags

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli

_RUNS = flags.DEFINE_list(
    "runs", None, "The --workdir of two or more finished runs, with commas between."
)
_AVERAGED = flags.DEFINE_string("averaged", None, "Folder to make, for the averaged student.")


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        runs = [pathlib.Path(run) for run in _RUNS.value or ()]
        if len(runs) < 2:
            raise UserError(
                f"--runs={','.join(map(str, runs))}: name two or more runs, with commas between"
            )
        if not _AVERAGED.value:
            raise UserError("--averaged is missing: name the folder to make")
        from sprint_jax.conversion import folder
        from sprint_jax.storage import run_files, weights

        params = average(runs)
        with folder.new_folder(_AVERAGED.value, "--averaged") as made:
            weights.save(made / run_files.STUDENT, params)
            shutil.copyfile(runs[0] / run_files.CONFIG, made / run_files.CONFIG)
        print(
            f"wrote {_AVERAGED.value}: the mean of {len(runs)} students. It is a --model for sprint-jax sample, evaluate and app"
        )


def average(runs):
    """Mean parameters, NumPy float64, of the students of finished runs (paths).

    Raises UserError unless all have one network and one given teacher (and ControlNet, where there is one): weights of
    others have nothing in common.
    """
    import jax
    import numpy as np

    from sprint_jax.sampling import loading

    total, first = None, None
    for run in runs:
        _, params, config = loading.read_student(run)
        if not config.teacher.pretrained:
            raise UserError(
                f"{run} trained a teacher of its own: give runs that were given one (config.teacher.pretrained)"
            )
        if config.control.depth and not config.control.pretrained:
            raise UserError(
                f"{run} trained a ControlNet of its own: give runs that were given one (config.control.pretrained)"
            )
        first = first or _alike(config)
        for name, found in _alike(config).items():
            if found != first[name]:
                raise UserError(
                    f"config.{name} is {found} in {run}, {first[name]} in {runs[0]}: give runs with one network and one teacher"
                )
        total = (
            jax.tree.map(np.float64, params)
            if total is None
            else jax.tree.map(np.add, total, params)
        )
    return jax.tree.map(lambda a: a / len(runs), total)


def _alike(config):
    """{key: value} of what must not differ: nothing that says only how the network is computed."""
    return {
        "teacher.pretrained": config.teacher.pretrained,
        "control.pretrained": config.control.pretrained,
        "control.depth": config.control.depth,
        "text": config.text,
        "codec": config.codec,
        "model": dataclasses.replace(
            config.model, remat="", unroll=0, dtype="", residual_dtype="", attention=""
        ),
    }


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
