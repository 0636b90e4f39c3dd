"""Flow matching (paper section 2.1): trains a teacher, fine-tunes one to QK-norm, or trains a
ControlNet alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import traverse_util

from sprint_jax.diffusion import flow
from sprint_jax.models.controlnet import Controlled
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.objectives.base import Aux, Needs, Networks, Objective, PyTree, Start, Update
from sprint_jax.objectives.by_time import by_time
from sprint_jax.objectives.conditions import conditions

_FF_GATE = 5  # row of a block's table that gates its Mix-FFN


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Settings of flow matching."""

    kind: Literal["flow_matching"]
    """Names this objective."""
    caption_dropout: float
    """Probability that a caption becomes the empty prompt, for guidance."""
    time_mean: float
    """Mean of the normal variable behind the logit-normal times."""
    time_std: float
    """Its standard deviation."""
    time_shift: float
    """Shift of the times towards noise: t <- shift t / (1 + (shift - 1) t)."""
    border_start: bool
    """Begin from random parameters in which zero padding shows; see `fresh`."""

    @property
    def round(self) -> tuple[str, ...]:
        """The one role of flow matching."""
        return ("network",)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        if not 0 <= self.caption_dropout <= 1:
            yield "caption_dropout", "use a probability in [0, 1]"

    def needs(self) -> Needs:
        """Return what flow matching asks of a run: nothing but a network to train."""
        return Needs(teacher=False, network=("base", "teacher", "control"))

    def objective(self, networks: Networks) -> Objective:
        """Build the objective.

        The trained network is a `LinearDiT`, trained as a whole, or a `Controlled`, whose
        ControlNet alone is: the role then holds its parameters, and `Frozen.teacher` those of the
        trunk.
        """
        return Objective(
            main="network",
            round=self.round,
            updates={"network": _update(self, networks.trained)},
            start=lambda frozen, begin, key: {
                "network": Start(_begin(self, networks.trained, frozen, begin, key))
            },
            sampler="guided_euler",
        )


def _begin(settings: FlowMatching, model, frozen, begin, key) -> PyTree:
    if isinstance(model, Controlled):
        return model.control.init_from(frozen.teacher) if begin is None else begin
    if begin is None:
        return fresh(model, key, borders=settings.border_start)
    return add_qk_norm(begin, model, key)


def _update(settings: FlowMatching, model) -> Update:
    controlled = isinstance(model, Controlled)

    def draw(key, batch, frozen):
        k_time, k_noise, k_drop = jax.random.split(key, 3)
        x0 = batch["latent"]
        n = x0.shape[0]
        s = settings
        t = flow.sample_time(k_time, n, mean=s.time_mean, std=s.time_std, shift=s.time_shift)
        z = jax.random.normal(k_noise, x0.shape)
        drop = jax.random.bernoulli(k_drop, s.caption_dropout, (n, 1, 1))
        # Under the mask of the caption, as in the published trainer; sCM's unconditional branch
        # matches it.
        cond = {"text": jnp.where(drop, frozen.null_text, batch["text"]), "mask": batch["mask"]}
        if controlled:
            # No sample goes without the condition: it would teach the ControlNet nothing.
            cond = conditions(batch, key, 0.0) | cond
        return {"x0": x0, "z": z, "t": t, "cond": cond}

    def loss(params, draws, state, frozen):
        whole = {"trunk": frozen.teacher, "control": params} if controlled else params
        v = lambda x, t: model.apply(whole, x, t, **draws["cond"]).velocity
        per_sample = flow.loss(v, draws["x0"], draws["z"], draws["t"])
        return per_sample.mean(), Aux(by_time=by_time(draws["t"], 1.0, {"loss": per_sample}))

    return Update(role="network", draw=draw, loss=loss)


def fresh(model: LinearDiT, key: jax.Array, *, borders: bool) -> PyTree:
    """Draw random parameters of a teacher to be trained from nothing.

    borders: strengthen the signal of where a token stands. SANA has no positional embedding: only
      the zero padding of the 3x3 convolutions says it. From the usual initialization that is so
      small a part of the hidden state that a small model does not find it in thousands of steps.
      Random biases before the convolution, an open gate behind it and a weaker patch embedding
      make it a few percent.
    """
    params: PyTree = model.init(key)
    if not borders:
        return params
    bias = params["blocks"]["ff"]["conv_inverted"]["bias"]
    table = params["blocks"]["scale_shift_table"]
    params["blocks"]["ff"]["conv_inverted"]["bias"] = 2.0 * jax.random.normal(
        jax.random.fold_in(key, 1), bias.shape
    )
    params["blocks"]["scale_shift_table"] = table.at[:, _FF_GATE].add(1.0)
    params["inputs"]["patch_embed"]["kernel"] = 0.3 * params["inputs"]["patch_embed"]["kernel"]
    return params


def add_qk_norm(params: PyTree, model: LinearDiT, key: jax.Array) -> PyTree:
    """Complete the parameters of a teacher without QK-norm by norm weights of one.

    Every other parameter is kept. A change of time scale needs no parameters. Raises ValueError if
    more than the norms differ.
    """
    abstract: PyTree = jax.eval_shape(model.init, key)
    have = traverse_util.flatten_dict(params)
    wanted: dict[tuple[str, ...], PyTree] = traverse_util.flatten_dict(abstract)
    merged = {}
    for name, leaf in wanted.items():
        if name in have:
            merged[name] = have.pop(name)
        elif "norm_q" in name or "norm_k" in name:
            merged[name] = jnp.ones(leaf.shape, leaf.dtype)
        else:
            raise ValueError(f"{'/'.join(name)} is missing from the teacher and is no QK-norm")
    if have:
        raise ValueError(
            f"the teacher has parameters the model lacks: {['/'.join(n) for n in have]}"
        )
    return traverse_util.unflatten_dict(merged)
