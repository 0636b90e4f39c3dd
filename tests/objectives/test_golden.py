"""One generator and one discriminator step at `smoke` size: recorded numbers next to identities.

If a change of the method moves the recorded numbers on purpose, the identities must still hold.
Then record the new numbers in the same commit as the change and explain them there.
"""

import jax
import numpy as np
import pytest

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.data import shapes_batches
from sprint_jax.objectives import ladd, step, views
from sprint_jax.objectives.base import Frozen
from sprint_jax.training import stages


@pytest.fixture(scope="module")
def both_metrics():
    """Return (metrics of a generator step, those of the discriminator step after it, config)."""
    c = config.parse(card())
    phase, encoder = c.phases["sprint"], build.text_encoder(c)
    networks = stages.networks(c, phase)
    objective = phase.objective.objective(networks)
    txs = stages.transformations(phase, objective)
    teacher = networks.teacher.init(jax.random.key(0))
    null_text, null_mask = encoder.encode([""])
    frozen = Frozen(null_text=null_text, null_mask=null_mask, teacher=teacher)
    student = views.student_params(
        teacher, networks.trained, jax.random.key(1), logvar_start=phase.objective.logvar_start
    )
    state = step.start(
        objective, txs, ema=phase.ema, frozen=frozen, begin=student, key=jax.random.key(3)
    )
    # The recorded numbers are of heads drawn by a key of their own.
    heads, spectral = ladd.heads_of(phase.objective, networks).init(jax.random.key(2))
    role = state.roles["heads"].replace(params=heads, extra=ladd.start_spectral(spectral))
    state = state.replace(roles=state.roles | {"heads": role})
    batch = lambda k: shapes_batches.make_batch(
        k,
        seed=0,
        batch=phase.batch,
        size=c.data.size,
        codec=build.codec(c),
        text_encoder=encoder,
    )
    reports = []
    for i, name in enumerate(objective.round):
        update = step.make_step(
            objective.updates[name],
            txs[name],
            ema=phase.ema if name == objective.main else 0.0,
            accumulate=1,
            seed=1,
        )
        state, report = jax.jit(update)(state, frozen, batch(i))
        reports.append(report.scalars | report.norms)
    assert int(state.step) == 2
    return *jax.device_get(reports), c


def test_identities(both_metrics):
    """With F - F- = 0 the sCM error is the mean square of the normalized tangent, below 1 / D.

    The log-variance head starts at zero, and the total is the weighted sum of both losses. Fails
    when the squared norm in scm.normalize_tangent becomes a mean, and when adv_weight is not
    applied.
    """
    generator, _discriminator, c = both_metrics
    elements = np.prod(build.latent_shape(c))
    assert 0.5 / elements < generator["error"] < 1 / elements
    assert generator["logvar"] == 0
    total = (
        c.phases["sprint"].objective.scm_weight * generator["scm"]
        + c.phases["sprint"].objective.adv_weight * generator["adv"]
    )
    np.testing.assert_allclose(generator["loss"], total, rtol=1e-5)
    norms = [v for k, v in generator.items() if k.startswith("grad_norm/")]
    np.testing.assert_allclose(np.sqrt(np.square(norms).sum()), generator["grad_norm"], rtol=1e-5)


def test_recorded_numbers(both_metrics):
    generator, discriminator, _ = both_metrics
    found = {k: float(generator[k]) for k in ("scm", "adv", "tangent_norm", "grad_norm")}
    found |= {k: float(discriminator[k]) for k in ("disc", "disc_grad_norm")}
    assert found == pytest.approx(GOLDEN, rel=2e-3), f"found {found!r}"


GOLDEN = {
    "scm": 0.0054457625,
    "adv": -0.18165711,
    "tangent_norm": 0.6746083,
    "grad_norm": 1.1190751,
    "disc": 1.0555941,
    "disc_grad_norm": 0.5119000,
}
