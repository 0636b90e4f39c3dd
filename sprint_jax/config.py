"""The configuration as frozen dataclasses: every field is written out, has a type and is read somewhere.

A card in `configs/` makes an `ml_collections.ConfigDict`; `parse` turns it into `Config`. There are no
defaults here: a key that is missing or unknown is an error that names it.
"""

import dataclasses
import difflib
import math

import ml_collections

from sprint_jax.conditioning import sketches
from sprint_jax.encoders import words
from sprint_jax.errors import UserError
from sprint_jax.models.discriminator import GROUP
from sprint_jax.models.linear_dit import REMAT
from sprint_jax.ops import backend


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is learnt from.

    encoded: folder made by `sprint-jax encode`; "" draws the embedded `shapes` as they are needed.
    model: diffusers or converted folder whose autoencoder and text encoder made that folder; "" for the
      embedded codec and text encoder of this config.
    size: picture side in pixels (the middle one of aspect-ratio buckets).
    seed: names the training order, and the pictures drawn. eval_seed: the held-out ones, and their noise.
    workers: processes that read an encoded folder, per host; 0 reads in threads.
    max_bad: share of unreadable records at which training stops.
    """

    encoded: str
    model: str
    size: int
    seed: int
    eval_seed: int
    workers: int
    max_bad: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What the network reads: see `sprint_jax.encoders.words` and `sprint_jax.encoders.parts`.

    vocabulary: "shapes", "words" (any words, hashed) or "gemma" (of data.model, or features in data.encoded).
    length: tokens of a caption, padded. dim: width of their features.
    """

    vocabulary: str
    length: int
    dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices as data x fsdp: see `training/sharding.py`. data = -1 takes what fsdp leaves."""

    data: int
    fsdp: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
    """Pixel seam: see `sprint_jax.encoders.patches`; with data.model its DC-AE, of this block and channels.

    block: pixels per latent cell along each side. scale: makes the latents' root mean square near one.
    weights: principal components, a .safetensors file or "package:NAME"; "" keeps every pixel value.
    channels: components in that file (3 block^2 without one).
    """

    block: int
    scale: float
    weights: str
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Network shared by teacher and student: see `sprint_jax.models.linear_dit.LinearDiT`.

    attention: "plain", or "pallas" for kernels where the device has them (`sprint_jax.ops.backend.resolve`), on an NVIDIA GPU those of
      the Mix-FFN's convolution too.
    """

    width: int
    depth: int
    heads: int
    cross_heads: int
    mlp_ratio: float
    patch_size: int
    qk_norm: bool
    time_scale: float
    guidance_embed: bool
    guidance_scale_factor: float
    remat: str
    unroll: int
    dtype: str
    residual_dtype: str
    attention: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """kind: "adamw", "came", or "muon" (with AdamW for what is no matrix).

    lr: of AdamW or CAME. muon_lr: of Muon's matrices. reference_batch: both are multiplied by
    sqrt(batch / reference_batch), 0 leaves them (the published trainer has 256).
    warmup: updates of linear warm-up; decay_to: final share of the rates under a cosine (1 = constant).
    b1, b2: of the moments of AdamW and CAME (Muon's matrices keep optax's 0.95); b3: of CAME's instability. clip: global norm of the gradient.
    """

    kind: str
    lr: float
    muon_lr: float
    reference_batch: int
    warmup: int
    decay_to: float
    b1: float
    b2: float
    b3: float
    weight_decay: float
    clip: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """Flow-matching teacher.

    pretrained: weights to use instead of training: a .safetensors file, "package:NAME" for one shipped
      with the code, a diffusers or converted folder, "" to train here.
    start: weights that training here begins from, as for pretrained; "" begins from random ones.
    steps, batch, ema, caption_dropout: training; ema is the decay (0: none).
    accumulate: parts of a batch whose gradients are averaged one after the other, to save memory.
    border_start: begin from parameters in which zero padding shows (`training/teacher_step.py`).
    time_mean, time_std, time_shift: logit-normal time sampling.
    base_qk_norm, base_time_scale: what the teacher is first trained with. Where they differ from
      model.qk_norm and model.time_scale, finetune_steps more steps follow with the missing parts added.
    """

    pretrained: str
    start: str
    steps: int
    batch: int
    accumulate: int
    ema: float
    caption_dropout: float
    border_start: bool
    time_mean: float
    time_std: float
    time_shift: float
    base_qk_norm: bool
    base_time_scale: float
    finetune_steps: int
    finetune_lr: float
    optimizer: Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """ControlNet around the teacher and the student: see `sprint_jax.models.controlnet`.

    depth: blocks that it copies; 0 for none, and nothing else here counts then.
    condition: what is made of each picture, "edges", "scribble" or "hed" (`sprint_jax.conditioning.sketches`; encoded data
      must hold the same).
    pretrained: weights of a multi-step ControlNet to use instead of training: a .safetensors file, or a folder with a
      diffusers ControlNet; "" to train it here around the frozen teacher.
    steps, batch: of that training; times, dropped captions and average are those of `teacher`.
    dropout: share of samples that go without the condition in the sprint, whose student so learns to draw with and without.
    freehand: probability that an example of the embedded data has its objects anywhere and is shown by a rough sketch, as a
      person draws (`sprint_jax.toy.freehand`), instead of by `condition`; 0 for encoded data.
    optimizer: of that training.
    """

    depth: int
    condition: str
    pretrained: str
    steps: int
    batch: int
    dropout: float
    freehand: float
    optimizer: Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sprint:
    """sCM + LADD distillation. Steps count generator and discriminator updates, which alternate.

    accumulate: as for the teacher; no random draw and no normalisation group depends on it.
    guidance: scales drawn per sample for the teacher and told to the student.
    uncond_mask: "cond" (code: the prompt's own mask on null features) or "null" (the null prompt's mask).
    p_mean, p_std: time sampler of the generator; disc_mean, disc_std: of the renoising.
    tangent_warmup: H. tangent_normalize, weighting, reduction: see `diffusion.scm` and `diffusion.ladd`.
    logvar_gradient: what the adaptive weight's log-variance trains, "network" (code: its head and the time embedding
      that the head reads) or "head" alone. logvar_start: its value before training (code: 0); a normalised tangent's
      error is below 1 / D for latents of D numbers, so -log D is about where it ends.
    scm_weight, adv_weight: factors of the two losses (lambda is the second); 0 leaves that loss out.
    max_time: probability p of the max-time weighting. misaligned: real pictures with wrong text as fakes.
    head_blocks: teacher blocks with a discriminator head, 0-based.
    """

    steps: int
    batch: int
    accumulate: int
    ema: float
    guidance: tuple[float, ...]
    uncond_mask: str
    p_mean: float
    p_std: float
    tangent_warmup: int
    tangent_normalize: bool
    weighting: str
    logvar_gradient: str
    logvar_start: float
    scm_weight: float
    adv_weight: float
    max_time: float
    disc_mean: float
    disc_std: float
    reduction: str
    misaligned: bool
    head_blocks: tuple[int, ...]
    optimizer: Optimizer
    head_optimizer: Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """prompts: held-out prompts scored. batch: pictures at a time. teacher_steps: of the full teacher.

    teacher_guidance: CFG scale of the teacher. student_guidance: embedded scale of the student.
    schedule: time list of the student, "code" or "paper". reference: real pictures behind the Fréchet
    distance. samples: pictures in each samples_*.png.
    """

    prompts: int
    batch: int
    teacher_steps: int
    teacher_guidance: float
    student_guidance: float
    schedule: str
    reference: int
    samples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """log_every, checkpoint_every: in steps. keep: checkpoints kept. max_rejected: non-finite in a row.

    strip_every: steps between pictures of a few held-out prompts on the way, 0 for none. Drawing them holds the whole
      network on one device, beside what training holds there.
    quick_compile: on a CPU, programs compile in a third of the time, side by side, and run slower (`sprint_jax/runtime/quick_compile.py`).
    """

    log_every: int
    checkpoint_every: int
    strip_every: int
    keep: int
    max_rejected: int
    quick_compile: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """seed: of parameters and training noise. The rest: see each section."""

    seed: int
    data: Data
    text: Text
    codec: Codec
    model: Model
    mesh: Mesh
    teacher: Teacher
    control: Control
    sprint: Sprint
    evaluation: Evaluation
    run: Run


def parse(tree: ml_collections.ConfigDict | dict) -> Config:
    """ConfigDict -> Config. Raises UserError for unknown or missing keys and for values out of range."""
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    config = _build(Config, tree, "config")
    _check(config)
    return config


def to_dict(config: Config) -> dict:
    """Config -> nested dict of plain values, the inverse of `parse`."""
    return dataclasses.asdict(config)


def _build(kind, tree, path):
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; known: {', '.join(fields)}"
            raise UserError(f"unknown config key {path}.{name}{hint}")
    missing = [name for name in fields if name not in tree]
    if missing:
        raise UserError(f"config key {path}.{missing[0]} is missing: add it to the config file")
    values = {}
    for name, field in fields.items():
        value = tree[name]
        if dataclasses.is_dataclass(field):
            value = _build(field, value, f"{path}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return kind(**values)


def _check(c: Config):
    s, t, m, k = c.sprint, c.teacher, c.model, c.control
    counts = {
        "data.size": c.data.size,
        "codec.block": c.codec.block,
        "model.patch_size": m.patch_size,
        "model.width": m.width,
        "model.depth": m.depth,
        "model.heads": m.heads,
        "model.cross_heads": m.cross_heads,
        "model.unroll": m.unroll,
        "teacher.batch": t.batch,
        "teacher.accumulate": t.accumulate,
        "control.batch": k.batch,
        "sprint.batch": s.batch,
        "sprint.accumulate": s.accumulate,
        "evaluation.batch": c.evaluation.batch,
        "evaluation.teacher_steps": c.evaluation.teacher_steps,
        "run.keep": c.run.keep,
        "run.max_rejected": c.run.max_rejected,
    }
    for name, value in counts.items():  # first: rules divide by them
        if value < 1:
            raise UserError(f"config.{name} {value}: use 1 or more")
    cell = c.codec.block * m.patch_size
    # One teacher becomes another by a fine-tune that adds QK-norm or changes times, never by itself.
    other_base = (t.base_qk_norm, t.base_time_scale) != (m.qk_norm, m.time_scale)
    optimizers = (
        ("teacher.optimizer", t.optimizer),
        ("control.optimizer", k.optimizer),
        ("sprint.optimizer", s.optimizer),
        ("sprint.head_optimizer", s.head_optimizer),
    )
    require = [
        (
            c.text.vocabulary in ("shapes", "words", "gemma"),
            f"config.text.vocabulary {c.text.vocabulary!r}: use shapes, words or gemma",
        ),
        (
            c.text.vocabulary != "shapes"
            or (c.text.length, c.text.dim) == (words.LENGTH, words.DIM),
            f"config.text {c.text.length} x {c.text.dim}: vocabulary shapes has length {words.LENGTH} and dim {words.DIM}",
        ),
        (
            c.text.vocabulary != "words" or c.text.dim == words.DIM,
            f"config.text.dim {c.text.dim}: vocabulary words has {words.DIM}",
        ),
        (
            c.data.encoded or c.text.vocabulary == "shapes",
            f"config.data.encoded is empty: captions in {c.text.vocabulary} need a folder made by sprint-jax encode",
        ),
        (
            c.data.seed >= 0 and 0 <= c.data.eval_seed < 2**30,
            "config.data.seed: use 0 or more, config.data.eval_seed: 0 to 2^30 - 1",
        ),
        (
            c.data.workers >= 0 and 0 <= c.data.max_bad <= 1,
            "config.data.workers: use 0 or more; config.data.max_bad: a share in [0, 1]",
        ),
        (
            c.mesh.fsdp >= 1 and (c.mesh.data >= 1 or c.mesh.data == -1),
            f"config.mesh.data {c.mesh.data}, config.mesh.fsdp {c.mesh.fsdp}: use 1 or more, data=-1 for what is left",
        ),
        (
            c.data.size % cell == 0,
            f"config.data.size {c.data.size}: use a multiple of {cell} (codec.block x patch_size)",
        ),
        (
            c.codec.weights
            or c.text.vocabulary == "gemma"
            or c.codec.channels == 3 * c.codec.block**2,
            f"config.codec.channels {c.codec.channels}: without codec.weights it is 3 x block^2 = {3 * c.codec.block**2}",
        ),
        (
            m.width % m.heads == 0,
            f"config.model.width {m.width}: use a multiple of heads {m.heads}",
        ),
        (
            m.width % m.cross_heads == 0,
            f"config.model.width {m.width}: use a multiple of cross_heads {m.cross_heads}",
        ),
        (m.remat in REMAT, f"config.model.remat {m.remat!r}: use one of {', '.join(REMAT)}"),
        (
            m.dtype in ("float32", "bfloat16"),
            f"config.model.dtype {m.dtype!r}: use float32 or bfloat16",
        ),
        (
            m.residual_dtype in ("float32", m.dtype),
            f"config.model.residual_dtype {m.residual_dtype!r}: use float32, or model.dtype, which is {m.dtype}",
        ),
        (
            m.attention in backend.WANTED,
            f"config.model.attention {m.attention!r}: use {' or '.join(backend.WANTED)}",
        ),
        (
            t.steps >= 0 and t.finetune_steps >= 0,
            "config.teacher.steps and finetune_steps: use 0 or more",
        ),
        (
            t.pretrained or t.steps > 0 or (t.start and t.finetune_steps > 0 and other_base),
            "config.teacher.pretrained is empty and nothing trains a teacher: give it, or teacher.steps, or teacher.start with finetune_steps and another base_qk_norm or base_time_scale than model's",
        ),
        (
            t.pretrained or not other_base or t.finetune_steps > 0,
            f"config.teacher.base_qk_norm {t.base_qk_norm}, base_time_scale {t.base_time_scale} and config.model.qk_norm {m.qk_norm}, time_scale {m.time_scale}: use equal ones, or finetune_steps",
        ),
        (
            t.pretrained or m.qk_norm or not t.base_qk_norm,
            "config.teacher.base_qk_norm is True and config.model.qk_norm False: a fine-tune adds QK-norm and never takes it away",
        ),
        (
            0 <= k.depth < m.depth,
            f"config.control.depth {k.depth}: use 0 (no ControlNet) to {m.depth - 1}, below model.depth",
        ),
        (
            k.condition in sketches.KINDS,
            f"config.control.condition {k.condition!r}: use one of {', '.join(sketches.KINDS)}",
        ),
        (
            not k.depth or c.data.encoded or k.condition != "hed",
            "config.control.condition hed needs encoded pictures: use edges or scribble, or name config.data.encoded",
        ),
        (
            not k.depth or k.pretrained or k.steps > 0,
            "config.control.pretrained is empty and config.control.steps is 0: nothing trains the ControlNet",
        ),
        (0 <= k.dropout < 1, f"config.control.dropout {k.dropout}: use a share from 0 to below 1"),
        (
            0 <= k.freehand <= 1,
            f"config.control.freehand {k.freehand}: use a probability in [0, 1]",
        ),
        (
            not k.freehand or not c.data.encoded,
            f"config.control.freehand {k.freehand}: encoded pictures have no rough sketches, use 0 with config.data.encoded",
        ),
        *(
            (
                x.batch % x.accumulate == 0,
                f"config.{n}.accumulate {x.accumulate}: use a divisor of {n}.batch {x.batch}",
            )
            for n, x in (("teacher", t), ("sprint", s))
        ),
        (
            k.batch % t.accumulate == 0,
            f"config.control.batch {k.batch}: use a multiple of config.teacher.accumulate {t.accumulate}",
        ),
        (
            s.accumulate == 1 or s.batch % (GROUP * s.accumulate) == 0,
            f"config.sprint.batch {s.batch}: with accumulate {s.accumulate} use a multiple of {GROUP * s.accumulate} (normalisation groups of {GROUP})",
        ),
        (
            s.accumulate > 1
            or all(
                n % math.ceil(n / GROUP) == 0
                for n in (s.batch, *((2 * s.batch,) if s.misaligned else ()))
            ),
            f"config.sprint.batch {s.batch}: the discriminator normalises in equal groups of at most {GROUP} samples, use a multiple of {GROUP}",
        ),
        *(
            (
                o.kind in ("adamw", "muon", "came"),
                f"config.{n}.kind {o.kind!r}: use adamw, muon or came",
            )
            for n, o in optimizers
        ),
        *((o.clip > 0, f"config.{n}.clip {o.clip}: use a norm above 0") for n, o in optimizers),
        *(
            (
                o.kind != "muon" or o.muon_lr > 0,
                f"config.{n}.muon_lr {o.muon_lr}: kind muon needs a rate above 0 for its matrices",
            )
            for n, o in optimizers
        ),
        *(
            (
                o.kind != "came" or (0 < o.b1 < 1 and 0 < o.b3 < 1),
                f"config.{n}.b1 {o.b1}, b3 {o.b3}: kind came needs values between 0 and 1",
            )
            for n, o in optimizers
        ),
        *(
            (0 <= rate < math.inf, f"config.{n} {rate}: use a finite rate of 0 or more")
            for n, rate in (
                *(
                    (f"{n}.{name}", getattr(o, name))
                    for n, o in optimizers
                    for name in ("lr", "muon_lr", "weight_decay")
                ),
                ("teacher.finetune_lr", t.finetune_lr),
            )
        ),
        *(
            (0 <= x.ema < 1, f"config.{n}.ema {x.ema}: use a decay from 0 (none) to below 1")
            for n, x in (("teacher", t), ("sprint", s))
        ),
        (
            s.steps >= 0 and s.steps % 2 == 0,
            f"config.sprint.steps {s.steps}: use an even number (generator and discriminator alternate), 0 for a teacher alone",
        ),
        (
            s.uncond_mask in ("cond", "null"),
            f"config.sprint.uncond_mask {s.uncond_mask!r}: use cond or null",
        ),
        (
            s.weighting in ("code", "paper"),
            f"config.sprint.weighting {s.weighting!r}: use code or paper",
        ),
        (
            s.logvar_gradient in ("network", "head"),
            f"config.sprint.logvar_gradient {s.logvar_gradient!r}: use network or head",
        ),
        (
            s.reduction in ("code", "paper"),
            f"config.sprint.reduction {s.reduction!r}: use code or paper",
        ),
        (
            s.scm_weight > 0 or s.adv_weight > 0,
            "config.sprint.scm_weight and adv_weight are both 0: nothing to train",
        ),
        (0 <= s.max_time <= 1, f"config.sprint.max_time {s.max_time}: use a probability in [0, 1]"),
        (len(s.guidance) > 0, "config.sprint.guidance is empty: give at least one scale"),
        *(
            (math.isfinite(scale), f"config.{n} {scale}: use a finite scale")
            for n, scale in (
                *(("sprint.guidance", scale) for scale in s.guidance),
                ("evaluation.teacher_guidance", c.evaluation.teacher_guidance),
                ("evaluation.student_guidance", c.evaluation.student_guidance),
            )
        ),
        (
            len(s.head_blocks) > 0
            and list(s.head_blocks) == sorted(set(s.head_blocks))
            and s.head_blocks[0] >= 0
            and s.head_blocks[-1] < m.depth,
            f"config.sprint.head_blocks {s.head_blocks}: use increasing block numbers within 0..{m.depth - 1}",
        ),
        (
            not s.misaligned or s.batch > 1,
            "config.sprint.misaligned needs config.sprint.batch of 2 or more",
        ),
        (
            c.evaluation.schedule in ("code", "paper"),
            f"config.evaluation.schedule {c.evaluation.schedule!r}: use code or paper",
        ),
        (
            c.evaluation.prompts >= 2 and c.evaluation.reference >= 2,
            "config.evaluation.prompts and reference: use 2 or more, one picture has no covariance",
        ),
        (
            c.evaluation.samples <= c.evaluation.prompts,
            f"config.evaluation.samples {c.evaluation.samples}: use at most evaluation.prompts {c.evaluation.prompts}",
        ),
        (
            c.run.log_every % 2 == 0 and c.run.log_every > 0,
            f"config.run.log_every {c.run.log_every}: use an even number",
        ),
        (
            c.run.checkpoint_every > 0 and c.run.checkpoint_every % 2 == 0,
            f"config.run.checkpoint_every {c.run.checkpoint_every}: use an even number",
        ),
        (
            c.run.strip_every >= 0 and c.run.strip_every % 2 == 0,
            f"config.run.strip_every {c.run.strip_every}: use an even number, 0 for none",
        ),
    ]
    for holds, message in require:
        if not holds:
            raise UserError(message)
