"""The seam for objectives: what a method trains, from which draws, with which loss, in which order.

An objective is data: a frozen dataclass of settings (its section of the config) builds an
`Objective`, whose updates are pure functions of parameters and drawn arrays.
`objectives.step.make_step` turns each update into the one training step of the project; the loop
knows nothing else.

Adding a method takes one file with a settings class, one card that names it, and one test. A class
outside this package is named in the card as "module:Class"; `examples/my_objective.py` shows one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import flax.struct
import jax
import optax

from sprint_jax.optim import came

PyTree = Any
# On the host, on the device, or abstract.
AnyArray = Any
Batch = Mapping[str, jax.Array]
Draws = Mapping[str, PyTree]


class Role(flax.struct.PyTreeNode):
    """One trainable network with everything that its updates change.

    params: its parameters. ema: their moving average, None without one. opt: the optimizer's state.
    extra: arrays that no gradient reaches, such as singular vectors; None for most.
    updates: int32, updates so far. rejected: int32 [2], non-finite updates in a row and in total.
    """

    params: PyTree
    ema: PyTree
    opt: optax.OptState
    extra: PyTree
    updates: jax.Array
    rejected: jax.Array


class State(flax.struct.PyTreeNode):
    """The training state: `step` counts the updates of all roles together."""

    step: jax.Array
    roles: dict[str, Role]


class Frozen(flax.struct.PyTreeNode):
    """Arrays that training reads and never changes.

    null_text [1, L, D] and null_mask [1, L]: features of the empty prompt. teacher: parameters of
    the network that is distilled, or of the trunk that a ControlNet is trained around; None while
    a teacher is trained. text_encoder: parameters of the encoder of token ids, None where batches
    hold features. pixels: parameters of the decoder, where images are judged. numbers: settings
    that a compiled program reads as arguments, so that runs share it; None without any.
    """

    null_text: AnyArray
    null_mask: AnyArray
    teacher: PyTree = None
    text_encoder: PyTree = None
    pixels: PyTree = None
    numbers: PyTree = None


class Start(flax.struct.PyTreeNode):
    """Where a role begins: its parameters and its extra arrays."""

    params: PyTree
    extra: PyTree = None


class Aux(flax.struct.PyTreeNode):
    """What a loss reports beside its value.

    scalars: {name: mean over samples}. by_time: see `objectives.by_time`.
    """

    scalars: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    by_time: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


class Report(flax.struct.PyTreeNode):
    """What one update reports: an `Aux` with the loss among its scalars, norms by module, and
    counters.

    norms: {name: L2 norm of the gradient}, of the role and of each of its modules. rejected: of
    the role.
    """

    scalars: dict[str, jax.Array]
    by_time: dict[str, jax.Array]
    norms: dict[str, jax.Array]
    rejected: jax.Array


def _keep_extra(role: Role) -> PyTree:
    return role.extra


def _keep_params(params: PyTree, state: State) -> PyTree:
    return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One kind of update.

    role: the role that it trains. draw: (key, batch, frozen) -> every random number of the update,
    for the whole batch, with the arrays that the loss reads; leading axes are samples. loss:
    (params, draws, state, frozen) -> (mean over samples, `Aux`), pure; it may see the draws in
    parts. prepare: role -> its extra arrays for this update, which the loss sees in `state` and
    which are kept if the update is finite. begin: (parameters, state) -> those that the update
    begins from, for a role that is pulled toward another. names: of the loss and of the gradient's
    norm in logs. rules: how CAME sees the parameters.
    """

    role: str
    draw: Callable[[jax.Array, Batch, Frozen], Draws]
    loss: Callable[[PyTree, Draws, State, Frozen], tuple[jax.Array, Aux]]
    prepare: Callable[[Role], PyTree] = _keep_extra
    begin: Callable[[PyTree, State], PyTree] = _keep_params
    names: tuple[str, str] = ("loss", "grad_norm")
    rules: came.Rules = came.LINEAR_DIT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A method, ready to train.

    main: the role whose parameters, or their average, are the result. round: names of updates in
    their order; one may come several times. updates: {name: update}, named as its role unless the
    role has several kinds. start:
    (frozen, parameters to begin from or None, key) -> {role: `Start`}, traced. sampler: how the
    result draws, "renoise" (few steps, fresh noise between them) or "guided_euler" (many guided
    steps).
    """

    main: str
    round: tuple[str, ...]
    updates: Mapping[str, Update]
    start: Callable[[Frozen, PyTree, jax.Array], dict[str, Start]]
    sampler: Literal["renoise", "guided_euler"]

    def __post_init__(self) -> None:
        """Raise ValueError where two updates would write the same column of the metrics."""
        names = [name for update in self.updates.values() for name in update.names]
        if len(set(names)) < len(names):
            raise ValueError(f"updates report {', '.join(names)}: give each names of its own")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective asks of the run around it; checked before anything is compiled.

    teacher: whether a trained network must be there to learn from. network: kinds of networks that
    it can train. blocks: numbers of the teacher's blocks whose features it reads. batch: least
    number of samples. multiple: a number that divides the batch, where samples are compared in
    groups. group: samples that are normalized together, 1 where none are. groups_of:
    how many times the batch is normalized at once (2 with as many wrong pairs beside it). shares:
    of the batch that are drawn beside it, rounded to whole samples. stored: rollouts of the teacher
    that are made and stored before training, 0 for none; such settings are a `RolloutTerm`. target:
    whether the student has to know a second time. images: whether it learns from latents of images;
    without, prompts alone are a data set. plain: whether it differentiates a derivative of the
    network, which kernels refuse. whole: whether its loss compares samples of the whole batch, so
    that the batch cannot be cut. captions: whether it reads captions in the batches. reward: the
    function "module:function" that judges its images, "" for none.
    """

    teacher: bool
    network: tuple[str, ...] = ("student",)
    blocks: tuple[int, ...] = ()
    batch: int = 1
    multiple: int = 1
    group: int = 1
    groups_of: tuple[int, ...] = (1,)
    shares: tuple[float, ...] = ()
    stored: int = 0
    target: bool = False
    images: bool = True
    plain: bool = False
    whole: bool = False
    captions: bool = False
    reward: str = ""


class Network(Protocol):
    """A network as objectives use it; see `models.linear_dit.LinearDiT` and
    `models.controlnet.Controlled`.
    """

    @property
    def guidance_embed(self) -> bool: ...

    @property
    def target_embed(self) -> bool: ...

    def init(self, key: jax.Array) -> PyTree: ...

    def apply(self, params: PyTree, x: jax.Array, t: jax.Array, **conditions: Any) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a run, as descriptions.

    trained: the network that the phase trains; of a ControlNet around a trunk the ControlNet
    alone. teacher: what is distilled, with its ControlNet where there is one. width: of the
    teacher's features. dtype: of their products. judge: (latents at unit scale, captions, the
    decoder's parameters) -> verdicts [B], for objectives that need one.
    """

    trained: Any
    teacher: Any
    width: int
    dtype: str
    judge: Callable[[jax.Array, jax.Array, PyTree], jax.Array] | None = None


@runtime_checkable
class Settings(Protocol):
    """An objective's section of the config: a frozen dataclass whose field `kind` names it.

    `round` gives the role of each update of a round, in order; each role has an optimizer in the
    config.
    `problems` yields (field, what to use instead) for each value out of range.
    """

    kind: str

    @property
    def round(self) -> tuple[str, ...]: ...

    def problems(self) -> Any: ...

    def needs(self) -> Needs: ...

    def objective(self, networks: Networks) -> Objective: ...
