"""Settings of objectives at a tiny size."""

import dataclasses

from sprint_jax.objectives.cmt import Cmt
from sprint_jax.objectives.dmd import Dmd
from sprint_jax.objectives.eulerian import Eulerian
from sprint_jax.objectives.lagrangian import Lagrangian
from sprint_jax.objectives.policy import Policy
from sprint_jax.objectives.proxy_reward import ProxyReward
from sprint_jax.objectives.rcm import Rcm
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
MATCHING = dict(
    sample_steps=1, sampler_times=0.5, renoise_mean=-0.6, renoise_std=1.0, dmd_normalize=True,
    dmd_guidance="cleaner", critic_updates=1, critic_pull=0.9, dmd_weight=0.5,
)  # fmt: skip
ANCHORED = GUIDED | dict(
    stored=0, distance_c=0.1, from_noise=0.6, anchor_share=0.5, anchor_weight=0.5, anchor_trim=0.1,
)  # fmt: skip
JUDGED = ANCHORED | dict(reward="sprint_jax.toy.checker:reward", reward_weight=0.5)
SCM = {k: GUIDED[k] for k in ("guidance", "uncond_mask", "control_dropout", "logvar_start")} | dict(
    p_mean=-0.4, p_std=1.4, tangent_warmup=1, tangent_normalize=True, weighting="code",
    logvar_gradient="network",
)  # fmt: skip
DMD = Dmd(kind="dmd", **ANCHORED, **MATCHING)
RCM = Rcm(kind="rcm", dmd_balance="gradient", dmd_start=0, **SCM, **MATCHING)
POLICY = Policy(
    kind="policy", preference="pairs", group=4, beta=0.1, **JUDGED
)  # fmt: skip
PROXY = ProxyReward(
    kind="proxy_reward", disc_mean=-1.5, disc_std=0.5, reduction="code", misaligned=True,
    heads_loss="softplus", head_blocks=(0,), **JUDGED,
)  # fmt: skip
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
