"""Every kind of file that the package reads: a small whole one, and what reads it.

A reader may return or raise the errors that its callers turn into one line. Anything else that it
raises would be a traceback.
"""

import dataclasses
import functools
import io
import json
import pathlib
import tarfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from PIL import Image

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.cards import sprint as card
from sprint_jax.conversion import folder
from sprint_jax.data import captioned, encoded, sources
from sprint_jax.errors import UserError
from sprint_jax.evaluation import dpg, fid, gallery, geneval, image_sets, prompt_sets
from sprint_jax.models import dc_ae, gemma2, linear_dit
from sprint_jax.reporting import page
from sprint_jax.sampling import export, exported, loading
from sprint_jax.serving import schema
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import image_files, json_files, run_files, weights
from sprint_jax.training import checkpoints

CAPTION = "a red circle"
EXPECTED = (UserError, captioned.BadExample, encoded.BadRecord, Refused)


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of input.

    make: writes whole files into an empty folder. read: reads all of the folder. share: calls of
    it in a hundred.
    """

    name: str
    make: Callable[[pathlib.Path], None]
    read: Callable[[pathlib.Path], object]
    share: int


def _image(size: int = 24, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    return Image.fromarray(noise)


def _encoded_image(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    _image().save(buffer, form, **options)
    return buffer.getvalue()


def _make_images(out: pathlib.Path) -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        (out / f"a.{form.lower()}").write_bytes(_encoded_image(form))


def _read_images(out: pathlib.Path) -> None:
    for path in out.iterdir():
        _each(
            functools.partial(captioned.decode_image, path.read_bytes()),
            functools.partial(image_files.load, path, 16, 16),
            functools.partial(image_sets.read, path),
            functools.partial(image_sets.inspected, [path]),
        )


def _each(*calls: Callable[[], object]) -> None:
    """Make all calls, though any of them may raise an expected error; raise the first of these."""
    errors = []
    for call in calls:
        try:
            call()
        except EXPECTED as error:
            check_line(error)
            errors.append(error)
    if errors:
        raise errors[0]


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return all files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_line(error: Exception) -> None:
    """Raise AssertionError unless an expected error is one line of moderate length."""
    line = str(error)
    assert line and "\n" not in line and len(line) < 2000, f"not one line: {line[:300]!r}"


def _make_tar(out: pathlib.Path) -> None:
    with tarfile.open(out / "a.tar", "w") as tar:
        for number in range(4):
            for ending, data in (
                ("png", _encoded_image("PNG")),
                ("json", json.dumps({"prompt": CAPTION}).encode()),
            ):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    listing = {"shardlist": [{"url": "a.tar", "nsamples": 4}]}
    (out / "wids-meta.json").write_text(json.dumps(listing))


def _read_source(out: pathlib.Path) -> None:
    source = sources.open_source(out, "prompt")
    _each(*(functools.partial(_read_example, source, index) for index in range(len(source))))


def _read_example(source: Any, index: int) -> None:
    example = source[index]
    if example.image is not None:
        captioned.decode_image(example.image)


def _make_folder(out: pathlib.Path) -> None:
    for number in range(3):
        (out / f"{number}.png").write_bytes(_encoded_image("PNG"))
        (out / f"{number}.txt").write_text(CAPTION)
    rows = [{"file_name": f"{number}.png", "prompt": CAPTION} for number in range(2)]
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "meta_data.json").write_text(json.dumps({"img_names": ["0.png", "1", "2.png"]}))


def _make_encoded(out: pathlib.Path) -> None:
    record = {
        "latent": np.ones((2, 2, 4), np.float16),
        "caption": np.frombuffer(b"a red circle", np.uint8),
        "tokens": np.arange(3, dtype=np.int32),
    }
    shard = encoded.write_shard(out / "train-00000.array_record", [record] * 3)
    described = dict(
        model="m", source="s", text="tokens", text_dim=8, text_length=5, channels=4, factor=8
    )
    encoded.write_manifest(out / encoded.MANIFEST, described, [shard])


def _read_encoded(out: pathlib.Path) -> None:
    data = encoded.Encoded(out, "train")
    _each(*(functools.partial(data.read, index) for index in range(min(len(data), 10))))


def _make_tables(out: pathlib.Path) -> None:
    (out / "a.txt").write_text("a red circle\na blue square\n")
    (out / "a.json").write_text(json.dumps({"x": {"prompt": "a"}, "y": {"prompt": "b"}}))
    (out / "a.jsonl").write_text('{"prompt": "a", "id": "x"}\n{"prompt": "b"}\n')
    head = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    question = "x,a cat,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
    (out / "a.csv").write_text(head + "question_natural_language\n" + question)
    (out / "answers.jsonl").write_text(
        json.dumps({"item_id": "x", "picture": 0, "answers": {"1": "yes"}}) + "\n"
    )
    detection = {"class": "cat", "box": [0, 0, 9, 9], "confidence": 0.9, "color": "red"}
    (out / "detections.jsonl").write_text(json.dumps({"file": "a", "objects": [detection]}) + "\n")
    wanted = {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    (out / "metadata.jsonl").write_text(json.dumps(wanted) + "\n")
    (out / gallery.PROTOCOL).write_text(json.dumps({"settings": {"a": 1}, "made_by": []}))
    (out / "manifest.jsonl").write_text('{"file": "a.png", "prompt": "a"}\n')
    (out / "a.png").write_bytes(_encoded_image("PNG"))


def _read_tables(out: pathlib.Path) -> None:
    _each(
        *(
            functools.partial(prompt_sets.read, out / f"a.{end}")
            for end in ("txt", "json", "jsonl")
        ),
        lambda: dpg.read_questions(out / "a.csv"),
        lambda: prompt_sets.read(out / "a.csv"),
        lambda: dpg.read_answers(out / "answers.jsonl"),
        lambda: _judged(geneval.read_detections(out / "detections.jsonl")),
        lambda: [
            geneval.check_metadata(prompt.row, prompt.id)
            for prompt in prompt_sets.read(out / "metadata.jsonl")
        ],
        lambda: gallery.protocol(out),
        lambda: image_sets.with_prompts(out, None),
    )


def _judged(detections: dict[str, Any]) -> None:
    wanted = {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    for objects in detections.values():
        geneval.judge(objects, wanted)


def _make_statistics(out: pathlib.Path) -> None:
    fid.save(out / "a.npz", fid.Gaussian(np.zeros(4), np.eye(4), 10), {"suite": "fid"})


def _make_weights(out: pathlib.Path) -> None:
    weights.save(out / "a.safetensors", _TREE)


_TREE = {"a": {"w": np.ones((3, 4), np.float32)}, "b": np.zeros(5, np.float32)}


@functools.cache
def _checkpoint(tokenizer: pathlib.Path) -> folder.Checkpoint:
    """Return a published model with few parameters."""
    stage = (8, 1, dc_ae.RESIDUAL, ())
    stages = tuple(dc_ae.Stage(*stage) for _ in range(6))
    models: dict[str, Any] = dict(
        transformer=linear_dit.LinearDiT(
            in_channels=4, width=16, depth=1, heads=1, cross_heads=2, mlp_ratio=2.0, text_dim=8,
            patch_size=1, qk_norm=True, time_scale=1.0, guidance_embed=True,
            guidance_scale_factor=0.1, logvar_head=False, remat="none", unroll=1, dtype="float32",
            residual_dtype="float32", attention="plain",
        ),
        autoencoder=dc_ae.DCAE(in_channels=3, latent_channels=4, head_dim=8, encoder=stages,
            decoder=stages, scaling_factor=0.4),
        text_encoder=gemma2.Gemma2(vocab=16, width=8, depth=1, heads=2, kv_heads=1, head_dim=4,
            hidden=16, query_scalar=4.0, window=8, softcap=50.0, eps=1e-6, theta=1e4),
    )  # fmt: skip
    params = {name: model.init(jax.random.key(0)) for name, model in models.items()}
    return folder.Checkpoint(**models, params=params, tokenizer=tokenizer)


def _with_tokenizer(write: Callable[..., None], out: pathlib.Path, **options: Any) -> None:
    tokenizer = out.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    write(out, _checkpoint(tokenizer), **options)


def _read_published(out: pathlib.Path) -> None:
    folder.describe(out, dtype="float32").read(dtype="float32")


def make_run(out: pathlib.Path) -> None:
    """Write the work directory of a finished run."""
    tree = card.get_config("sprint")
    tree.model.update(width=16, depth=1, heads=1, cross_heads=1)
    tree.phases.sprint.objective.head_blocks = (0,)
    parsed = config_lib.parse(tree)
    json_files.write(out / run_files.CONFIG, config_lib.to_dict(parsed))
    weights.save(out / run_files.STUDENT, build.student(parsed).init(jax.random.key(0)))
    row = {"stage": "sprint", "step": 20, "loss": 1.0, "seconds": 2.0, "samples": 640}
    (out / run_files.METRICS).write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")


def _make_exported(out: pathlib.Path) -> None:
    run = out.parent / "run_to_export"
    run.mkdir()
    make_run(run)
    export.export(loading.load(run, dtype="float32"), out / "a.sprint", steps=[1], batch_sizes=[1])


def _make_checkpoints(out: pathlib.Path) -> None:
    with checkpoints.Checkpoints(out, keep=2) as kept:
        kept.save(1, {"roles": {"student": {"params": _TREE}}})


def _read_checkpoints(out: pathlib.Path) -> None:
    part = "roles", "student", "params"
    checkpoints.read_part(out, part, jax.eval_shape(lambda: _TREE))


_LIMITS = schema.Limits(
    steps=(1, 2, 4), sizes=((32, 32),), guidance_scale=4.5, schedule="code", takes_image=True,
    takes_control=True,
)  # fmt: skip


def _make_body(out: pathlib.Path) -> None:
    fields = {"prompt": "a red circle", "steps": 2, "seed": 1, "height": 32, "width": 32}
    (out / "body.json").write_text(json.dumps(fields))


def formats() -> Iterable[Format]:
    """Return all formats."""
    return (
        Format("images", _make_images, _read_images, 15),
        Format("tar", _make_tar, _read_source, 16),
        Format("folder of captioned images", _make_folder, _read_source, 14),
        Format("encoded data set", _make_encoded, _read_encoded, 8),
        Format("tables of the suites", _make_tables, _read_tables, 16),
        Format("statistics", _make_statistics, lambda out: fid.load(out / "a.npz"), 6),
        Format("weights", _make_weights, _read_weights, 8),
        Format(
            "diffusers folder",
            functools.partial(_with_tokenizer, folder.write_diffusers),
            _read_published,
            1,
        ),
        Format(
            "converted folder",
            functools.partial(_with_tokenizer, folder.write_ours),
            _read_published,
            1,
        ),
        Format("run directory", make_run, _read_run, 1),
        Format("exported file", _make_exported, lambda out: exported.load(out / "a.sprint"), 2),
        Format("checkpoints", _make_checkpoints, _read_checkpoints, 1),
        Format("request", _make_body, _read_body, 11),
    )


def _read_weights(out: pathlib.Path) -> None:
    weights.load(out / "a.safetensors", _TREE)


def _read_run(out: pathlib.Path) -> None:
    _each(lambda: loading.read_student(out), lambda: page.render(out))


def _read_body(out: pathlib.Path) -> None:
    path = out / "body.json"
    schema.parse(path.read_bytes() if path.exists() else b"", _LIMITS)
