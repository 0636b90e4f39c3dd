"""DMD2 and rCM: their terms against closed forms and autodiff, and their one step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.arrays import normals, same_bits, tree_error
from helpers.configs import card
from helpers.distillation import batch, frozen, jit, networks
from sprint_jax import config
from sprint_jax.diffusion import ladd as adversarial
from sprint_jax.diffusion import trigflow
from sprint_jax.errors import UserError
from sprint_jax.objectives import dmd, dmd2, rcm, scm, step
from sprint_jax.objectives.base import Frozen, Networks, Role, State
from sprint_jax.objectives.dmd2 import Dmd2
from sprint_jax.objectives.rcm import Rcm

SIGMA_D = 0.5
GUIDED = dict(
    guidance=(1.25, 2.0), uncond_mask="cond", control_dropout=0.0, logvar_start=0.0,
)  # fmt: skip
MATCHING = dict(
    sample_steps=2, sampler_times=0.5, renoise_mean=-0.6, renoise_std=1.0, dmd_normalize=True,
    dmd_guidance="coupled", critic_updates=2, critic_pull=1.0, dmd_weight=0.5,
)  # fmt: skip
DMD2 = Dmd2(
    kind="dmd2", adv_weight=0.1, divergence="reverse_kl", disc_mean=-0.6, disc_std=1.0,
    reduction="code", misaligned=True, heads_loss="softplus", head_blocks=(1,),
    **GUIDED, **MATCHING,
)  # fmt: skip
RCM = Rcm(
    kind="rcm", p_mean=-0.4, p_std=1.4, tangent_warmup=1, tangent_normalize=True,
    weighting="code", logvar_gradient="network", dmd_balance="gradient", dmd_start=0,
    **GUIDED, **MATCHING,
)  # fmt: skip
TX = {name: optax.sgd(0.1, momentum=0.9) for name in ("student", "heads", "fake")}


@functools.cache
def start(settings):
    """Return the state at step 0."""
    frozen()
    make = lambda: step.start(
        settings.objective(networks()), TX, ema=0.0, frozen=frozen(), begin=None,
        key=jax.random.key(1),
    )  # fmt: skip
    return jax.device_get(jit(make)())


@functools.cache
def update(settings, label, accumulate=1):
    """Return an update as a function of state and batch, compiled."""
    made = settings.objective(networks()).updates[label]
    one = step.make_step(made, TX[made.role], ema=0.0, accumulate=accumulate, seed=3)
    return jit(lambda state, rows: one(state, frozen(), rows))


def test_rounds():
    assert DMD2.objective(networks()).round == (
        "student", "heads", "fake", "fake",
        "student_2_steps", "heads_2_steps", "fake_2_steps", "fake_2_steps",
    )  # fmt: skip
    for settings in (DMD2, RCM):
        made = settings.objective(networks())
        assert tuple(made.updates[label].role for label in made.round) == settings.round


@pytest.mark.parametrize(
    ("settings", "label"),
    [(DMD2, "student"), (DMD2, "heads_2_steps"), (DMD2, "fake"), (RCM, "student_2_steps")],
    ids=lambda a: a if isinstance(a, str) else a.kind,
)
def test_an_update_changes_its_role_alone(settings, label):
    before = start(settings)
    after, report = update(settings, label)(before, batch())
    trained = label.split("_")[0]
    for role, old in before.roles.items():
        new = after.roles[role]
        if role == trained:
            assert tree_error(new.params, old.params) > 1e-7
        else:
            assert same_bits(new, old)
    assert all(np.isfinite(a) for a in jax.tree.leaves(report.scalars))


@pytest.mark.parametrize("label", ["student", "heads"])
def test_an_update_of_dmd2_does_not_depend_on_how_its_batch_is_cut(label):
    whole, _ = update(DMD2, label)(start(DMD2), batch())
    parts, _ = update(DMD2, label, 2)(start(DMD2), batch())
    moved = tree_error(whole.roles[label].params, start(DMD2).roles[label].params)
    assert tree_error(whole.roles[label].params, parts.roles[label].params) < 2e-3 * moved


def test_the_logistic_heads_learn_the_logarithm_of_the_ratio():
    """Data N(.3, 1.1^2) against N(-.2, .8^2): no gradient at ln r, in any of its coefficients.

    Fails when real and fake are swapped, and for the hinge loss.
    """
    with jax.enable_x64(True):
        x, w = np.polynomial.hermite_e.hermegauss(40)
        w = w / w.sum()
        real, fake = 0.3 + 1.1 * x, -0.2 + 0.8 * x
        log = lambda x, m, s: -0.5 * ((x - m) / s) ** 2 - jnp.log(s)

        def loss(c, kind="softplus"):
            D = lambda x: log(x, 0.3, 1.1) - log(x, -0.2, 0.8) + c[0] + c[1] * x + c[2] * x**2
            # One head of one logit a sample; the mean over nodes becomes one with their weights.
            each = lambda x, sign: jnp.stack(
                [
                    adversarial.discriminator_loss(
                        [sign * D(one)[None, None]], [jnp.full((1, 1), -50.0)],
                        reduction="paper", loss=kind,
                    )
                    for one in x
                ]
            )  # fmt: skip
            return (w * each(real, 1.0)).sum() + (w * each(fake, -1.0)).sum()

        slope = jax.grad(loss)(jnp.zeros(3))
        np.testing.assert_allclose(slope, 0, atol=1e-8)
        assert np.abs(jax.grad(functools.partial(loss, kind="hinge"))(jnp.zeros(3))).max() > 0.05


def test_the_logistic_generator_weighs_by_one_over_one_plus_r():
    logit = jnp.asarray([-1.5, 0.0, 2.0])
    loss = lambda d: adversarial.generator_loss([d[:, None]], reduction="code", loss="softplus")
    slope = jax.grad(lambda d: loss(d).sum())(logit)
    np.testing.assert_allclose(slope, -1 / (1 + np.exp(logit)), rtol=1e-5)
    with pytest.raises(ValueError, match="wasserstein"):
        adversarial.generator_loss([logit[:, None]], reduction="code", loss="wasserstein")


def test_a_divergence_weighs_samples_and_not_the_term(monkeypatch):
    """dmd_weight mean(h / mean(h) L), beside the adversarial loss."""
    settings = dataclasses.replace(DMD2, divergence="js", adv_weight=1e-9)
    each, h = jnp.arange(16.0), jnp.linspace(1, 4, 16)
    monkeypatch.setattr(dmd2.maths, "loss", lambda x, g: each)
    monkeypatch.setattr(dmd2.maths, "divergence_weight", lambda logit, kind: h)
    made = settings.objective(networks()).updates["student"]
    draws = made.draw(jax.random.key(0), jax.tree.map(jnp.asarray, batch()), frozen())
    state = start(settings)
    value, _ = made.loss(state.roles["student"].params, draws, state, frozen())
    assert float(value) == pytest.approx(0.5 * float((h * each).sum() / h.sum()), rel=1e-5)


@dataclasses.dataclass(frozen=True)
class Table:
    """A network whose F is one array of parameters, wherever it is asked."""

    guidance_embed: bool = False
    target_embed: bool = False

    def apply(self, params, x, t, **_):
        """Return the velocity in flow coordinates of F = params["F"]."""
        angle = trigflow.from_flow_time(t)
        v = trigflow.to_flow_velocity(params["F"], trigflow.from_flow_state(x, t), angle)
        return type("Out", (), {"velocity": v, "logvar": params["logvar"] * jnp.ones_like(t)})


def around():
    """Return networks, state, frozen arrays, draws and parameters of `Table`s."""
    shape = (16, 2, 2, 3)
    made = Networks(trained=Table(), teacher=Table(), width=1, dtype="float32")
    tables = [{"F": jnp.asarray(normals(*shape, seed=i)), "logvar": 0.3} for i in range(3)]
    student, fake, teacher = tables
    role = lambda params: Role(
        params=params, ema=None, opt=None, extra=None, updates=0, rejected=np.zeros(2, int)
    )
    state = State(step=jnp.int32(40), roles={"fake": role(fake), "student": role(student)})
    text = jnp.zeros((16, 1, 1))
    still = Frozen(null_text=text[:1], null_mask=text[:1, 0], teacher=teacher)
    shared = {
        "x0": jnp.asarray(normals(*shape, seed=7)),
        "cond": {"text": text, "mask": jnp.ones((16, 1))},
        "w": jnp.ones(16),
    }
    keys = jax.random.split(jax.random.key(5), 3)
    draws = shared | scm.draw_path(RCM, keys, shared["x0"])
    return made, state, still, draws | {"dmd": dmd.draw(RCM, keys[2], shared["x0"], 1)}, student


def slopes(**changes):
    """Return (d/dF of each sample [B, ...], aux) of rCM around tables."""
    made, state, still, draws, student = around()
    settings = dataclasses.replace(RCM, **changes)
    value = lambda F: rcm.value(settings, made, student | {"F": F}, draws, state, still)
    return jax.grad(value, has_aux=True)(student["F"])


def norms(slope):
    """Return the mean over samples of the norm of B d/dF of a mean."""
    return float((len(slope) * jnp.sqrt(jnp.square(slope).sum((1, 2, 3)))).mean())


def test_both_gradients_at_the_output_are_what_autodiff_finds():
    """Fails for a forgotten prior, 1 / D, sin or sigma_d."""
    consistency, _ = slopes(dmd_balance="fixed", dmd_start=1000)
    both, aux = slopes(dmd_balance="fixed", dmd_weight=1.0)
    assert norms(consistency) == pytest.approx(float(aux.scalars["scm_output_grad"]), rel=1e-4)
    matched = float(aux.scalars["dmd_output_grad"])
    assert norms(both - consistency) == pytest.approx(matched, rel=1e-3)


def test_the_balanced_weight_is_the_ratio_of_both_gradients():
    consistency, _ = slopes(dmd_start=1000)
    both, _ = slopes(dmd_weight=0.5)
    assert norms(both - consistency) == pytest.approx(0.5 * norms(consistency), rel=1e-3)


def test_matching_begins_at_its_step():
    """State 40: before 41 the student learns by consistency alone."""
    made, state, still, draws, student = around()
    alone = lambda F: scm.term(RCM, made, student | {"F": F}, draws, state, still)[0].mean()
    wanted = jax.grad(alone)(student["F"])
    found, _ = slopes(dmd_start=41)
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    begun, _ = slopes(dmd_start=40)
    assert np.abs(begun - wanted).max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (RCM, {}, "rcm compares samples of the whole batch"),
        (dataclasses.replace(DMD2, divergence="js", misaligned=False), {}, "dmd2 compares samples"),
    ],
    ids=["rcm", "dmd2"],
)
def test_losses_of_whole_batches_refuse_to_be_cut(settings, changes, message):
    """One line before anything is compiled."""
    tree = card()
    phase = tree.phases.sprint
    adamw = phase.optimizers.heads.to_dict()
    phase.optimizers = {name: adamw for name in sorted(set(settings.round))}
    phase.objective = dataclasses.asdict(settings)
    phase.update(steps=len(settings.round), batch=32, accumulate=2)
    tree.run.update(log_every=8 * 3, checkpoint_every=8 * 3, preview_every=8 * 3)
    with pytest.raises(UserError, match=message):
        config.parse(tree)


def test_hinge_heads_refuse_other_divergences():
    hinge = dataclasses.replace(DMD2, divergence="js", heads_loss="hinge", misaligned=False)
    problems = dict(hinge.problems())
    assert problems == {"heads_loss": "use softplus: hinge heads carry no ratio for js"}


def test_ratios_are_read_where_and_of_what_the_heads_learn():
    """Wrong captions among the fakes make the logit that of another ratio."""
    changed = dataclasses.replace(DMD2, divergence="js", disc_mean=0.3)
    assert set(dict(changed.problems())) == {"misaligned", "disc_mean"}
