"""What the options of `sprint-jax evaluate` must be, refused before anything is generated."""

import pathlib

from sprint_jax.diffusion import limits
from sprint_jax.errors import UserError
from sprint_jax.evaluation.options import SUITES, Options

_OWNERS = {
    "fid": ("unpublished_weights", "reference", "save_reference", "picture_size"),
    "geneval": ("detections", "grid"),
    "dpg": ("answers",),
    "fid or clip": ("weights",),
    "fid or imagereward": ("hook",),
}
_POSITIVE = ("first", "picture_size", "scoring_batch")


def check(options: Options) -> None:
    """Raise UserError for missing options, values out of range, and options of another suite."""
    if options.suite is None:
        raise UserError(f"--suite is missing: use one of {', '.join(SUITES)}")
    if not options.out:
        raise UserError("--out is missing: give a directory for the report")
    _check_images(options)
    _check_suite(options)
    for owner, owned in _OWNERS.items():
        for name in owned:
            if options.suite not in owner.split(" or ") and getattr(options, name):
                raise UserError(f"--{name} belongs to --suite={owner}")
    for name in _POSITIVE:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: use 1 or more")
    asked = {name: getattr(options, name, None) for name in limits.RANGES}
    limits.check(asked, "--{name}={value}")
    _check_prompts(options)
    if options.shard is None:
        _check_inputs(options)


def _check_images(options: Options) -> None:
    """Raise UserError unless there is one source of images, or a record of judgments."""
    if options.model and options.folder:
        raise UserError("give --model, to generate images, or --folder, to score some, not both")
    record = {"geneval": options.detections, "dpg": options.answers}.get(options.suite or "")
    if not options.model and not options.folder and not record:
        raise UserError(
            "--model is missing: give a diffusers folder, a converted one, or the --workdir of a "
            "run; or --folder of images"
        )


def _check_suite(options: Options) -> None:
    """Raise UserError for what a suite lacks."""
    if options.suite == "imagereward" and not options.hook:
        raise UserError(
            "--suite=imagereward needs --hook=module:function, which takes prompts and images and "
            "gives scores"
        )
    if options.suite == "clip" and not options.weights:
        raise UserError(
            "--weights is missing: give the folder of a CLIP model (openai/clip-vit-large-patch14)"
        )
    if options.suite != "fid":
        return
    if bool(options.weights) == bool(options.hook):
        raise UserError(
            "--suite=fid takes --weights=FILE of the published Inception, or --hook of features of "
            "your own"
        )
    if not options.reference and not options.save_reference:
        raise UserError(
            "--reference is missing: give an npz with mu and sigma or a folder; or "
            "--save_reference=FILE.npz"
        )


def _check_prompts(options: Options) -> None:
    """Raise UserError for prompts, numbers and files that a suite does not have."""
    suite, prompts = options.suite, options.prompts
    if suite == "dpg" and options.per_prompt != 4:
        raise UserError(
            f"--images_per_prompt={options.per_prompt}: DPG-Bench has four, a 2 x 2 grid"
        )
    if options.recorded and not prompts and not (suite == "geneval" and options.folder):
        file = "evaluation_metadata.jsonl" if suite == "geneval" else "dpg_bench.csv"
        raise UserError(f"--prompts is missing: give {file}")
    if options.recorded and options.file_format != "png":
        raise UserError(f"--file_format=jpeg: images of --suite={suite} are PNG")
    if options.first and options.folder and not prompts:
        raise UserError("--first is a number of prompts: with --folder give --prompts as well")


def _check_inputs(options: Options) -> None:
    """Raise UserError if what scores, or what it reads, is missing.

    The images may take hours to generate first.
    """
    from sprint_jax.evaluation import dpg, extractors, fid, geneval, image_sets

    weights, reference = options.weights, options.reference
    if options.hook:
        extractors.hook(options.hook)
    if weights and options.suite == "clip" and not pathlib.Path(weights).is_dir():
        raise UserError(
            f"no folder --weights={weights}: give that of a CLIP model "
            "(openai/clip-vit-large-patch14)"
        )
    if weights and options.suite == "fid" and not pathlib.Path(weights).is_file():
        raise UserError(
            f"no file --weights={weights}: download {extractors.INCEPTION_FILE} (of pytorch-fid) "
            "and give its path"
        )
    if reference and pathlib.Path(reference).is_dir():
        image_sets.found(reference)
    elif reference:
        fid.load(reference)
    if options.detections:
        geneval.read_detections(options.detections)
    if options.answers:
        dpg.read_answers(options.answers)


def shard(options: Options) -> tuple[int, int] | None:
    """Return (i, n) of --shard=i/n, None without. Raises UserError for anything else."""
    if options.shard is None:
        return None
    first, _, count = options.shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(
            f"--shard={options.shard}: write i/n with i from 0 to n - 1, for example 0/4"
        )
    if not options.model:
        raise UserError("--shard is for generating images: give --model")
    return int(first), int(count)
