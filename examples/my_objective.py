"""A distillation method from outside the package, and the card that trains with it: velocity
regression.

    python -m sprint_jax.main --config=examples/my_objective.py --workdir=runs/mine

The student regresses the velocity of the guided teacher at its own times, which distills the
guidance: loss = mean |F_student - F_teacher|^2. The card is the smoke run with this method in its
last phase.
"""

import dataclasses

import jax.numpy as jnp

from sprint_jax.cards import sprint
from sprint_jax.diffusion import trigflow
from sprint_jax.objectives import guided, scm, views
from sprint_jax.objectives.base import Aux, Needs, Objective, Start, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class VelocityRegression(guided.Timed):
    """Settings of velocity regression: those that every distillation of a guided teacher has."""

    kind: str
    """Names this objective."""
    round = ("student",)

    def needs(self):
        """Return what the method asks of a run: a teacher."""
        return Needs(teacher=True)

    def objective(self, networks):
        """Build the objective."""

        def loss(params, draws, state, frozen):
            cond, w, t = draws["cond"], draws["w"], draws["t"]
            xt = trigflow.interpolate(draws["x0"], draws["z"], t)
            F, _ = views.student_F(networks.trained, params, cond, w)(xt / trigflow.SIGMA_D, t)
            velocity = views.teacher_velocity(networks, frozen, cond, w, self.uncond_mask)(xt, t)
            return jnp.square(F - velocity / trigflow.SIGMA_D).mean(), Aux()

        draw = lambda key, batch, frozen: scm.draw(self, key, batch)
        begin = lambda *given: {"student": Start(guided.begin_student(self, networks, *given))}
        update = Update(role="student", draw=draw, loss=loss)
        updates = {"student": update}
        return Objective(
            main="student", round=self.round, updates=updates, start=begin, sampler="renoise"
        )


def get_config():
    """Return the smoke card with velocity regression in place of sCM + LADD."""
    config = sprint.get_config("smoke")
    phase = config.phases.sprint
    fields = [f.name for f in dataclasses.fields(guided.Timed)]
    phase.objective = {name: phase.objective[name] for name in fields}
    phase.objective.kind = "examples.my_objective:VelocityRegression"
    phase.optimizers = dict(student=phase.optimizers.student)
    return config
