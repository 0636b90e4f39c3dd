"""Shapes in signatures are checked while tests run."""

import jax.numpy as jnp
import jaxtyping
import pytest

from sprint_jax.diffusion import flow


def test_a_wrong_shape_is_refused():
    """Two times for three samples.

    Fails when conftest does not install the hook before the room is imported.
    """
    x = jnp.zeros((3, 2))
    assert flow.interpolate(x, x, jnp.zeros(3)).shape == (3, 2)
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 't'"):
        flow.interpolate(x, x, jnp.zeros(2))
