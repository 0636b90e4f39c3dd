"""Records of a run: metrics.jsonl, TensorBoard events and the progress bar."""

import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

from sprint_jax.storage import json_lines, run_files


class Records:
    """Writer of metrics.jsonl, one JSON object a line, and of the same scalars as TensorBoard
    events.

    Writes nothing where workdir is None.

    A row holds "stage", "step" and scalars. After a resume the file reads as if nothing had
    happened: `rewind` drops the rows that will be written again.
    """

    def __init__(self, workdir: pathlib.Path | str | None):
        self._writer = None
        if workdir is None:
            return
        self._path = pathlib.Path(workdir) / run_files.METRICS
        self._writer = _metric_writer(pathlib.Path(workdir) / "events")

    def rewind(self, stage: str, step: int) -> None:
        """Drop rows of `stage` after `step`, and a line that was cut off or damaged."""
        if self._writer is None or not self._path.exists():
            return
        rows = json_lines.rows(self._path, ("stage", "step"))
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        json_lines.write(self._path, kept)

    def write(self, stage: str, step: int, scalars: Mapping[str, Any]) -> None:
        """Append a row."""
        if self._writer is None:
            return
        row = {"stage": stage, "step": step, **{k: float(v) for k, v in sorted(scalars.items())}}
        json_lines.append(self._path, row)
        # Sums by time mean nothing without their shares: `reporting` divides them, TensorBoard
        # cannot.
        shown = {
            f"{stage}/{k}": float(v) for k, v in scalars.items() if not k.startswith("by_time/")
        }
        self._writer.write_scalars(step, shown)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write {name: uint8 [H, W, 3]} to TensorBoard."""
        if self._writer is None:
            return
        self._writer.write_images(step, {k: np.asarray(v)[None] for k, v in images.items()})

    def close(self) -> None:
        """Flush and close the TensorBoard events."""
        if self._writer is not None:
            self._writer.flush()
            self._writer.close()


def progress(stage: str, start: int, stop: int, shown: bool = True) -> tqdm.tqdm:
    """Return a progress bar over the steps of a stage: rate, time left, and `set_postfix`'s
    fields.
    """
    return tqdm.tqdm(
        total=stop,
        initial=start,
        desc=stage,
        unit="step",
        disable=not shown,
        dynamic_ncols=True,
        file=sys.stderr,
        mininterval=1.0 if sys.stderr.isatty() else 20.0,
        smoothing=0.05,
    )


def _metric_writer(logdir):
    """Return clu's default writer without TensorFlow: tensorboardX stands where clu looks for its
    TF writer.
    """
    _install_summary_writer()
    from clu.metric_writers import AsyncMultiWriter
    from clu.metric_writers.summary_writer import SummaryWriter

    return AsyncMultiWriter([SummaryWriter(str(logdir))])


def _install_summary_writer():
    """Put an equal module in the place of the one in which clu imports TensorFlow.

    No effect where it is done.
    """
    name = "clu.metric_writers.summary_writer"
    if name not in sys.modules:
        module = types.ModuleType(name)
        # By its name, because pyright knows no such attribute.
        setattr(module, "SummaryWriter", _SummaryWriter)  # noqa: B010
        sys.modules[name] = module


class _SummaryWriter:
    """The part of clu's SummaryWriter interface that this project uses, on tensorboardX."""

    def __init__(self, logdir: str):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(logdir)

    def write_summaries(self, step: int, values: Any, metadata: Any = None) -> None:
        raise NotImplementedError("raw summaries need TensorFlow")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        for name, batch in images.items():
            for i, image in enumerate(np.asarray(batch)):
                self._writer.add_image(f"{name}/{i}", image, step, dataformats="HWC")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, value in texts.items():
            self._writer.add_text(name, value, step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self.write_texts(0, {"hparams": "\n".join(f"    {k}: {v}" for k, v in hparams.items())})

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
