"""Settings of the objectives that follow the teacher's trajectory, at a tiny size."""

import dataclasses

from sprint_jax.objectives.cmt import Cmt
from sprint_jax.objectives.eulerian import Eulerian
from sprint_jax.objectives.lagrangian import Lagrangian
from sprint_jax.objectives.semigroup import Semigroup
from sprint_jax.objectives.tbcm import Tbcm

GUIDED = dict(
    guidance=(1.25, 2.0), uncond_mask="cond", control_dropout=0.0, logvar_start=0.0,
    route_steps=4, route_order=2, route_shift=2.0,
)  # fmt: skip
TWO = GUIDED | dict(
    stored=0, distance_c=0.1, p_mean=0.2, p_std=1.2, states="data", velocity="teacher",
    diagonal=0.25, to_zero=0.5, from_noise=0.25,
)  # fmt: skip
CMT = Cmt(kind="cmt", stored=0, distance_c=0.1, pairs="all", **GUIDED)
TBCM = Tbcm(
    kind="tbcm", tangent_warmup=10, tangent_normalize=True, weighting="code",
    logvar_gradient="network", route_jitter=True, tangent_final=0.75, tangent_final_start=20,
    tangent_final_steps=10, **GUIDED,
)  # fmt: skip
EULERIAN = Eulerian(
    kind="eulerian", logvar_gradient="network", tangent_warmup=1, tangent_c=0.1, **TWO
)
LAGRANGIAN = Lagrangian(kind="lagrangian", delta=0.02, heun=True, **TWO)
SEMIGROUP = Semigroup(kind="semigroup", middle="uniform", **(TWO | dict(diagonal=0.5)))
ALL = (
    CMT,
    TBCM,
    EULERIAN,
    dataclasses.replace(EULERIAN, velocity="self"),
    dataclasses.replace(EULERIAN, velocity="data"),
    LAGRANGIAN,
    dataclasses.replace(LAGRANGIAN, states="rollout", diagonal=0.0, heun=False),
    dataclasses.replace(LAGRANGIAN, velocity="self"),
    SEMIGROUP,
    dataclasses.replace(SEMIGROUP, velocity="self", middle="half"),
)
