"""Samplers on data whose ODE has a closed-form solution: a single point and a Gaussian."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import max_error, normals
from sprint_jax.diffusion import samplers, trigflow
from sprint_jax.errors import UserError
from sprint_jax.sampling import programs

pytestmark = [pytest.mark.second_pass, pytest.mark.usefixtures("no_rank_promotion")]

SIGMA_D = 0.5
S = 0.2
SHAPE = (3, 4, 2, 5)


def to_column(t):
    """Return times [B] as [B, 1, 1, 1]."""
    return jnp.reshape(t, (-1, 1, 1, 1))


def std_at(t):
    """Return the standard deviation of x_t for data N(0, S^2)."""
    return jnp.sqrt(jnp.cos(t) ** 2 * S**2 + jnp.sin(t) ** 2 * SIGMA_D**2)


def gaussian_F(u, t):
    """Return the velocity of the PF-ODE over sigma_d; the solution scales with `std_at`."""
    t = to_column(t)
    return jnp.sin(t) * jnp.cos(t) * (SIGMA_D**2 - S**2) / std_at(t) ** 2 * u


def gaussian_v(x, t):
    """Return the same velocity in flow time at unit scale.

    The variance is b^2 = (1 - t)^2 (S / sigma_d)^2 + t^2, and v = b'/b x.
    """
    t, unit = to_column(t), S / SIGMA_D
    return (t - (1 - t) * unit**2) / ((1 - t) ** 2 * unit**2 + t**2) * x


def consistency_F(u, t):
    """Return the output of a network whose single step ends where the ODE does, at S x / std_at."""
    t = to_column(t)
    return u * (jnp.cos(t) - S / std_at(t)) / jnp.sin(t)


def point_F(target):
    """Return the network with the exact velocity for data that is one point.

    The state determines the noise.
    """

    def F(u, t):
        t = to_column(t)
        z = (u - jnp.cos(t) * target) / jnp.sin(t)
        return jnp.cos(t) * z - jnp.sin(t) * target

    return F


def odd_F(u, t):
    """Return a nonlinear velocity that belongs to no data."""
    return jnp.sin(2 * u + to_column(t)) + 0.3 * u * to_column(t)


def sample(F, times, seed=0):
    """Return (latents, start, step noise) of the few-step sampler."""
    noise, steps = normals(*SHAPE, seed=seed), normals(len(times) - 2, *SHAPE, seed=seed + 1)
    return jax.jit(lambda: samplers.scm(F, noise, steps, times))(), noise, steps


SCHEDULES = [
    ("code", 1),
    ("code", 2),
    ("code", 3),
    ("code", 4),
    ("paper", 1),
    ("paper", 2),
    ("paper", 4),
]


@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES)
def test_few_steps_land_on_a_point(schedule, steps):
    """Fails when trigflow.denoise adds the sine term and when scm does not divide the state by
    sigma_d.
    """
    target = normals(*SHAPE, seed=7)
    latents, _, _ = sample(point_F(target), samplers.scm_times(steps, schedule))
    assert max_error(latents, target) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_steps_follow_their_recursion(steps):
    """For Gaussian data each step scales by S / std_at.

    Fails when scm adds noise without its sigma_d.
    """
    times = samplers.scm_times(steps)
    latents, noise, step_noise = sample(consistency_F, times)
    x = 0.5 * noise.astype(np.float64)
    for i in range(steps):
        s, t = np.float64(times[i]), np.float64(times[i + 1])
        clean = S * x / np.sqrt(np.cos(s) ** 2 * 0.04 + np.sin(s) ** 2 * 0.25)
        if i < steps - 1:
            x = np.cos(t) * clean + np.sin(t) * 0.5 * step_noise[i]
    assert max_error(latents, clean / 0.5) < 1e-5
    if steps == 1:
        assert max_error(latents, 0.4 * noise) < 1e-5


def test_few_steps_of_any_network():
    """Three steps are written out.

    Fails when scm swaps sine and cosine between steps or takes times[1:].
    """
    times = samplers.scm_times(3)
    latents, noise, step_noise = sample(odd_F, times)
    x = 0.5 * noise.astype(np.float64)
    for i, (s, t) in enumerate(zip(times[:-1].astype(float), times[1:].astype(float))):
        F = np.sin(2 * x / 0.5 + s) + 0.3 * x / 0.5 * s
        clean = np.cos(s) * x - np.sin(s) * 0.5 * F
        x = np.cos(t) * clean + np.sin(t) * 0.5 * (step_noise[i] if i < 2 else 0)
    assert max_error(latents, x / 0.5) < 1e-5


def test_step_noise_is_counted():
    """Fails when scm stops comparing the two lengths."""
    noise = normals(*SHAPE)
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"{count} step noises for 2 steps"):
            samplers.scm(odd_F, noise, normals(count, *SHAPE), samplers.scm_times(2))


def test_published_schedules():
    """Compare with the released sampler and the paper's Table 7.

    Fails when PUBLISHED_T_MAX is pi / 2 or 1.3 is 1.0.
    """
    expected = {
        ("code", 1): [1.57080, 0],
        ("code", 2): [1.57080, 1.3, 0],
        ("code", 4): [1.57080, 1.1781, 0.7854, 0.3927, 0],
        ("paper", 1): [math.pi / 2, 0],
        ("paper", 2): [math.atan(200 / 0.5), 1.3, 0],
        ("paper", 4): [math.atan(200 / 0.5), 1.3, 1.1, 0.6, 0],
        ("even", 1): [math.pi / 2, 0],
        ("even", 2): [math.pi / 2, math.pi / 4, 0],
        ("even", 4): [math.pi / 2, math.atan(3), math.pi / 4, math.atan(1 / 3), 0],
    }
    for (schedule, steps), numbers in expected.items():
        np.testing.assert_array_equal(samplers.scm_times(steps, schedule), np.float32(numbers))
    assert abs(samplers.scm_times(2, "paper")[0] - 1.56830) < 5e-6


def test_every_schedule_falls_to_zero():
    """Fails when a linspace loses its + 1."""
    lists = [(steps, samplers.scm_times(steps, name)) for name, steps in SCHEDULES]
    lists += [(steps, samplers.trig_times(steps)) for steps in (1, 2, 7)]
    lists += [
        (steps, samplers.flow_times(steps, shift)) for steps in (1, 2, 7) for shift in (1.0, 3.0)
    ]
    for steps, times in lists:
        assert len(times) == steps + 1
        assert times[-1] == 0
        assert (np.diff(times) < 0).all()


def test_impossible_schedules_are_refused():
    """Fails when steps < 1 becomes steps < 0."""
    with pytest.raises(UserError, match="steps 0: use 1 or more"):
        samplers.scm_times(0)
    with pytest.raises(UserError, match="no list for 3 steps"):
        samplers.scm_times(3, "paper")
    with pytest.raises(UserError, match="schedule 'karras'"):
        samplers.scm_times(2, "karras")


def test_evenly_spaced_times():
    """Fails when flow_times shifts towards the data (shift instead of 1 / shift)."""
    np.testing.assert_allclose(samplers.trig_times(2), [math.pi / 2, math.pi / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(samplers.flow_times(4), [1, 0.75, 0.5, 0.25, 0], rtol=1e-6)
    np.testing.assert_allclose(samplers.flow_times(4, 3.0), [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)


ODE = {
    "trigflow_euler": lambda noise, n: samplers.trigflow_euler(
        gaussian_F, noise, samplers.trig_times(n)
    ),
    "flow_euler": lambda noise, n: samplers.flow_euler(gaussian_v, noise, samplers.flow_times(n)),
}


@pytest.mark.parametrize("name", ODE)
def test_euler_is_first_order(name):
    """The ODE ends at (S / sigma_d) noise and the error halves with the step.

    Fails when the minus of trigflow_euler becomes plus or its sine gets a factor 0.9, and when
    flow_euler takes (s - t).
    """
    noise = normals(*SHAPE)
    run = jax.jit(ODE[name], static_argnums=1)
    errors = [max_error(run(noise, n), S / SIGMA_D * noise) for n in (32, 64, 128)]
    assert errors[2] < 0.03
    for coarse, fine in itertools.pairwise(errors):
        assert 1.85 < coarse / fine < 2.15


def test_trigflow_step_is_exact_for_a_single_point():
    """For data that is one point the ODE is a rotation, so one step of any length is exact.

    Fails when the cosine takes s + t.
    """
    target, noise = normals(*SHAPE, seed=7), normals(*SHAPE)
    times = np.float32([math.pi / 2, 0.8, 0.3])
    latents = samplers.trigflow_euler(point_F(target), noise, times)
    assert max_error(latents, math.cos(0.3) * target + math.sin(0.3) * noise) < 1e-5


def test_both_euler_samplers_agree_on_one_network():
    """A flow network and its TrigFlow form have one ODE. Fails when Eq. (6) loses its sine."""
    noise = normals(*SHAPE)
    v = lambda x, t: jnp.tanh(x) * (1 - 2 * to_column(t)) + 0.5 * jnp.roll(x, 1, 2)
    one = jax.jit(lambda: samplers.flow_euler(v, noise, samplers.flow_times(2000)))()
    F = trigflow.from_flow(v)
    other = jax.jit(lambda: samplers.trigflow_euler(F, noise, samplers.trig_times(2000)))()
    assert max_error(other, one) < 5e-3
    assert max_error(noise, one) > 0.1  # the ODE is not constant


def test_noise_differs_between_seeds_images_and_steps():
    """Fails when a key is a sum, so that seed 1 image 0 is seed 0 image 1, and when the next step
    repeats a draw.
    """
    draw = jax.jit(lambda seed: programs.noises(seed, jnp.arange(4), (16, 16, 64), 3))
    drawn = np.concatenate(
        [np.asarray(draw(seed), np.float64).reshape(12, -1) for seed in range(4)]
    )
    assert np.abs(drawn.mean(1)).max() < 0.05 and np.abs(drawn.var(1) - 1).max() < 0.05
    assert np.abs(np.corrcoef(drawn) - np.eye(48)).max() < 0.1
