"""What objectives share whose images are judged: settings, and a judge's verdicts.

Such a phase sees the judge, so a score by the same judge is no longer a measurement. The loss that
keeps the student a student of its teacher, the anchor, stays on.
"""

import dataclasses
from collections.abc import Iterator

import jax

from sprint_jax.diffusion import trigflow
from sprint_jax.objectives import anchor
from sprint_jax.objectives.base import Frozen, Needs, Networks


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedTerm(anchor.AnchorTerm):
    """Settings of training by a judge's verdicts."""

    reward: str
    """The judge "module:function", a function of prompts and uint8 images that returns a number in
    [0, 1] for each.
    """
    reward_weight: float
    """Factor of the reward's loss."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        yield from super().problems()
        if not self.reward_weight > 0:
            yield "reward_weight", "use a number above 0"
        if not all(self.reward.partition(":")) or self.reward.startswith("."):
            yield "reward", "write module:function, a module on the Python path"
        if not self.anchor_weight > 0:
            yield "anchor_weight", "use a number above 0: by the reward alone a student runs away"
        if self.stored:
            yield "stored", "use 0: stored rollouts have no captions that a judge could read"

    def needs(self) -> Needs:
        """Return what a judge asks of a run: captions in the batches."""
        return dataclasses.replace(super().needs(), captions=True, reward=self.reward)


def verdicts(networks: Networks, x: jax.Array, captions: jax.Array, frozen: Frozen) -> jax.Array:
    """Return the judge's verdicts [B] of images x at scale sigma_d, stopped."""
    assert networks.judge is not None, "stages give one to objectives that need it"
    found = networks.judge(x / trigflow.SIGMA_D, captions, frozen.pixels)
    return jax.lax.stop_gradient(found)
