"""The distance to the teacher's ODE: its solver against a closed form."""

import jax.numpy as jnp
import numpy as np

from benchmarks import ode_distance


def test_heun_solves_a_linear_ode_to_second_order():
    """dx/dt = x cos(t) from t = 1.2 ends at x exp(-sin 1.2).

    Fails when the second slope is at the wrong time.
    """
    x = np.float32([[1.0, -2.0], [0.5, 3.0]])
    velocity = lambda x, t: x * jnp.cos(t)[:, None]
    errors = []
    for steps in (8, 16):
        end = ode_distance.heun(velocity, jnp.asarray(x), 1.2, steps=steps)
        errors.append(np.abs(end - x * np.exp(-np.sin(1.2))).max())
    assert errors[0] < 1e-2 and 3.4 < errors[0] / errors[1] < 4.6
