"""Training batches of an encoded data set: their order, and reading them ahead of use.

The order is a pure function of the data set and of (seed, step, global batch). It is the same for
any number of processes and workers, and a run resumes from its step number alone. Grain shuffles,
and reads ahead in threads or processes.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from sprint_jax.data.encoded import KINDS, BadRecord, Encoded, Manifest, Record
from sprint_jax.data.protocols import Batch
from sprint_jax.errors import UserError

_TRIES = 100  # consecutive unreadable records after which the data set counts as damaged
_TOLERATED = 3  # unreadable records that never stop a run, even if few were read
_AHEAD = 4  # batches in work and batches waiting, in each process that reads


class Plan:
    """The examples of the global batch of every step.

    A batch holds examples of one bucket. In each epoch the examples of every bucket are shuffled
    and cut into whole batches, and the rest is dropped until the next epoch. The batches of all
    buckets are then shuffled together.

    steps_per_epoch: number of batches in an epoch.
    """

    def __init__(self, bucket_of: np.ndarray, *, seed: int, batch: int):
        """Plan all epochs.

        bucket_of: int [N], the bucket of each example. seed: 0 or more. batch: examples in a global
        batch.

        Raises UserError if no bucket fills a batch.
        """
        import grain  # takes a second, and only training needs it

        self._bucket_of = bucket_of
        # A stable sort keeps the members in rising order. For small integers it is a linear radix
        # sort.
        order, counts = np.argsort(bucket_of, kind="stable"), np.bincount(bucket_of)
        self._members: list[Any] = np.split(order, np.cumsum(counts)[:-1])
        if counts.max(initial=0) < batch:
            raise UserError(
                f"no latent size has a whole global batch: batch {batch}, and at most "
                f"{counts.max(initial=0)} of the {len(bucket_of)} examples share one size: use a "
                "smaller batch or encode more"
            )
        # Grain adds the epoch to a seed. Seeds that are far apart keep buckets from sharing orders.
        draw = lambda which: int(np.random.SeedSequence([seed, which]).generate_state(1)[0])
        batches = [
            grain.MapDataset.source(members)
            .shuffle(seed=draw(bucket))
            .batch(batch, drop_remainder=True)
            for bucket, members in enumerate(self._members)
        ]
        epoch = grain.MapDataset.concatenate(batches).shuffle(seed=draw(len(self._members)))
        self.steps_per_epoch = len(epoch)
        self._steps = epoch.repeat()

    def indices(self, step: int) -> np.ndarray:
        """Return the examples, int64 [batch], of a step. Steps count from 0 without end."""
        return np.asarray(self._steps[step])

    def replacement(self, index: int) -> int:
        """Return the next example of the same bucket, which replaces an unreadable one.

        The last example of a bucket is followed by the first.
        """
        members = self._members[self._bucket_of[index]]
        return members[(np.searchsorted(members, index) + 1) % len(members)]


@dataclasses.dataclass(eq=False)
class BatchReader:
    """A function from a step to one process's rows of its global batch.

    It pickles small, because worker processes plan for themselves.

    Raises UserError, when created, if the batch does not divide by the number of processes or no
    bucket fills a batch.
    """

    encoded: Encoded
    _: dataclasses.KW_ONLY
    seed: int
    batch: int  # examples in the global batch
    process_index: int = 0
    process_count: int = 1
    control: bool = True  # whether to return a condition that the data set holds

    def __post_init__(self):
        if self.batch < 1 or self.batch % self.process_count:
            raise UserError(
                f"a global batch of {self.batch} does not divide by {self.process_count} "
                "processes: use a multiple"
            )
        self.plan = Plan(self.encoded.bucket_of, seed=self.seed, batch=self.batch)

    def __reduce__(self):
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return functools.partial(BatchReader, **fields), ()

    def __call__(self, step: int) -> tuple[Batch, list[tuple[int, str]]]:
        """Read the rows of a step now.

        Returns the arrays of `stack`, b = batch / process_count, without "control" unless
        `control`; and [(index, reason)] of records that could not be read and were replaced.
        Raises UserError if 100 records in a row cannot be read.
        """
        rows = self.batch // self.process_count
        bad: list[tuple[int, str]] = []
        mine = self.plan.indices(step)[self.process_index * rows : (self.process_index + 1) * rows]
        arrays = stack(self.encoded.manifest, [self._read(index, bad) for index in mine])
        if not self.control:
            arrays.pop("control", None)
        return arrays, bad

    def _read(self, index: int, bad: list[tuple[int, str]]) -> Record:
        """Read a record, or the next of its bucket that is readable. Appends to `bad`."""
        for _ in range(_TRIES):
            try:
                return self.encoded.read(index)
            except BadRecord as error:
                bad.append((int(index), str(error)))
                index = self.plan.replacement(index)
        index, reason = bad[-1]
        raise UserError(
            f"{_TRIES} records in a row cannot be used, the last being "
            f"{self.encoded.describe(index)}, which {reason}: copy the data set again or encode it "
            "again"
        )


def stack(manifest: Manifest, records: Sequence[Record]) -> Batch:
    """Stack records of one bucket, as `Encoded.read` returns them, and pad text with zeros.

    Returns {"latent" float32 [b, h, w, c], "mask" float32 [b, L], and "text" float32 [b, L, D] or
    "tokens" int32 [b, L]}, where L is the manifest's text_length. If the data set holds a
    condition, "control" is like "latent".
    """
    count, name, length = len(records), KINDS[manifest["text"]], manifest["text_length"]
    if name == "text":
        text = np.zeros((count, length, manifest["text_dim"]), np.float32)
    else:
        text = np.zeros((count, length), np.int32)
    mask = np.zeros((count, length), np.float32)
    for row, record in enumerate(records):
        text[row, : len(record[name])] = record[name]
        mask[row, : len(record[name])] = 1
    latents = [key for key in ("latent", "control") if key in records[0]]
    arrays = {key: np.stack([record[key] for record in records]) for key in latents}
    return arrays | {name: text, "mask": mask}


def iterate(
    encoded: Encoded,
    *,
    seed: int,
    batch: int,
    start: int,
    stop: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    max_bad: float = 0.01,
    control: bool = True,
    say: Callable[[str], None] | None = None,
) -> "_ReadAhead":
    """Iterate over the batches of the steps start to stop - 1, read ahead.

    Use the result as a context and, inside it, as an iterator of NumPy arrays.

    Args:
      encoded: the split to read.
      seed, batch, process_index, process_count, control: as in `BatchReader`. Process i reads the
        rows [i batch / n, (i + 1) batch / n) of n processes and no others.
      start, stop: the steps.
      workers: 0 reads in threads of this process. A positive number reads in that many spawned
        processes; the main program then needs an `if __name__ == "__main__"` guard, and takes
        seconds to start.
      max_bad: fraction of the records read that may be unreadable. Each is replaced by the next of
        its size and reported once. Up to three are always tolerated.
      say: called with a line about each unreadable record, and about sizes that never fill a batch.
        By default these are warnings.

    Raises UserError as `BatchReader` does, and if more than `max_bad` are unreadable, now or in
    `next`.
    """
    say = say or (lambda message: warnings.warn(message, stacklevel=3))
    reader = BatchReader(
        encoded,
        seed=seed,
        batch=batch,
        process_index=process_index,
        process_count=process_count,
        control=control,
    )
    counts = np.bincount(encoded.bucket_of, minlength=len(encoded.buckets))
    sizes = zip(encoded.buckets, counts, strict=True)
    unused = [f"{h}x{w} ({n})" for (h, w), n in sizes if n < batch]
    if unused:
        say(
            f"latent sizes with fewer examples than the global batch of {batch} are never seen: "
            f"{', '.join(unused)}"
        )
    return _ReadAhead(encoded, _read_ahead(reader, start, stop, workers), max_bad, say)


class _ReadAhead:
    """The iterator of `iterate`."""

    def __init__(
        self,
        encoded: Encoded,
        iterator: Any,
        max_bad: float,
        say: Callable[[str], None],
    ):
        self._encoded, self._max_bad, self._say = encoded, max_bad, say
        self._bad: set[int] = set()
        self._read = 0
        self._iterator = iterator

    def __enter__(self) -> "_ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._iterator.close()

    def __iter__(self) -> "_ReadAhead":
        return self

    def __next__(self) -> Batch:
        arrays, bad = next(self._iterator)
        self._read += len(arrays["latent"]) + len(bad)
        for index, reason in bad:
            if index not in self._bad:
                self._bad.add(index)
                self._say(f"{self._encoded.describe(index)} {reason}: another takes its place")
        # Each record counts once, in however many epochs it occurs.
        seen = min(self._read, len(self._encoded))
        if len(self._bad) > max(_TOLERATED, self._max_bad * seen):
            raise UserError(
                f"{len(self._bad)} of {seen} records read from {self._encoded.path} cannot be "
                f"used, more than the share {self._max_bad} that is allowed: copy the data set "
                "again or encode it again"
            )
        return arrays


def _read_ahead(reader: BatchReader, start: int, stop: int, workers: int) -> Any:
    """Return a Grain iterator over reader(start) … reader(stop - 1), in that order."""
    import grain

    steps = grain.MapDataset.range(start, stop).map(reader)
    batches = steps.to_iter_dataset(
        grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
    )
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which must be parsed
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        )
    return iter(batches)
