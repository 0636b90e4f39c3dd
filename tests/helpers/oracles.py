"""Data whose probability flow is known in closed form, in float64.

`Gaussian`: N(m, s^2). A(t)^2 = (1 - t)^2 s^2 + t^2 in flow time; the flow keeps the place of a
point within its distribution, so X(x, t, r) = (1 - r) m + A(r) / A(t) (x - (1 - t) m).

`Guided`: two Gaussians of mean 0 and a guidance scale; the guided velocity is linear as well.

`Mixture`: Gaussians of one width. X = Q_r(CDF_t(x)), with the quantile by bisection and one Newton
step with a stopped density, which JAX differentiates exactly.

All have velocity(x, t) and X(x, t, r) in flow coordinates, elementwise, with t and r that broadcast
against x; `average` and `trig` turn them into what networks predict.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from sprint_jax.diffusion import trigflow
from sprint_jax.diffusion.flow import expand


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Data N(m, s^2)."""

    s: float = 0.35
    m: float = 0.8

    def std(self, t: Any) -> Any:
        """Return A(t)."""
        return jnp.sqrt((1 - t) ** 2 * self.s**2 + t**2)

    def velocity(self, x: Any, t: Any) -> Any:
        """Return -m + A'/A (x - (1 - t) m)."""
        slope = (t - (1 - t) * self.s**2) / self.std(t) ** 2
        return -self.m + slope * (x - (1 - t) * self.m)

    def X(self, x: Any, t: Any, r: Any) -> Any:
        """Return where the flow takes x from t to r."""
        return (1 - r) * self.m + self.std(r) / self.std(t) * (x - (1 - t) * self.m)


@dataclasses.dataclass(frozen=True)
class Guided:
    """Data N(0, s_c^2) with a condition, N(0, s_u^2) without, at guidance scale w."""

    s_c: float = 0.25
    s_u: float = 0.45
    w: float = 4.5

    def velocity(self, x: Any, t: Any) -> Any:
        """Return v_u + w (v_c - v_u)."""
        c, u = (Gaussian(s, 0.0).velocity(x, t) for s in (self.s_c, self.s_u))
        return u + self.w * (c - u)

    def X(self, x: Any, t: Any, r: Any) -> Any:
        """Return (A_c(r) / A_c(t))^w (A_u(r) / A_u(t))^(1 - w) x."""
        c, u = (Gaussian(s, 0.0) for s in (self.s_c, self.s_u))
        return (c.std(r) / c.std(t)) ** self.w * (u.std(r) / u.std(t)) ** (1 - self.w) * x


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Data .7 N(1, s^2) + .3 N(-.6, s^2)."""

    s: float = 0.3
    weights: tuple[float, ...] = (0.7, 0.3)
    centers: tuple[float, ...] = (1.0, -0.6)

    def _std(self, t: Any) -> Any:
        return jnp.sqrt((1 - t) ** 2 * self.s**2 + t**2)

    def _sum(self, function: Any, x: Any, t: Any) -> Any:
        parts = zip(self.weights, self.centers, strict=True)
        return sum(p * function((x - (1 - t) * c) / self._std(t)) for p, c in parts)

    def cdf(self, x: Any, t: Any) -> Any:
        """Return the cumulative distribution at time t."""
        return self._sum(norm.cdf, x, t)

    def pdf(self, x: Any, t: Any) -> Any:
        """Return the density at time t."""
        return self._sum(norm.pdf, x, t) / self._std(t)

    def velocity(self, x: Any, t: Any) -> Any:
        """Return E[z - x0 | x]."""
        variance, total = self._std(t) ** 2, 0.0
        for p, c in zip(self.weights, self.centers, strict=True):
            apart = x - (1 - t) * c
            here = p * norm.pdf(apart / self._std(t)) / self._std(t)
            total += here * ((t - (1 - t) * self.s**2) / variance * apart - c)
        return total / self.pdf(x, t)

    def X(self, x: Any, t: Any, r: Any) -> Any:
        """Return where the flow takes x from t to r."""
        q = self.cdf(x, t)

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            left = self.cdf(middle, r) < q
            return jnp.where(left, middle, low), jnp.where(left, high, middle)

        ends = jnp.full_like(q, -8.0), jnp.full_like(q, 8.0)
        y = jax.lax.stop_gradient(sum(jax.lax.fori_loop(0, 60, halve, ends)) / 2)
        return y - (self.cdf(y, r) - q) / jax.lax.stop_gradient(self.pdf(y, r))


ALL = (Gaussian(), Guided(), Mixture())


def average(data: Any, x: Any, t: Any, r: Any) -> Any:
    """Return the average velocity between t and r, (x - X) / (t - r)."""
    return (x - data.X(x, t, r)) / (t - r)


def trig_velocity(data: Any, u: Any, t: Any) -> Any:
    """Return F_T(u, t) of the data for angles t [B] and unit-scale states u [B, ...]."""
    t_fm = trigflow.to_flow_time(t)
    x = u * expand(trigflow.flow_norm(t_fm), u)
    return trigflow.from_flow_velocity(data.velocity(x, expand(t_fm, u)), x, t_fm)


def trig_map(data: Any, u: Any, t: Any, r: Any) -> Any:
    """Return F(u, t, r) whose jump is the exact flow map, for angles t > r."""
    t_fm, r_fm = trigflow.to_flow_time(t), trigflow.to_flow_time(r)
    x = u * expand(trigflow.flow_norm(t_fm), u)
    mean = average(data, x, expand(t_fm, u), expand(r_fm, u))
    return trigflow.from_flow_velocity(mean, x, t_fm)
