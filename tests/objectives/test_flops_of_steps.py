"""Nothing is computed twice in a training step.

Products are counted in the trace, under scan and remat, and by the compiler. F is the network once,
Fe the part of it up to the last hooked block, and H the heads, on the same batch.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.diffusion import scm
from sprint_jax.objectives import ladd, step
from sprint_jax.objectives.base import Frozen
from sprint_jax.planning import flops
from sprint_jax.training import stages

BATCH = 8


def looped_config(model=(), **sprint):
    """Return a small config: six blocks in a loop and two heads, the last at block four."""
    tree = card()
    tree.model.update(dict(width=64, depth=6, heads=2, cross_heads=2, unroll=1) | dict(model))
    tree.phases.sprint.batch = BATCH
    tree.phases.sprint.objective.update(dict(head_blocks=(1, 3)) | sprint)
    return config.parse(tree)


@dataclasses.dataclass
class Case:
    """Steps of a config on abstract arrays, with plain descent, since Muon has products of
    its own.
    """

    c: config.Config

    def __post_init__(self):
        array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        self.settings = self.c.phases["sprint"].objective
        self.networks = stages.networks(self.c, self.c.phases["sprint"])
        self.objective = self.settings.objective(self.networks)
        text = self.c.text.length, self.c.text.dim
        self.latent = build.latent_shape(self.c)
        self.batch = {
            "latent": array(BATCH, *self.latent),
            "text": array(BATCH, *text),
            "mask": array(BATCH, text[0]),
        }
        self.frozen = Frozen(
            null_text=array(1, *text),
            null_mask=array(1, text[0]),
            teacher=jax.eval_shape(self.networks.teacher.init, jax.random.key(0)),
        )
        begin = lambda frozen, key: step.start(
            self.objective,
            dict.fromkeys(self.objective.updates, optax.sgd(1.0)),
            ema=self.c.phases["sprint"].ema,
            frozen=frozen,
            begin=None,
            key=key,
        )
        self.state = jax.eval_shape(begin, self.frozen, jax.random.key(0))
        self.inputs = (
            array(BATCH, *self.latent),
            array(BATCH),
            self.batch["text"],
            self.batch["mask"],
        )

    def network(self, *args, **options):
        out = self.networks.teacher.apply(*args, **options)
        return out.velocity, out.features

    def forward(self):
        return flops.count(self.network, self.frozen.teacher, *self.inputs).multiplied

    def features(self):
        partial = functools.partial(
            self.network, features=self.settings.head_blocks, velocity=False
        )
        return flops.count(partial, self.frozen.teacher, *self.inputs).multiplied

    def heads(self):
        tokens = jax.ShapeDtypeStruct(
            (BATCH, self.latent[0] * self.latent[1], self.c.model.width), jnp.float32
        )
        heads, role = ladd.heads_of(self.settings, self.networks), self.state.roles["heads"]
        return flops.count(heads.apply, role.params, role.extra["real"], [tokens] * 2).multiplied

    def step(self, role):
        return step.make_step(
            self.objective.updates[role],
            optax.sgd(1.0),
            ema=self.c.phases["sprint"].ema if role == "student" else 0.0,
            accumulate=1,
            seed=0,
        )

    def count(self, role):
        return flops.count(self.step(role), self.state, self.frozen, self.batch).multiplied


def unshared(F, v, xt, t, *, r):
    """Compute `scm.consistency` as the published trainer does, the value by a separate forward
    pass.
    """
    cos_sin = jnp.cos(t) * jnp.sin(t)
    tangents = (scm.expand(cos_sin, xt) * v / scm.SIGMA_D, cos_sin)
    F_minus, J, _ = jax.lax.stop_gradient(jax.jvp(F, (xt / scm.SIGMA_D, t), tangents, has_aux=True))
    value, logvar = F(xt / scm.SIGMA_D, t)
    return value, logvar, jax.lax.stop_gradient(scm.tangent(F_minus, J, v, xt, t, r))


def test_generator_shares_the_primal(monkeypatch):
    """sCM takes 2 F for the teacher, 2 F for value and tangent and 2 F backward, less the text.

    The text has no tangent. The unshared form takes 1 F more.
    """
    case = Case(looped_config(adv_weight=0.0))
    forward, counted = case.forward(), case.count("student")
    assert 5.6 * forward < counted < 6 * forward
    monkeypatch.setattr(scm, "consistency", unshared)
    assert case.count("student") - counted == pytest.approx(forward, rel=0.05)


@pytest.mark.parametrize("remat,again", [("none", 0), ("cheap", 0.5), ("block", 2.7)])
def test_whole_generator(remat, again):
    """The count is 9 F + 2 Fe + 2 H.

    Remat adds the blocks of two student passes and of the features once, and no second tangent.
    """
    case = Case(looped_config({"remat": remat}))
    least = 9 * case.forward() + 2 * case.features() + 2 * case.heads()
    counted = case.count("student")
    assert 0.93 * least < counted < least + again * case.forward()


def test_features_end_at_the_last_hooked_block():
    case = Case(looped_config())
    # Four of six blocks, without the output layer.
    assert case.features() / case.forward() == pytest.approx(4 / 6, abs=0.03)


def test_whole_discriminator():
    """The count is F + 3 Fe + 9 H.

    These are the student once, features of fake, misaligned and real images, and heads forward and
    backward.
    """
    case = Case(looped_config())
    most = case.forward() + 3 * case.features() + 9 * case.heads()
    assert 0.97 * most < case.count("heads") <= most


@pytest.mark.slow
def test_compiler_agrees():
    """Compare with XLA's own count.

    It counts the body of a loop once, so there are no loops, and it includes elementwise work.
    """
    case = Case(looped_config({"depth": 2, "unroll": 2}, adv_weight=0.0, head_blocks=(1,)))
    options = {"xla_backend_optimization_level": 0}

    def compiled(function, *args):
        return (
            jax.jit(function)
            .lower(*args)
            .compile(compiler_options=options)
            .cost_analysis()["flops"]
        )

    forward = compiled(case.network, case.frozen.teacher, *case.inputs)
    generator = compiled(case.step("student"), case.state, case.frozen, case.batch)
    assert 5.6 * forward < generator < 6.4 * forward
