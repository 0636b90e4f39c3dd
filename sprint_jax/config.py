"""The configuration as frozen dataclasses: every field is written out, has a type and is read
somewhere.

A card in `configs/` makes an `ml_collections.ConfigDict`; `parse` turns it into `Config`. There
are no defaults here: a key that is missing or unknown is an error that names it, and so is a value
of the wrong type.
"""

import dataclasses
import difflib
import importlib
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import ml_collections

from sprint_jax.diffusion import limits
from sprint_jax.encoders import words
from sprint_jax.errors import UserError
from sprint_jax.objectives import rollouts
from sprint_jax.objectives.base import Settings
from sprint_jax.objectives.cmt import Cmt
from sprint_jax.objectives.dmd import Dmd
from sprint_jax.objectives.dmd2 import Dmd2
from sprint_jax.objectives.eulerian import Eulerian
from sprint_jax.objectives.flow_matching import FlowMatching
from sprint_jax.objectives.ladd import Ladd
from sprint_jax.objectives.lagrangian import Lagrangian
from sprint_jax.objectives.policy import Policy
from sprint_jax.objectives.proxy_reward import ProxyReward
from sprint_jax.objectives.rcm import Rcm
from sprint_jax.objectives.regression import Regression
from sprint_jax.objectives.repair import Repair
from sprint_jax.objectives.scm import Scm
from sprint_jax.objectives.scm_ladd import ScmLadd
from sprint_jax.objectives.semigroup import Semigroup
from sprint_jax.objectives.tbcm import Tbcm
from sprint_jax.optim.optimizers import Optimizer
from sprint_jax.runtime.renamed_keys import RENAMED
from sprint_jax.storage import files

Problems = Iterator[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data set."""

    encoded: files.LocalPath
    """Folder made by `sprint-jax encode`; "" draws the embedded shapes as they are needed."""
    prompts: files.LocalPath
    """File of prompts, one a line or a table, that are the whole data set: no images. "" for none.
    """
    model: files.LocalPath
    """Folder (diffusers or converted) of the autoencoder and text encoder that made it; "" for
    this config's.
    """
    size: int
    """Image side in pixels (the middle one of aspect-ratio buckets)."""
    seed: int
    """Names the training order, and the drawn images."""
    eval_seed: int
    """Names the held-out images and their noise."""
    workers: int
    """Processes that read an encoded folder, per host; 0 reads in threads."""
    max_bad: float
    """Share of unreadable records at which training stops."""

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        if advice := limits.advice("width", self.size):
            yield "size", advice
        if self.seed < 0:
            yield "seed", "use 0 or more"
        if not 0 <= self.eval_seed < 2**30:
            yield "eval_seed", "use 0 to 2^30 - 1"
        if self.workers < 0:
            yield "workers", "use 0 or more"
        if not 0 <= self.max_bad <= 1:
            yield "max_bad", "use a share in [0, 1]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text features that the network reads; see `sprint_jax.encoders`."""

    vocabulary: Literal["shapes", "words", "gemma"]
    """The shapes' own words, any words (hashed), or Gemma-2 of data.model."""
    length: int
    """Tokens of a caption, padded."""
    dim: int
    """Width of their features."""

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        if self.vocabulary == "shapes" and self.length != words.LENGTH:
            yield "length", f"vocabulary shapes has length {words.LENGTH}"
        if self.vocabulary in ("shapes", "words") and self.dim != words.DIM:
            yield "dim", f"vocabulary {self.vocabulary} has dim {words.DIM}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices as data x fsdp; see `training/sharding.py`."""

    data: int
    """Devices along the batch; -1 takes what fsdp leaves."""
    fsdp: int
    """Devices along which parameters are cut."""

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        yield from _positive(self, "fsdp")
        if self.data < 1 and self.data != -1:
            yield "data", "use 1 or more, or -1 for what fsdp leaves"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec:
    """The embedded pixel codec, or the block and channels of the autoencoder of data.model."""

    block: int
    """Pixels per latent cell along each side."""
    scale: float
    """Makes the latents' root mean square near one."""
    weights: files.LocalPath
    """Principal components, a .safetensors file or "package:NAME"; "" keeps every pixel value."""
    channels: int
    """Components in that file (3 block^2 without one)."""

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        yield from _positive(self, "block", "channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The network shared by teacher and student; see `sprint_jax.models.linear_dit.LinearDiT`."""

    width: int
    """Channels of the residual stream."""
    depth: int
    """Blocks."""
    heads: int
    """Heads of linear self-attention."""
    cross_heads: int
    """Heads of cross-attention."""
    mlp_ratio: float
    """Hidden width of the Mix-FFN over width."""
    patch_size: int
    """Latent cells of a token along each side."""
    qk_norm: bool
    """RMSNorm of queries and keys."""
    time_scale: float
    """Factor of flow times before their embedding: 1 for dense times (Eq. 10), 1000 as in SANA."""
    guidance_embed: bool
    """Condition the student on the guidance scale."""
    guidance_scale_factor: float
    """Factor of the scale before its embedding."""
    target_embed: bool
    """Condition the student on a second time, to which it jumps. Objectives that learn jumps to
    any earlier time need it.
    """
    remat: Literal["none", "block", "cheap"]
    """What a backward pass computes again: nothing, whole blocks, or what is cheap."""
    unroll: int
    """Blocks per iteration of the loop over blocks."""
    dtype: Literal["float32", "bfloat16"]
    """Operands of matrix products."""
    residual_dtype: Literal["float32", "bfloat16"]
    """The residual stream."""
    attention: Literal["plain", "pallas"]
    """Plain JAX, or kernels where the device has them; on NVIDIA GPUs also for the Mix-FFN's
    convolution.
    """

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        names = ("width", "depth", "heads", "cross_heads", "patch_size", "unroll")
        yield from _positive(self, *names)
        if any(getattr(self, name) < 1 for name in names):
            return
        for name in ("heads", "cross_heads"):
            if self.width % getattr(self, name):
                yield "width", f"use a multiple of {name} {getattr(self, name)}"
        if self.residual_dtype not in ("float32", self.dtype):
            yield "residual_dtype", f"use float32, or model.dtype, which is {self.dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The network that is distilled: where it comes from, and what it is first trained as."""

    pretrained: files.LocalPath
    """Weights to use instead of training: a .safetensors file, "package:NAME" or a folder; ""
    trains here.
    """
    start: files.LocalPath
    """Weights that training here begins from, as for pretrained; "" begins from random ones."""
    base_qk_norm: bool
    """Whether the base network, which a fine-tune begins from, has QK-norm."""
    base_time_scale: float
    """The base network's time scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet around the teacher and the student; see `sprint_jax.models.controlnet`."""

    depth: int
    """Blocks that it copies; 0 for none, and then nothing else here counts."""
    condition: Literal["edges", "scribble", "hed"]
    """What is made of each image (encoded data must hold the same); see `sprint_jax.conditioning`.
    """
    pretrained: files.LocalPath
    """Weights of a multi-step ControlNet to use instead of training; "" trains it here."""
    freehand: float
    """Probability that a drawn example has its objects anywhere and a rough sketch, as a person
    draws.
    """

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        if self.depth < 0:
            yield "depth", "use 0 (no ControlNet) or more"
        if not 0 <= self.freehand <= 1:
            yield "freehand", "use a probability in [0, 1]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a run: an objective trains one network on the data of the run."""

    network: Literal["base", "teacher", "control", "student"]
    """The network that it trains: the teacher as it is first trained, the teacher, its ControlNet,
    the student.
    """
    seed: int
    """Added to the config's seed, so that phases draw different numbers."""
    steps: int
    """Updates of all roles together; 0 leaves the phase out."""
    batch: int
    """Samples of a global batch."""
    accumulate: int
    """Parts of a batch whose gradients are averaged one after the other, to save memory; no draw
    depends on it.
    """
    ema: float
    """Decay of the moving average that the phase ends with; 0 for none."""
    optimizers: dict[str, Optimizer]
    """One for each role of the objective."""
    objective: Settings
    """The method: `kind` names it, or is "module:Class" of a settings class outside this package.
    """

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        yield from _positive(self, "batch", "accumulate")
        if self.steps < 0:
            yield "steps", "use 0 or more"
        if self.accumulate > 0 and self.batch % self.accumulate:
            yield "accumulate", f"use a divisor of batch {self.batch}"
        if not 0 <= self.ema < 1:
            yield "ema", "use a decay from 0 (none) to below 1"
        roles = sorted(set(self.objective.round))
        if sorted(self.optimizers) != roles:
            yield "optimizers", f"give one for each of {', '.join(roles)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is scored at the end of a run."""

    prompts: int
    """Held-out prompts."""
    split: Literal["heldout", "selection", "final"]
    """Which captions of `shapes` they are: all that are held out, the half for choosing settings,
    or the half for scores to report. Encoded data have one held-out split.
    """
    batch: int
    """Images generated at a time."""
    teacher_steps: int
    """Steps of the full teacher."""
    teacher_guidance: float
    """Its classifier-free guidance scale."""
    student_guidance: float
    """The scale that the student is conditioned on."""
    schedule: Literal["code", "paper", "even"]
    """Time list of the student; see `diffusion.samplers.scm_times`."""
    diversity: int
    """Captions, and noises of each, of the diversity of `shapes`; 0 leaves it out."""
    reference: int
    """Real images behind the Fréchet distance."""
    samples: int
    """Images in each samples_*.png."""

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        if self.diversity < 0:
            yield "diversity", "use 0 (none) or more"
        for name in ("prompts", "reference"):
            if getattr(self, name) < 2:
                yield name, "use 2 or more, one image has no covariance"
        if self.samples > self.prompts:
            yield "samples", f"use at most evaluation.prompts {self.prompts}"
        for name, kind in (
            ("teacher_guidance", "guidance_scale"),
            ("student_guidance", "guidance_scale"),
            ("teacher_steps", "steps"),
            ("batch", "batch_size"),
        ):
            if advice := limits.advice(kind, getattr(self, name)):
                yield name, advice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Logs and checkpoints."""

    log_every: int
    """Steps between rows of metrics."""
    checkpoint_every: int
    """Steps between checkpoints."""
    preview_every: int
    """Steps between previews of a few held-out prompts, 0 for none.

    A preview holds the network on one device.
    """
    keep: int
    """Checkpoints kept."""
    max_rejected: int
    """Non-finite updates in a row that end a run."""
    quick_compile: bool
    """On a CPU, compile in a third of the time, side by side, to slower programs."""

    def problems(self) -> Problems:
        """Yield (field, what to use instead) for each value out of range."""
        yield from _positive(self, "log_every", "checkpoint_every", "keep", "max_rejected")
        if self.preview_every < 0:
            yield "preview_every", "use 0 (none) or more"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int
    """Names parameters and training noise."""
    data: Data
    """The data set."""
    text: Text
    """The text features."""
    codec: Codec
    """The embedded pixel codec."""
    model: Model
    """The network."""
    mesh: Mesh
    """Devices."""
    teacher: Teacher
    """The network that is distilled."""
    control: Control
    """Its ControlNet."""
    order: tuple[str, ...]
    """Names of phases in the order in which they run."""
    phases: dict[str, Phase]
    """The phases by name."""
    evaluation: Evaluation
    """What is scored."""
    run: Run
    """Logs and checkpoints."""


def active(c: Config) -> tuple[str, ...]:
    """Return the names of the phases that run: those with steps, whose network is wanted and not
    given.
    """
    given = {
        "base": bool(c.teacher.pretrained),
        "teacher": bool(c.teacher.pretrained),
        "control": not c.control.depth or bool(c.control.pretrained),
        "student": False,
    }
    return tuple(n for n in c.order if c.phases[n].steps and not given[c.phases[n].network])


def parse(tree: ml_collections.ConfigDict | dict) -> Config:
    """Turn a ConfigDict or a nested dict into a `Config`.

    Raises UserError for unknown or missing keys, values of the wrong type, and values out of range.
    """
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    _refuse_renamed(tree)
    config = _section(Config, tree, "config")
    for holds, message in _rules(config):
        if not holds:
            raise UserError(message)
    return config


def to_dict(config: Config) -> dict:
    """Return nested dicts of plain values, the inverse of `parse`."""
    return dataclasses.asdict(config)


def is_old(tree: Any) -> bool:
    """Return whether a nested dict is a config of version 0.1."""
    return isinstance(tree, dict) and "sprint" in tree and "phases" not in tree


def _refuse_renamed(tree: dict) -> None:
    if is_old(tree):
        raise UserError(
            "this config is of version 0.1, whose training keys have other names "
            f"(config.sprint.steps is now config.{RENAMED['sprint.steps']}): start from a card in "
            f"configs/"
        )


def objective_class(kind: str, path: str = "config") -> type:
    """Return the settings class of an objective by its kind, or by "module:Class".

    Raises UserError.
    """
    match kind:
        case "flow_matching":
            return FlowMatching
        case "scm":
            return Scm
        case "ladd":
            return Ladd
        case "scm_ladd":
            return ScmLadd
        case "regression":
            return Regression
        case "repair":
            return Repair
        case "cmt":
            return Cmt
        case "tbcm":
            return Tbcm
        case "eulerian":
            return Eulerian
        case "lagrangian":
            return Lagrangian
        case "semigroup":
            return Semigroup
        case "dmd":
            return Dmd
        case "dmd2":
            return Dmd2
        case "rcm":
            return Rcm
        case "proxy_reward":
            return ProxyReward
        case "policy":
            return Policy
    module, colon, name = str(kind).partition(":")
    if not colon:
        raise UserError(
            f"{path}.kind {kind!r}: use flow_matching, regression, repair, scm, ladd, scm_ladd, "
            "cmt, tbcm, eulerian, lagrangian, semigroup, dmd, dmd2, rcm, proxy_reward, policy, or "
            "module:Class"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path}.kind {kind!r} cannot be imported ({error})") from None
    lacks = [n for n in ("round", "problems", "needs", "objective") if not hasattr(found, n)]
    if lacks or not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(
            f"{path}.kind {kind!r} is no settings class: give a dataclass like those of "
            f"sprint_jax.objectives{', with ' + lacks[0] if lacks else ''}"
        )
    return found


def _positive(section: Any, *names: str) -> Problems:
    for name in names:
        if getattr(section, name) < 1:
            yield name, "use 1 or more"


def _section(kind: type, tree: Any, path: str) -> Any:
    """Build a dataclass from a dict, checking names, types and the section's own rules."""
    if not isinstance(tree, dict):
        raise UserError(f"{path} {tree!r}: give a section with keys")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; known: {', '.join(fields)}"
            raise UserError(f"unknown config key {path}.{name}{hint}")
    missing = [name for name in fields if name not in tree]
    if missing:
        raise UserError(f"config key {path}.{missing[0]} is missing: add it to the config file")
    values = {name: _value(hint, tree[name], f"{path}.{name}") for name, hint in fields.items()}
    section = kind(**values)
    for field, advice in getattr(section, "problems", tuple)():
        raise UserError(f"{path}.{field} {_shown(getattr(section, field))}: {advice}")
    return section


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, dict) else repr(value)


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check one value against its type. Raises UserError naming the key, the value and the type."""
    if files.is_path(hint) and isinstance(value, str):
        return files.given(value, path)
    if hint is Settings:
        kind = value.get("kind", "") if isinstance(value, dict) else value
        return _section(objective_class(kind, path), value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _section(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict and isinstance(value, dict):
        return {name: _value(arguments[1], v, f"{path}.{name}") for name, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], v, path) for v in value)
    if origin is Literal and value in arguments:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    if origin in (typing.Union, types.UnionType):
        raise TypeError(f"{path}: {hint} is not a type of config values")
    raise UserError(f"{path} {value!r}: use {_named(hint)}")


def _named(hint: Any) -> str:
    """Name a type for people."""
    hint = str if files.is_path(hint) else hint
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_named(typing.get_args(hint)[0])}"
    return names.get(hint, "a section with keys")


_NETWORKS = ("base", "teacher", "control", "student")


def _rules(c: Config) -> Iterator[tuple[bool, str]]:
    """Yield (whether a rule between sections holds, what to say where it does not)."""
    yield bool(c.order), "config.order is empty: name phases of config.phases"
    for name in c.order:
        yield name in c.phases, f"config.order names {name!r}: use names of config.phases"
    yield from _data_rules(c)
    yield from _teacher_rules(c)
    yield from _control_rules(c)
    yield from _phase_rules(c)
    rounds = math.lcm(*(len(c.phases[name].objective.round) for name in c.order))
    for name in ("log_every", "checkpoint_every", "preview_every"):
        value = getattr(c.run, name)
        yield (
            value % rounds == 0,
            f"config.run.{name} {value}: use a multiple of {rounds}, a round of updates",
        )


def _data_rules(c: Config) -> Iterator[tuple[bool, str]]:
    cell = c.codec.block * c.model.patch_size
    yield (
        c.data.size % cell == 0,
        f"config.data.size {c.data.size}: use a multiple of {cell} (codec.block x patch_size)",
    )
    pixels = 3 * c.codec.block**2
    yield (
        bool(c.codec.weights) or c.text.vocabulary == "gemma" or c.codec.channels == pixels,
        f"config.codec.channels {c.codec.channels}: without codec.weights it is 3 x block^2 = "
        f"{pixels}",
    )
    yield (
        bool(c.data.encoded or c.data.prompts) or c.text.vocabulary == "shapes",
        f"config.data.encoded is empty: captions in {c.text.vocabulary} need a folder made by "
        "sprint-jax encode, or a file in config.data.prompts",
    )
    yield (
        not (c.data.encoded and c.data.prompts),
        "config.data.encoded and config.data.prompts are both given: use one",
    )
    yield (
        not c.data.prompts or c.text.vocabulary != "gemma" or bool(c.data.model),
        "config.data.prompts needs the text encoder: name its folder in config.data.model",
    )
    yield (
        not c.data.prompts or not c.control.depth,
        f"config.control.depth {c.control.depth}: prompts alone have no condition, use 0 with "
        "config.data.prompts",
    )
    yield (
        not c.data.prompts or c.evaluation.split == "heldout",
        f"config.evaluation.split {c.evaluation.split}: prompts of a file are not cut in halves, "
        "use heldout",
    )
    yield (
        not c.data.encoded or c.evaluation.split == "heldout",
        f"config.evaluation.split {c.evaluation.split}: encoded data are not cut in halves, use "
        "heldout",
    )


def _teacher_rules(c: Config) -> Iterator[tuple[bool, str]]:
    t, m, running = c.teacher, c.model, [c.phases[n].network for n in active(c)]
    # One teacher becomes another by a fine-tune that adds QK-norm or changes times, never by
    # itself.
    other = (t.base_qk_norm, t.base_time_scale) != (m.qk_norm, m.time_scale)
    base = f"config.teacher.base_qk_norm {t.base_qk_norm}, base_time_scale {t.base_time_scale}"
    yield (
        bool(t.pretrained) or m.qk_norm or not t.base_qk_norm,
        "config.teacher.base_qk_norm is True and config.model.qk_norm False: a fine-tune adds "
        "QK-norm and never takes it away",
    )
    yield (
        bool(t.pretrained)
        or "base" in running
        or (bool(t.start) and "teacher" in running and other),
        "config.teacher.pretrained is empty and nothing trains a teacher: give it, or "
        "phases.teacher.steps, or teacher.start with phases.finetune.steps and another "
        "base_qk_norm or base_time_scale than model's",
    )
    yield (
        bool(t.pretrained) or not other or "teacher" in running,
        f"{base} and config.model.qk_norm {m.qk_norm}, time_scale {m.time_scale}: use equal ones, "
        "or phases.finetune.steps",
    )


def _control_rules(c: Config) -> Iterator[tuple[bool, str]]:
    k = c.control
    yield (
        k.depth < c.model.depth,
        f"config.control.depth {k.depth}: use 0 (no ControlNet) to {c.model.depth - 1}, below "
        "model.depth",
    )
    yield (
        not k.depth or bool(c.data.encoded) or k.condition != "hed",
        "config.control.condition hed needs encoded images: use edges or scribble, or set "
        "config.data.encoded",
    )
    trained = any(c.phases[name].network == "control" for name in active(c))
    yield (
        not k.depth or bool(k.pretrained) or trained,
        "config.control.pretrained is empty and config.phases.control.steps is 0: nothing trains "
        "the ControlNet",
    )
    yield (
        not k.freehand or not c.data.encoded,
        f"config.control.freehand {k.freehand}: encoded images have no rough sketches, use 0 with "
        "config.data.encoded",
    )


def _phase_rules(c: Config) -> Iterator[tuple[bool, str]]:
    """Yield the rules of each phase, among them what its objective needs of the run around it."""
    for name in c.order:
        yield from _needs(c.phases[name], c.model.depth, f"config.phases.{name}")
        at = f"config.phases.{name}.objective"
        yield from _needs_of_others(c, c.phases[name], name in active(c), at)
    yield from _stored_rules(c)
    ranks = [_NETWORKS.index(c.phases[name].network) for name in c.order]
    yield (
        ranks == sorted(ranks) and len(set(c.order)) == len(c.order),
        f"config.order {', '.join(c.order)}: name each phase once, in the order of their networks "
        f"({', '.join(_NETWORKS)})",
    )


def _stored_rules(c: Config) -> Iterator[tuple[bool, str]]:
    """Yield the rules of phases that read stored rollouts: one set serves all."""
    reads = [n for n in active(c) if c.phases[n].objective.needs().stored]
    for name in reads:
        first: Phase = c.phases[reads[0]]
        settings: Any = c.phases[name].objective
        for field in rollouts.CONTENT:
            old, new = getattr(first.objective, field), getattr(settings, field)
            yield (
                old == new,
                f"config.phases.{name}.objective.{field} {new}: phases share stored rollouts and "
                f"{reads[0]} has {old}: use equal ones, or stored=0 in one of them",
            )
        yield (
            settings.stored % first.batch == 0,
            f"config.phases.{name}.objective.stored {settings.stored}: use a multiple of "
            f"config.phases.{reads[0]}.batch {first.batch}",
        )


def _needs_of_others(c: Config, phase: Phase, runs: bool, at: str) -> Iterator[tuple[bool, str]]:
    """Yield what an objective needs of other sections. runs: whether the phase does."""
    needs, kind = phase.objective.needs(), phase.objective.kind
    yield (
        not needs.target or c.model.target_embed,
        f"{at}: {kind} needs a second time, set config.model.target_embed=True (and "
        "config.evaluation.schedule=even)",
    )
    yield (
        not needs.captions or not c.data.encoded or not runs,
        f"{at}: {kind} judges images by their captions, which batches of encoded data leave out: "
        "use the embedded data or config.data.prompts",
    )
    yield (
        not needs.whole or phase.accumulate == 1,
        f"{at}: {kind} compares samples of the whole batch with these settings, set accumulate=1",
    )
    yield (
        not needs.plain or c.model.attention == "plain",
        f"{at}: {kind} differentiates a derivative, which kernels refuse: set "
        "config.model.attention=plain",
    )
    yield (
        not needs.images or not c.data.prompts or not runs,
        f"{at}: {kind} learns from images and config.data.prompts gives prompts alone: use an "
        "objective on rollouts (regression, repair, cmt, tbcm, lagrangian), or config.data.encoded",
    )


def _needs(phase: Phase, depth: int, at: str) -> Iterator[tuple[bool, str]]:
    needs, batch, parts = phase.objective.needs(), phase.batch, phase.accumulate
    kind, length = phase.objective.kind, len(phase.objective.round)
    yield (
        phase.steps % length == 0,
        f"{at}.steps {phase.steps}: use a multiple of {length} "
        f"({' and '.join(phase.objective.round)} take turns), 0 leaves the phase out",
    )
    yield (
        phase.network in needs.network,
        f"{at}.network {phase.network}: {kind} trains {' or '.join(needs.network)}",
    )
    yield (
        not needs.teacher or phase.network in ("control", "student"),
        f"{at}.network {phase.network}: {kind} learns from a teacher, which is not trained yet",
    )
    yield (
        all(block < depth for block in needs.blocks),
        f"{at}.objective.head_blocks {needs.blocks}: use block numbers within 0..{depth - 1}",
    )
    yield batch >= needs.batch, f"{at}.batch {batch}: {kind} needs {needs.batch} or more"
    yield (
        batch % needs.multiple == 0,
        f"{at}.batch {batch}: {kind} compares images in groups, use a multiple of {needs.multiple}",
    )
    for share in needs.shares:
        drawn = round(share * batch)
        yield (
            drawn > 0 and drawn % parts == 0,
            f"{at}.batch {batch}: {kind} draws {share} of it beside it, {drawn} samples, which "
            f"{parts} equal parts must hold: use another batch or accumulate",
        )
    if needs.group == 1:
        return
    yield (
        parts == 1 or batch % (needs.group * parts) == 0,
        f"{at}.batch {batch}: with accumulate {parts} use a multiple of {needs.group * parts} "
        f"(normalization groups of {needs.group})",
    )
    sizes = [batch * times for times in needs.groups_of]
    yield (
        parts > 1 or all(n % math.ceil(n / needs.group) == 0 for n in sizes),
        f"{at}.batch {batch}: the discriminator normalizes in equal groups of at most "
        f"{needs.group} samples, use a multiple of {needs.group}",
    )
