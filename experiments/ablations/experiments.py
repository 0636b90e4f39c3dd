"""Runs of the grid with the project's own stages: one configuration and seed in, numbers out.

What a seed and the cheap settings (times, probabilities) change are arguments of the compiled
programs instead of constants in them, so that runs of one structure share one compilation: a suite
compiles a dozen programs, not sixty.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.ablations import grid
from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.diffusion import samplers, trigflow
from sprint_jax.errors import UserError
from sprint_jax.evaluation.heldout import Evaluator
from sprint_jax.objectives import step
from sprint_jax.reporting import rows as metric_rows
from sprint_jax.sampling import programs
from sprint_jax.storage import run_files, weights
from sprint_jax.training import datasets, loop, scores, sharding, stages, workdirs
from sprint_jax.training.records import Records
from sprint_jax.training.stage import Stage

# Fields of the sprint phase's objective that enter the steps as numbers alone.
KNOBS = ("p_mean", "p_std", "max_time", "disc_mean", "disc_std")


def with_changes(tree, changes: dict):
    """Return a copy of a card (ConfigDict) with dotted keys replaced.

    Raises UserError for a key that it lacks.
    """
    tree = tree.copy_and_resolve_references()
    for name, value in changes.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.get(part, {})
        if last not in node:
            raise UserError(f"unknown config key {name}: see sprint_jax/config.py")
        node[last] = value
    return tree


def configuration(card, scale: grid.Scale, r: grid.Run, seed: int) -> config_lib.Config:
    """Return the config of a run. A seed names parameters, training noise and the order of the
    data.
    """
    tree = with_changes(card, grid.changes(scale, r))
    tree.seed, tree.data.seed = tree.seed + seed, tree.data.seed + seed
    return config_lib.parse(tree)


@dataclasses.dataclass(frozen=True)
class Untransferred:
    """A flow network whose answers are taken for those of a TrigFlow network: Eq. 6 to 8 are left
    out.

    The steps turn u and t into flow's terms and the velocity back; this undoes both, so that F(u,
    t) is the network at u and t themselves (paper section 4, "Schedule Transfer"; Fig. 3d,
    without).
    """

    model: Any

    @property
    def guidance_embed(self):
        return self.model.guidance_embed

    def init(self, key):
        return self.model.init(key)

    def apply(self, params, x, t, text, mask, guidance=None, *, features=(), velocity=True):
        angle = trigflow.from_flow_time(t)
        u = trigflow.from_flow_state(x, t)
        out = self.model.apply(
            params, u, angle, text, mask, guidance, features=features, velocity=velocity
        )
        if out.velocity is None:
            return out
        return out.replace(velocity=trigflow.to_flow_velocity(out.velocity, u, angle))


class Experiments:
    """Everything that runs share: the teacher, the held-out examples, the compiled programs.

    card: the scale's card, an `ml_collections.ConfigDict`. workdir: of the suite; a teacher that
    has to be trained is kept there. say: called with a line of progress.
    """

    def __init__(self, card, scale: grid.Scale, workdir, say):
        self._card, self._scale, self._workdir, self._say = card, scale, pathlib.Path(workdir), say
        self._base = config_lib.parse(with_changes(card, scale.base))
        self._mesh = sharding.mesh(self._base.mesh.data, self._base.mesh.fsdp)
        self._programs, self._samplers = {}, {}

    def __call__(self, r: grid.Run, seed: int, folder, advance) -> dict:
        """Return {metric: number} of one run.

        folder: its work directory. advance: called with the share of it that is done.
        """
        c = configuration(self._card, self._scale, r, seed)
        workdirs.write_config(c, folder)
        if r.kind == "gradients":
            return self._gradients(c, folder, advance)
        if r.kind.startswith("sample_"):
            return self._sample(c, r.kind.removeprefix("sample_"), seed)
        return self._distil(c, folder, seed, advance, transfer=r.kind == "distil")

    @functools.cached_property
    def data(self):
        return datasets.open_dataset(self._base, self._say)

    @functools.cached_property
    def teacher(self):
        """The teacher's parameters: the card's, or trained once for the whole suite and kept in its
        work directory.
        """
        c = self._base
        if c.teacher.pretrained:
            return build.teacher_weights(c.teacher.pretrained, build.teacher(c))
        finished = self._workdir / run_files.TEACHER
        if not finished.exists():
            self._say("teacher: trained here, once for all runs")
            folder = self._workdir / "runs" / "the_teacher"
            folder.mkdir(parents=True, exist_ok=True)
            weights.save(
                finished, self._train_teacher(c, self.data, folder, lambda share: None, bar=True)
            )
        return weights.load(finished, weights.abstract(build.teacher(c)))

    @functools.cached_property
    def _heldout(self):
        e = self._base.evaluation
        heldout = self.data.heldout(e.prompts, e.reference)
        return heldout, Evaluator(heldout)

    # Runs

    def _distil(self, c, folder, seed, advance, *, transfer):
        data = datasets.open_dataset(c, self._say)
        stage, compiled = self._stage("sprint", c, data, teacher=self.teacher, transfer=transfer)
        final = self._train(stage, c, folder, compiled, advance)
        params = jax.device_get(stage.result(final))
        weights.save(pathlib.Path(folder) / run_files.STUDENT, params)
        metrics = {"rejected": float(sum(role.rejected[1] for role in final.roles.values()))}
        model = build.student(c) if transfer else Untransferred(build.student(c))
        for steps in scores.STUDENT_STEPS:
            times = samplers.scm_times(steps, c.evaluation.schedule)
            make = lambda: programs.student_sampler(
                model, self.data.pixels, build.latent_shape(c), times
            )
            guidance = c.evaluation.student_guidance
            key = ("student", model, steps)
            metrics |= self._score(key, make, params, guidance, seed, str(steps))
        return metrics

    def _sample(self, c, sampler, seed):
        steps, model = c.evaluation.teacher_steps, build.teacher(c)
        times = samplers.flow_times(steps) if sampler == "flow" else samplers.trig_times(steps)
        make = lambda: programs.teacher_sampler(
            model, self.data.pixels, build.latent_shape(c), times, sampler=sampler
        )
        return self._score(
            (sampler, model, steps), make, self.teacher, c.evaluation.teacher_guidance, seed, ""
        )

    def _gradients(self, c, folder, advance):
        """Train a teacher of this kind, then the student by generator updates alone.

        The norms of Fig. 3 are read off these updates.
        """
        data = datasets.open_dataset(c, self._say)
        teacher = self._train_teacher(c, data, folder, lambda share: advance(share / 2))
        stage, compiled = self._stage("sprint", c, data, teacher=teacher)
        alone = dataclasses.replace(
            stage,
            name="gradients",
            functions=stage.functions[:1],
            labels=stage.labels[:1],
            roles=stage.roles[:1],
        )
        # Programs of the generator alone: not those of whole rounds.
        compiled = self._programs.setdefault(("gradients", _structure(c)), {})
        self._train(alone, c, folder, compiled, lambda share: advance((1 + share) / 2))
        rows = metric_rows.read(folder)
        metrics = {
            name: geometric_mean([row[name] for row in rows["gradients"]])
            for name in ("grad_norm", "tangent_norm")
        }
        return metrics | {
            "rejected": rows["gradients"][-1]["rejected"],
            "teacher_loss": rows["teacher"][-1]["loss"],
        }

    def _train_teacher(self, c, data, folder, advance, bar=False):
        stage, compiled = self._stage("teacher", c, data)
        final = self._train(stage, c, folder, compiled, advance, bar)
        return jax.device_get(stage.result(final))

    def _stage(self, name, c, data, *, teacher=None, transfer=True):
        """Return (stage, {shapes: compiled steps}) of a phase; programs are shared by all runs of
        one structure.
        """
        key = (name, transfer, _structure(c))
        if key not in self._programs:
            self._programs[key] = (_stage(c, name, self.data, transfer), {})
        shared, compiled = self._programs[key]
        frozen = data.frozen.replace(teacher=teacher, numbers=_knobs(c, name))
        stage = dataclasses.replace(
            shared,
            steps=c.phases[name].steps,
            frozen=frozen,
            batches=data.batches,
            data=data.identity,
        )
        return stage, compiled

    def _train(self, stage, c, folder, compiled, advance, bar=False):
        records = _Watched(folder, stage.steps, advance)
        try:
            final = loop.train(
                stage,
                c.run,
                self._mesh,
                folder,
                records,
                lambda message: None,
                compiled=compiled,
                bar=bar,
            )
        finally:
            records.close()
        return final

    def _score(self, key, make, params, guidance, seed, suffix):
        """Score images of the held-out prompts. The noise is the seed's own."""
        heldout, evaluator = self._heldout
        if key not in self._samplers:
            self._samplers[key] = make()
        images = programs.run(
            self._samplers[key],
            {"transformer": params, "pixels": self.data.pixels_params},
            programs.null_of(self.data.frozen),
            heldout.cond,
            guidance=guidance,
            seed=self._base.data.eval_seed + seed,
            batch=self._base.evaluation.batch,
        )
        found = evaluator(images)
        return {name + suffix: found[name] for name in ("score", "frechet") if name in found}


class _Watched(Records):
    """Records that also tell how much of a stage is done."""

    def __init__(self, folder, steps, advance):
        super().__init__(folder)
        self._steps, self._advance = steps, advance

    def write(self, stage, step, scalars):
        super().write(stage, step, scalars)
        self._advance(step / self._steps)


def with_numbers(settings: Any, numbers: dict[str, Any]) -> Any:
    """Return an objective's settings with some numbers in place of their own."""
    return dataclasses.replace(settings, **numbers)


def _structure(c: config_lib.Config) -> str:
    """Name what a compiled program depends on: the config without what is an argument of it."""
    sprint = c.phases["sprint"]
    objective = with_numbers(sprint.objective, dict.fromkeys(KNOBS, 0.0))
    c = stages.with_phase(c, "sprint", objective=objective)
    return repr(dataclasses.replace(c, seed=0, data=dataclasses.replace(c.data, seed=0)))


def _knobs(c: config_lib.Config, name: str) -> dict[str, Any]:
    """Return the numbers that the programs read as arguments; the seed is that of the run's
    student in both phases.
    """
    objective = c.phases["sprint"].objective
    seed = c.seed + c.phases["sprint"].seed
    return {"seed": np.int32(seed)} | {k: np.float32(getattr(objective, k)) for k in KNOBS}


def _stage(c: config_lib.Config, name: str, data, transfer: bool) -> Stage:
    """Return the stage of a phase whose seed and knobs are read from `Frozen.numbers`."""
    phase = c.phases[name]
    networks = stages.networks(c, phase)
    if not transfer:
        networks = dataclasses.replace(
            networks,
            teacher=Untransferred(networks.teacher),
            trained=Untransferred(networks.trained),
        )
    txs = stages.transformations(phase, phase.objective.objective(networks))

    def objective(numbers):
        settings = phase.objective
        if name == "sprint":
            settings = with_numbers(settings, {k: numbers[k] for k in KNOBS})
        return settings.objective(networks)

    def start(frozen, begin):
        key = jax.random.key(frozen.numbers["seed"])
        made = objective(frozen.numbers)
        return step.start(made, txs, ema=phase.ema, frozen=frozen, begin=begin, key=key)

    def taking(role):
        def one(state, frozen, batch):
            made = objective(frozen.numbers)
            return step.make_step(
                made.updates[role],
                txs[role],
                ema=phase.ema if role == made.main else 0.0,
                accumulate=phase.accumulate,
                seed=frozen.numbers["seed"],
            )(state, frozen, batch)

        return one

    plain = stages.make(c, name, data)
    steps = {role: taking(role) for role in plain.labels}
    functions = tuple(steps[role] for role in plain.labels)
    return dataclasses.replace(plain, start=start, functions=functions, preview=None)


def geometric_mean(values):
    """Return exp of the mean logarithm of the finite values, infinity without any.

    Updates that are not finite are dropped and counted, as "rejected".
    """
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    return float(np.exp(np.log(finite).mean())) if finite.size else math.inf
