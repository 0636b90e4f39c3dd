"""The field's metrics: python -m sprint_jax evaluate --model=DIR --suite=SUITE --out=DIR

    shapes       our checker of the embedded captions, GenEval's counterpart without a detector
    fid          --weights=pt_inception-2015-12-05-6726825d.pth (or .safetensors) --reference=FILE.npz or FOLDER
    clip         --weights=FOLDER of openai/clip-vit-large-patch14
    geneval      --prompts=evaluation_metadata.jsonl, then --detections=FILE.jsonl
    dpg          --prompts=dpg_bench.csv, then --answers=FILE.jsonl
    imagereward  --hook=module:function

Makes the pictures (what is there is kept: the same command goes on), scores them, and writes
OUT/report-SUITE.json and .md. --folder=DIR scores pictures that are there instead. --shard=i/n makes every n-th
picture, for n of these commands; then the command without it scores.
"""

import functools
import hashlib
import pathlib
import sys
import warnings

from absl import app, flags

from sprint_jax.commands import model_flags
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli

_SUITES = ("shapes", "fid", "clip", "geneval", "dpg", "imagereward")
_PROMPTS_BY_DEFAULT = 256  # held-out captions of `shapes`
_PER_PROMPT = {"geneval": 4, "dpg": 4}  # official; other suites have one

_SUITE = flags.DEFINE_enum("suite", None, _SUITES, "What to measure.")
_FOLDER = flags.DEFINE_string("folder", None, "Score these pictures instead of making some.")
_FIRST = flags.DEFINE_integer(
    "first", None, "Only the first so many prompts; default: all (shapes: 256)."
)
_FORMAT = flags.DEFINE_enum(
    "file_format", "png", ["png", "jpeg"], "Of the pictures made; SANA's FID is of JPEG."
)
_SHARD = flags.DEFINE_string(
    "shard", None, "i/n: make only every n-th picture, from i = 0, and score nothing."
)
_WEIGHTS = flags.DEFINE_string("weights", None, "fid: Inception weights, a file. clip: a folder.")
_UNPUBLISHED = flags.DEFINE_bool(
    "unpublished_weights", False, "fid: accept other weights than the published ones; not FID."
)
_SAVE_WEIGHTS = flags.DEFINE_string(
    "save_weights", None, "Write the Inception weights of a .pth as safetensors here, and end."
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "fid: npz with mu and sigma, or a folder of real pictures."
)
_SAVE_REFERENCE = flags.DEFINE_string(
    "save_reference", None, "fid: write the statistics of the pictures to this npz."
)
_RESIZE = flags.DEFINE_enum(
    "fid_resize", "pytorch-fid", ["pytorch-fid", "clean-fid"], "How pictures become 299 x 299."
)
_SIZE = flags.DEFINE_integer(
    "picture_size",
    None,
    "fid: bring pictures to this side first (bilinear, then the middle); SANA's FID has 512.",
)
_SCORING_BATCH = flags.DEFINE_integer(
    "scoring_batch", 32, "Pictures that a scoring network sees at a time."
)
_DETECTIONS = flags.DEFINE_string(
    "detections", None, "geneval: JSON lines of detections (sprint_jax/evaluation/geneval.py)."
)
_ANSWERS = flags.DEFINE_string(
    "answers", None, "dpg: JSON lines of answers (sprint_jax/evaluation/dpg.py)."
)
_GRID = flags.DEFINE_bool("grid", False, "geneval: also write grid.png for each prompt.")
_HOOK = flags.DEFINE_string(
    "hook",
    None,
    "module:function. imagereward: (prompts, pictures) -> scores. fid: pictures -> features, instead of Inception.",
)
flags.adopt_module_key_flags(model_flags)  # --help shows them here


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if _SAVE_WEIGHTS.value:
            _save_weights()
            return
        _check_flags()
        if _SUITE.value in ("geneval", "dpg") and not model_flags.MODEL.value:
            _score_records()
            return
        shard = _shard()
        prompts = _prompts()
        if model_flags.MODEL.value:
            paths, texts, made = _made(prompts, shard)
            if shard is not None:
                print(
                    f"share {_SHARD.value} is made in {model_flags.OUT.value}; without --shard the command scores all"
                )
                return
            if _SUITE.value in ("geneval", "dpg"):
                _score_records(prompts, made)
                return
        else:
            from sprint_jax.evaluation import image_sets

            made = {"folder": str(_folder())}
            if _SUITE.value == "fid":
                paths, texts = image_sets.found(_folder()), None
            else:
                paths, texts = image_sets.with_prompts(_folder(), prompts)
        _score_pictures(paths, texts, made)


def _check_flags():
    suite, given = _SUITE.value, lambda flag: flag.value not in (None, False)
    if suite is None:
        raise UserError(f"--suite is missing: use one of {', '.join(_SUITES)}")
    if not model_flags.OUT.present:
        raise UserError("--out is missing: give a directory for the report")
    if given(model_flags.MODEL) and given(_FOLDER):
        raise UserError("give --model, to make pictures, or --folder, to score some, not both")
    records = {"geneval": _DETECTIONS, "dpg": _ANSWERS}
    if (
        not given(model_flags.MODEL)
        and not given(_FOLDER)
        and not (suite in records and given(records[suite]))
    ):
        raise UserError(
            "--model is missing: give a diffusers folder, a converted one, or the --workdir of a run; or --folder of pictures"
        )
    if suite == "imagereward" and not given(_HOOK):
        raise UserError(
            "--suite=imagereward needs --hook=module:function, which takes prompts and pictures and gives scores"
        )
    if suite == "clip" and not given(_WEIGHTS):
        raise UserError(
            "--weights is missing: give the folder of a CLIP model (openai/clip-vit-large-patch14)"
        )
    if suite == "fid":
        if given(_WEIGHTS) == given(_HOOK):
            raise UserError(
                "--suite=fid takes --weights=FILE of the published Inception, or --hook of features of your own"
            )
        if not given(_REFERENCE) and not given(_SAVE_REFERENCE):
            raise UserError(
                "--reference is missing: give an npz with mu and sigma or a folder; or --save_reference=FILE.npz"
            )
    owners = {
        "fid": (_UNPUBLISHED, _REFERENCE, _SAVE_REFERENCE, _SIZE),
        "geneval": (_DETECTIONS, _GRID),
        "dpg": (_ANSWERS,),
        "fid or clip": (_WEIGHTS,),
        "fid or imagereward": (_HOOK,),
    }
    for owner, owned in owners.items():
        for flag in owned:
            if suite not in owner.split(" or ") and given(flag):
                raise UserError(f"--{flag.name} belongs to --suite={owner}")
    positive = (_FIRST, _SIZE, _SCORING_BATCH, model_flags.PER_PROMPT, model_flags.BATCH)
    for flag in positive:
        if flag.value is not None and flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value}: use 1 or more")
    if not 0 <= model_flags.SEED.value < 2**31:
        raise UserError(f"--seed={model_flags.SEED.value}: use 0 to {2**31 - 1}")
    if suite == "dpg" and _per_prompt() != 4:
        raise UserError(f"--images_per_prompt={_per_prompt()}: DPG-Bench has four, a 2 x 2 grid")
    if (
        suite in ("geneval", "dpg")
        and not given(model_flags.PROMPTS)
        and not (suite == "geneval" and given(_FOLDER))
    ):
        raise UserError(
            f"--prompts is missing: give {'evaluation_metadata.jsonl' if suite == 'geneval' else 'dpg_bench.csv'}"
        )
    if suite in ("geneval", "dpg") and _FORMAT.value != "png":
        raise UserError(f"--file_format=jpeg: pictures of --suite={suite} are PNG")
    if given(_FIRST) and given(_FOLDER) and not given(model_flags.PROMPTS):
        raise UserError("--first is a number of prompts: with --folder give --prompts as well")
    cli.folder_of(_SAVE_REFERENCE)
    if _SHARD.value is None:
        _check_inputs()


def _check_inputs():
    """Raises UserError where what scores, or what it reads, is not there: pictures may take hours to make first."""
    from sprint_jax.evaluation import dpg, extractors, fid, geneval, image_sets

    if _HOOK.value:
        extractors.hook(_HOOK.value)
    if _WEIGHTS.value and _SUITE.value == "clip" and not pathlib.Path(_WEIGHTS.value).is_dir():
        raise UserError(
            f"no folder --weights={_WEIGHTS.value}: give that of a CLIP model (openai/clip-vit-large-patch14)"
        )
    if _WEIGHTS.value and _SUITE.value == "fid" and not pathlib.Path(_WEIGHTS.value).is_file():
        raise UserError(
            f"no file --weights={_WEIGHTS.value}: download {extractors.INCEPTION_FILE} (of pytorch-fid) and give its path"
        )
    if _REFERENCE.value and pathlib.Path(_REFERENCE.value).is_dir():
        image_sets.found(_REFERENCE.value)
    elif _REFERENCE.value:
        fid.load(_REFERENCE.value)
    if _DETECTIONS.value:
        geneval.read_detections(_DETECTIONS.value)
    if _ANSWERS.value:
        dpg.read_answers(_ANSWERS.value)


def _save_weights():
    from sprint_jax.evaluation import extractors

    if not _WEIGHTS.value:
        raise UserError("--weights is missing: give the .pth file that --save_weights is made of")
    cli.folder_of(_SAVE_WEIGHTS)
    extractors.save_inception(_WEIGHTS.value, _SAVE_WEIGHTS.value, unpublished=_UNPUBLISHED.value)
    print(f"the weights are in {_SAVE_WEIGHTS.value}: give it as --weights")


def _shard():
    """(i, n) of --shard, or None."""
    if _SHARD.value is None:
        return None
    first, _, count = _SHARD.value.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(
            f"--shard={_SHARD.value}: write i/n with i from 0 to n - 1, for example 0/4"
        )
    if not model_flags.MODEL.value:
        raise UserError("--shard is for making pictures: give --model")
    return int(first), int(count)


def _per_prompt():
    flag = model_flags.PER_PROMPT
    return flag.value if flag.present else _PER_PROMPT.get(_SUITE.value, 1)


def _prompts():
    """The suite's prompts, the first ones where so asked; None where the pictures of --folder say theirs."""
    from sprint_jax.evaluation import geneval, prompt_sets

    suite, path = _SUITE.value, model_flags.PROMPTS.value
    if path:
        prompts = prompt_sets.read(path)
    elif model_flags.MODEL.value and suite == "shapes":
        prompts = _heldout_captions()
    elif model_flags.MODEL.value:
        raise UserError(f"--prompts is missing: give a file of prompts for --suite={suite}")
    else:
        return None
    if _FIRST.value is not None and _FIRST.value > len(prompts):
        raise UserError(f"--first={_FIRST.value}: there are {len(prompts)} prompts")
    prompts = prompts[: _FIRST.value]
    if suite == "geneval":
        for number, prompt in enumerate(prompts, 1):
            geneval.check_metadata(prompt.row, f"{path} prompt {number}")
    if suite == "dpg" and not path.endswith(".csv"):
        raise UserError(f"--prompts={path}: --suite=dpg reads dpg_bench.csv")
    return prompts


def _heldout_captions():
    from sprint_jax.evaluation import prompt_sets
    from sprint_jax.sampling import loading
    from sprint_jax.storage import run_files

    model = pathlib.Path(model_flags.MODEL.value)
    if not (model / run_files.STUDENT).is_file():
        raise UserError(
            f"--prompts is missing: only a finished run has held-out captions of its own, and {model} is none"
        )
    data = loading.read_config(model).data
    return prompt_sets.heldout_captions(
        data.eval_seed, _FIRST.value or _PROMPTS_BY_DEFAULT, data.size
    )


def _made(prompts, shard):
    """Makes what is not there yet. Returns (paths, prompt of each, what the report says about the making)."""
    from sprint_jax.evaluation import gallery

    suite, per_prompt, out = _SUITE.value, _per_prompt(), pathlib.Path(model_flags.OUT.value)
    if suite == "shapes":
        _captions([p.text for p in prompts])  # refused before a model is read
    if suite == "geneval":
        units = gallery.geneval(prompts, per_prompt)
    elif suite == "dpg":
        units = gallery.grids(prompts)
    else:
        units = gallery.plain(prompts, per_prompt, {"png": "png", "jpeg": "jpg"}[_FORMAT.value])
    settings = _settings()
    gallery.check(
        out, settings, units
    )  # before a model is read; the folder is claimed with the first pictures
    claim = functools.partial(gallery.claim, out, settings, units)
    mine = units if shard is None else units[shard[0] :: shard[1]]
    wanted = gallery.missing(out, mine)
    if wanted:
        _make(out, wanted, sum(len(unit.indices) for unit in mine), claim)
    else:
        claim()
    if suite == "geneval" and shard is None:
        gallery.write_metadata(out, prompts, per_prompt, _GRID.value)
    folder, known = out / gallery.PICTURES, gallery.protocol(out)
    made = {
        "prompts": len(prompts),
        **known["settings"],
        "made_by": [_line(maker) for maker in known["made_by"]],
    }
    return [folder / unit.file for unit in units], [unit.prompt for unit in units], made


def _line(fields):
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _settings():
    """What decides about pixels, as asked for; None is the model's own."""
    from sprint_jax.evaluation import gallery

    f, instruction = model_flags, model_flags.INSTRUCTION.value
    if instruction:
        try:
            instruction = hashlib.sha256(pathlib.Path(instruction).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"cannot read --instruction_file={instruction} ({error.strerror}): give a text file"
            ) from None
    return {
        "model": f.MODEL.value,
        "model_fingerprint": gallery.fingerprint(f.MODEL.value),
        "seed": f.SEED.value,
        "steps": f.STEPS.value,
        "timesteps": f.angles(),
        "guidance_scale": f.GUIDANCE.value,
        "schedule": f.SCHEDULE.value,
        "height": f.HEIGHT.value,
        "width": f.WIDTH.value,
        "dtype": f.DTYPE.value,
        "batch_size": f.BATCH.value,
        "tile": f.TILE.value,
        "instruction": instruction,
        "images_per_prompt": _per_prompt(),
        "file_format": _FORMAT.value,
        "layout": _SUITE.value if _SUITE.value in ("geneval", "dpg") else "plain",
    }


def _make(out, units, total, claim):
    import tqdm

    from sprint_jax.evaluation import gallery
    from sprint_jax.runtime import compile_cache
    from sprint_jax.sampling import loading

    compile_cache.start()
    f = model_flags
    dtype = f.DTYPE.value or loading.default_dtype()
    say = lambda message: print(message, file=sys.stderr, flush=True)
    pipe = loading.load(
        f.MODEL.value, dtype=dtype, instruction=f.INSTRUCTION.value, tile=f.TILE.value, say=say
    )
    options = {
        "steps": f.STEPS.value,
        "guidance_scale": f.GUIDANCE.value,
        "seed": f.SEED.value,
        "schedule": f.SCHEDULE.value,
        "timesteps": f.angles(),
        "height": f.HEIGHT.value,
        "width": f.WIDTH.value,
    }
    left = sum(len(unit.indices) for unit in units)
    with tqdm.tqdm(
        total=total, initial=total - left, unit="picture", desc="generate", delay=5
    ) as bar:
        gallery.make(
            out,
            units,
            pipe,
            options,
            batch=f.BATCH.value or pipe.batch_size,
            file_format=_FORMAT.value,
            bar=bar,
            claim=claim,
        )


def _score_pictures(paths, texts, made):
    from sprint_jax.evaluation import image_sets

    sizes, formats = image_sets.inspected(paths)
    shown = [f"{h} x {w}" for h, w in sorted(sizes)]
    protocol = {"pictures": len(paths), "sizes": shown, "format": formats}
    if _SUITE.value == "shapes":
        image_sets.one_size(sizes, "they are not of one model")
        scores, protocol = (
            _shapes(paths, texts),
            protocol | {"checker": "sprint_jax.toy.checker"},
        )
    elif _SUITE.value == "fid":
        scores, more = _fid(paths, sizes, formats)
        protocol |= more
    elif _SUITE.value == "clip":
        scores, more = _clip(paths, texts)
        protocol |= more
    else:
        scores, protocol = _imagereward(paths, texts), protocol | {"hook": _HOOK.value}
    if scores:
        _report(scores, protocol, made)


def _report(scores, protocol, made, details=None):
    import jax

    from sprint_jax.evaluation import report
    from sprint_jax.storage import revision

    out = pathlib.Path(model_flags.OUT.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
        path = report.write(
            out,
            {
                "suite": _SUITE.value,
                "scores": scores,
                "protocol": protocol,
                "pictures": made,
                "code": {
                    "commit": revision.commit(),
                    "jax": jax.__version__,
                    "device": jax.devices()[0].device_kind,
                },
            }
            | ({"details": details} if details else {}),
        )
    except OSError as error:
        raise UserError(f"cannot write in --out={out} ({error.strerror}): choose another") from None
    for name, value in scores.items():
        rows = (
            {f"{name}, {part}": v for part, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        for label, number in rows.items():
            print(f"{label.replace('_', ' ')}: {number:.6g}")
    print(f"report in {path}")


def _captions(texts):
    from sprint_jax.toy import shapes

    captions, other = [], []
    for text in texts:
        try:
            captions.append(shapes.parse(text))
        except ValueError:
            other.append(text)
    if other:
        raise UserError(
            f"{len(other)} of {len(texts)} prompts are no captions of shapes, first {other[0]!r}: --suite=shapes reads only those"
        )
    return captions


def _shapes(paths, texts):
    import tqdm

    from sprint_jax.evaluation import image_sets
    from sprint_jax.toy import checker

    captions = _captions(texts)
    images = (
        image_sets.read(path) for path in tqdm.tqdm(paths, unit="picture", desc="read", delay=5)
    )
    overall, tasks = checker.score(images, captions)
    return {"overall": overall, "tasks": tasks}


def _parts(paths, name):
    """Lists of pictures read, a part at a time, with a bar; and where each begins."""
    import tqdm

    from sprint_jax.evaluation import image_sets

    size = 4 * _SCORING_BATCH.value
    with tqdm.tqdm(total=len(paths), unit="picture", desc=name, delay=5) as bar:
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            yield start, [image_sets.read(path) for path in part]
            bar.update(len(part))


def _fid(paths, sizes, formats):
    from sprint_jax.evaluation import extractors, fid

    if _HOOK.value:
        extract, digest = extractors.hook(_HOOK.value), None
    else:
        params, digest = extractors.load_inception(_WEIGHTS.value, unpublished=_UNPUBLISHED.value)
        extract = extractors.Inception(params, resize=_RESIZE.value, batch=_SCORING_BATCH.value)
    published = digest is not None and not _UNPUBLISHED.value
    protocol = {
        "features": f"hook {_HOOK.value}"
        if _HOOK.value
        else "FID Inception, 2048 pooled"
        if published
        else "Inception of other weights",
        "weights_sha256": digest,
        "resize": None if _HOOK.value else _RESIZE.value,
        "picture_size": _SIZE.value,
    }
    reference, theirs = _reference(extract, protocol)
    gaussian = _gaussian(extract, paths, sizes, "features")
    if _SAVE_REFERENCE.value:
        fid.save(_SAVE_REFERENCE.value, gaussian, protocol | {"file_format": ",".join(formats)})
        print(f"statistics of {gaussian.count} pictures in {_SAVE_REFERENCE.value}")
    if reference is None:
        return {}, protocol
    if len(gaussian.mean) > 500:  # minutes on a slow machine, and no way to watch it
        print(
            f"the matrix root of {len(gaussian.mean)} features: a minute or two",
            file=sys.stderr,
            flush=True,
        )
    name = "fid" if published else "frechet_distance_not_fid"
    return {name: fid.distance(gaussian, reference)}, protocol | theirs


def _gaussian(extract, paths, sizes, name):
    """Statistics of pictures, read and put through the network part by part."""
    from sprint_jax.evaluation import extractors, fid, image_sets

    if _SIZE.value is None:
        image_sets.one_size(sizes, "say --picture_size to bring them to one")
    fit = (
        (lambda image: image)
        if _SIZE.value is None
        else functools.partial(extractors.shorter_side, size=_SIZE.value)
    )
    parts = (
        fid.Moments.of(extract([fit(image) for image in images]))
        for _, images in _parts(paths, name)
    )
    gaussian = fid.merge(parts).gaussian()
    if gaussian.count <= len(gaussian.mean):
        warnings.warn(
            f"{gaussian.count} pictures give a singular covariance of {len(gaussian.mean)} features (it takes "
            f"{len(gaussian.mean) + 1}): the distance is far too large and compares only with itself",
            stacklevel=1,
        )
    return gaussian


def _reference(extract, protocol):
    """(Gaussian, what the report says about it) of --reference; (None, {}) without."""
    from sprint_jax.evaluation import fid, image_sets

    if not _REFERENCE.value:
        return None, {}
    path = pathlib.Path(_REFERENCE.value)
    if path.is_dir():
        paths = image_sets.found(path)
        sizes, formats = image_sets.inspected(paths)
        gaussian = _gaussian(extract, paths, sizes, "reference")
        return gaussian, {
            "reference": str(path),
            "reference_pictures": gaussian.count,
            "reference_format": formats,
        }
    gaussian, stored = fid.load(path)
    for name, value in protocol.items():
        ours = "" if value is None else str(value)
        if name in stored and stored[name] != ours:
            raise UserError(
                f"{path} was made with {name}={stored[name] or None}, now {value}: use the same, or other statistics"
            )
    unsaid = [name for name in protocol if name not in stored]
    described = {"reference": str(path), "reference_pictures": gaussian.count or "not in the file"}
    described["reference_format"] = stored.get("file_format", "not in the file")
    return gaussian, described | ({"not in the reference's file": unsaid} if unsaid else {})


def _clip(paths, texts):
    import numpy as np

    from sprint_jax.evaluation import clip_score, extractors

    clip, digest = extractors.load_clip(_WEIGHTS.value, batch=_SCORING_BATCH.value)
    cosines = []
    for start, images in _parts(paths, "clip"):
        found = clip.images(images), clip.texts(texts[start : start + len(images)])
        cosines.append(clip_score.cosines(*found))
    cosines = np.concatenate(cosines)
    scores = {
        "clip_score": clip_score.sana(cosines, clip.logit_scale),
        "clip_score_torchmetrics": clip_score.torchmetrics(cosines),
    }
    scale = float(np.exp(clip.logit_scale))
    return scores, {
        "weights": _WEIGHTS.value,
        "weights_sha256": digest,
        "scale": scale,
        "text": "cut to the window, end token kept",
    }


def _imagereward(paths, texts):
    import numpy as np

    from sprint_jax.evaluation import extractors

    score, found = extractors.hook(_HOOK.value), []
    for start, images in _parts(paths, "score"):
        given = np.asarray(score(texts[start : start + len(images)], images), np.float64)
        if given.shape != (len(images),) or not np.isfinite(given).all():
            raise UserError(
                f"--hook={_HOOK.value} gave {given.shape} for {len(images)} pictures: one finite number each"
            )
        found.append(given)
    return {"imagereward": float(np.concatenate(found).mean())}


def _score_records(prompts=None, made=None):
    """geneval and dpg: scores of recorded detections or answers, where there are some."""
    from sprint_jax.evaluation import dpg, geneval

    prompts = _prompts() if prompts is None else prompts
    if _SUITE.value == "geneval":
        if not _DETECTIONS.value:
            print(
                f"pictures and metadata are in {_folder()}; next: run the detector on it and give --detections=FILE.jsonl"
            )
            return
        pictures = _geneval_pictures(prompts)
        found = geneval.score(geneval.read_detections(_DETECTIONS.value), pictures)
        lacking = [task for task in geneval.TASKS if task not in found["tasks"]]
        if lacking:
            warnings.warn(
                f"no prompts of {', '.join(lacking)}: overall is the mean of the other tasks",
                stacklevel=1,
            )
        protocol = {
            "pictures": len(pictures),
            "detections": _DETECTIONS.value,
            "confidence": geneval.CONFIDENCE,
            "counting_confidence": geneval.COUNTING_CONFIDENCE,
            "most_objects": geneval.MOST_OBJECTS,
            "position_margin": geneval.POSITION_MARGIN,
        }
        details = {"pictures": found["counts"], "wrong": found["wrong"]}
        _report(
            {"overall": found["overall"], "tasks": found["tasks"]},
            protocol,
            made or {"folder": _FOLDER.value and str(_folder())},
            details,
        )
        return
    if not _ANSWERS.value:
        print(
            f"2 x 2 grids are in {_folder()}; next: ask about their pictures and give --answers=FILE.jsonl"
        )
        return
    found = dpg.score(dpg.read_answers(_ANSWERS.value), [prompt.row for prompt in prompts])
    protocol = {
        "prompts": len(prompts),
        "pictures": len(prompts) * dpg.PICTURES,
        "answers": _ANSWERS.value,
    }
    _report(
        {"dpg": found["score"]},
        protocol,
        made or {"folder": _FOLDER.value and str(_folder())},
        {"items": found["items"]},
    )


def _folder():
    """Where the pictures are: in --folder, of an --out of this command in its own folder of them; without, in that of --out."""
    from sprint_jax.evaluation import gallery

    given = pathlib.Path(_FOLDER.value or model_flags.OUT.value)
    return (
        given
        if _FOLDER.value and not (given / gallery.PROTOCOL).is_file()
        else given / gallery.PICTURES
    )


def _geneval_pictures(prompts):
    """[(file, metadata)] of the prompts, or of the official folders in --folder."""
    import json

    from sprint_jax.evaluation import geneval

    if prompts is not None:
        return [
            (f"{i:05d}/samples/{j:05d}.png", p.row)
            for i, p in enumerate(prompts)
            for j in range(_per_prompt())
        ]
    folder, found = _folder(), []
    for path in sorted(folder.glob("*/metadata.jsonl")):
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({error}): make the folder again") from None
        geneval.check_metadata(metadata, path)
        samples = sorted((path.parent / "samples").glob("*.png"))
        if not samples:
            raise UserError(f"{path.parent} has no samples: make them first")
        found += [(sample.relative_to(folder).as_posix(), metadata) for sample in samples]
    if not found:
        raise UserError(
            f"{folder} has no */metadata.jsonl: give the official layout, or --prompts=evaluation_metadata.jsonl"
        )
    return found


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)
