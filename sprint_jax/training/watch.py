"""What the loop looks at between rounds: reports of updates, and requests to stop."""

import signal
from typing import Any

import jax
import numpy as np

from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.objectives.base import Report
from sprint_jax.runtime import ending
from sprint_jax.training import hosts
from sprint_jax.training.stage import Stage


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived and everything is saved. The message says how to resume."""


class Window:
    """Averages of statistics by time (`objectives.by_time`) over the rounds from one row to the
    next.
    """

    def __init__(self, state: list | None):
        """Begin anew, or with the state of a checkpoint between two rows."""
        self._rounds, self._sums = state or (0, {})

    def add(self, by_time: dict[str, Any]) -> None:
        """Add a round."""
        self._rounds += 1
        for name, values in by_time.items():
            sums = self._sums.get(name, [0.0] * len(values))
            self._sums[name] = [a + float(b) for a, b in zip(sums, values, strict=True)]

    def take(self) -> dict[str, float]:
        """Return {"by_time/NAME/BUCKET": average} and begin anew."""
        rounds, sums = self.state()
        self._rounds, self._sums = 0, {}
        return {
            f"by_time/{name}/{i}": s / rounds
            for name, row in sums.items()
            for i, s in enumerate(row)
        }

    def state(self) -> list:
        """Return plain values for `__init__`.

        A copy: checkpoints are written while training continues.
        """
        return [self._rounds, dict(self._sums)]


class Watch:
    """Reads reports one round late: writes rows, moves the bar, stops on lasting non-finite
    updates.
    """

    def __init__(self, stage: Stage, run: config_lib.Run, records, bar, window: Window):
        self._name, self._roles, self._run, self._records = stage.name, stage.roles, run, records
        self._bar, self._window = bar, window
        self._waiting: tuple[int, list[Report]] | None = None

    def launched(self, step: int, reports: list[Report]) -> None:
        """Take the reports of a round that was launched, after looking at those of the round
        before.
        """
        self.flush()
        self._waiting = (step, reports)

    def flush(self) -> None:
        """Look at the reports that are waiting."""
        if self._waiting is None:
            return
        step, reports = self._waiting
        self._waiting = None
        reports = jax.device_get(reports)
        scalars, norms, by_time = ({} for _ in range(3))
        for report in reports:
            scalars |= report.scalars
            norms |= report.norms
            by_time |= report.by_time
        self._window.add(by_time)
        # A role may be updated several times in a round: its last counters are the newest.
        latest = dict(zip(self._roles, (r.rejected for r in reports), strict=True)).values()
        self._refuse_lasting(step, max(int(r[0]) for r in latest), norms)
        self._bar.update(step - self._bar.n)
        if step % self._run.log_every == 0:
            if "loss" in scalars:
                self._bar.set_postfix(loss=f"{scalars['loss']:.4f}", refresh=False)
            rejected = {"rejected": sum(int(r[1]) for r in latest)}
            row = scalars | norms | self._window.take() | rejected
            self._records.write(self._name, step, row)

    def _refuse_lasting(self, step: int, in_a_row: int, norms: dict[str, Any]) -> None:
        if in_a_row < self._run.max_rejected:
            return
        bad = [k.split("/", 1)[1] for k, v in norms.items() if "/" in k and not np.isfinite(v)]
        raise UserError(
            f"{self._name}: {in_a_row} updates in a row were not finite, at step {step} in "
            f"{', '.join(sorted(bad)) or 'the loss'}; all were dropped. Lower the learning rate, "
            "or look at the data"
        )


class Stop:
    """Turns SIGTERM and SIGINT into a request while inside. One of several processes is enough.

    A second signal ends a process that `ending` has started, without saving.
    """

    def __enter__(self) -> "Stop":
        self._requested = False
        self._asked = None
        self._asking = ending.asking(
            "finishing this round and saving; a second signal ends at once, without saving"
        )
        self._asking.__enter__()
        self._old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, *_):
        self._requested = True

    def agreed(self) -> bool:
        """Return whether to stop after this round: the same answer on every process.

        With several processes it is what they had asked for a round ago, so that none waits for
        the answer. JAX's own agreement (`reached_preemption_sync_point`) names a step, which
        rounds of several steps and the stages' counts, each from 0, pass by.
        """
        if jax.process_count() == 1:
            return self._requested
        before, self._asked = self._asked, hosts.anywhere(self._requested)
        return before is not None and bool(before)

    def __exit__(self, *_) -> None:
        self._asking.__exit__(None, None, None)
        for number, handler in self._old.items():
            signal.signal(number, handler)
