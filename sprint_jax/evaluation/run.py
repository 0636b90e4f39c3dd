"""One evaluation: images, their scores, and OUT/report-SUITE.json and .md."""

import pathlib
from typing import Any

import jax

from sprint_jax.errors import UserError
from sprint_jax.evaluation import checks, images, records, report, scores
from sprint_jax.evaluation.options import Options
from sprint_jax.storage import revision


def run(options: Options) -> pathlib.Path | None:
    """Evaluate, and return the path of the report; None if there is nothing to score yet.

    Raises UserError for options that do not belong together, before anything is generated.
    """
    checks.check(options)
    shard = checks.shard(options)
    found = images.prompts(options)
    if options.recorded and not options.model:
        described = {"folder": options.folder and str(images.folder(options))}
        return _report(options, records.measure(options, found), described)
    if not options.model:
        chosen = images.in_folder(options, found)
        return _report(options, scores.measure(options, chosen), chosen.described)
    assert found is not None
    chosen = images.generated(options, found, shard)
    if shard is not None:
        print(f"share {options.shard} is in {options.out}; without --shard the command scores all")
        return None
    if options.recorded:
        return _report(options, records.measure(options, found), chosen.described)
    return _report(options, scores.measure(options, chosen), chosen.described)


def _report(
    options: Options, measured: scores.Scores | None, described: dict[str, Any]
) -> pathlib.Path | None:
    """Write and print the report, and return its path; None for no scores."""
    if measured is None or not measured.values:
        return None
    content = {
        "suite": options.suite,
        "scores": measured.values,
        "protocol": measured.protocol,
        "pictures": described,
        "code": {
            "commit": revision.commit(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        },
    }
    if measured.details:
        content["details"] = measured.details
    out = pathlib.Path(options.out or "")
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = report.write(out, content)
    except OSError as error:
        raise UserError(f"cannot write in --out={out} ({error.strerror}): choose another") from None
    for name, value in measured.values.items():
        rows = (
            {f"{name}, {part}": number for part, number in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        for label, number in rows.items():
            print(f"{label.replace('_', ' ')}: {number:.6g}")
    print(f"report in {path}")
    return path
