"""Training batches of an encoded data set: which examples step k sees, and reading them ahead of use.

The order is a pure function of (seed, step, global batch) and the data set, so it is the same for any number
of processes and workers, and a run resumes from its step number alone. Grain shuffles, and reads ahead in
threads or processes.
"""

import dataclasses
import warnings

import numpy as np
from absl import flags

from sprint_jax.data.encoded import KINDS, BadRecord, Encoded
from sprint_jax.errors import UserError

_TRIES = 100  # unreadable records in a row before the whole data set is taken for damaged
_FORGIVEN = 3  # unreadable records that never stop a run, however few were read
_AHEAD = 4  # batches read at a time, and waiting, in each process that reads


class Plan:
    """Which examples make up the global batch of a step.

    A batch holds examples of one bucket. In each epoch the examples of every bucket are shuffled and cut into
    whole batches, what is left over is dropped until the next epoch, and the batches of all buckets are
    shuffled together.

    steps_per_epoch: batches in an epoch.
    """

    def __init__(self, bucket_of, *, seed, batch):
        """bucket_of: int [N], each example's bucket. seed: 0 or more. batch: examples in a global batch.

        Raises UserError where no bucket fills a batch.
        """
        import grain  # a second of imports, which only training needs

        self._bucket_of = bucket_of
        # Stable, so that members are in rising order; small integers are sorted by radix, in linear time.
        order, counts = np.argsort(bucket_of, kind="stable"), np.bincount(bucket_of)
        self._members = np.split(order, np.cumsum(counts)[:-1])
        if counts.max(initial=0) < batch:
            raise UserError(
                f"no latent size has a whole global batch: batch {batch}, and at most {counts.max(initial=0)} of the "
                f"{len(bucket_of)} examples share one size: use a smaller batch or encode more"
            )
        # Grain adds the epoch to a seed: seeds that are far apart keep buckets from repeating each other.
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

    def at(self, step):
        """The examples int64 [batch] of step `step`, counted from 0 and never ending."""
        return self._steps[step]

    def after(self, index):
        """The example that stands in for one that cannot be read: the next of its bucket, in a ring."""
        members = self._members[self._bucket_of[index]]
        return members[(np.searchsorted(members, index) + 1) % len(members)]


@dataclasses.dataclass(eq=False)
class Make:
    """step -> (arrays, bad): one process's rows of the global batch, read now.

    arrays: {"latent" float32 [b, h, w, c], "mask" float32 [b, L], "text" float32 [b, L, D] or "tokens" int32
    [b, L]}, and "control" as latent where the data set holds a condition and `control` asks for it, with b = batch /
    process_count and L the manifest's text_length. bad: [(index, reason)] of records
    that could not be read and were replaced. Pickles small: worker processes plan for themselves.

    Raises UserError (when made) where batch does not divide by process_count or no bucket fills a batch,
    and (when called) where 100 records in a row cannot be read.
    """

    encoded: Encoded
    seed: int
    batch: int
    process_index: int = 0
    process_count: int = 1
    control: bool = True

    def __post_init__(self):
        if self.batch < 1 or self.batch % self.process_count:
            raise UserError(
                f"a global batch of {self.batch} does not divide by {self.process_count} processes: use a multiple"
            )
        self.plan = Plan(self.encoded.bucket_of, seed=self.seed, batch=self.batch)

    def __reduce__(self):
        return Make, (
            self.encoded,
            self.seed,
            self.batch,
            self.process_index,
            self.process_count,
            self.control,
        )

    def __call__(self, step):
        indices, rows, bad = self.plan.at(step), self.batch // self.process_count, []
        mine = indices[self.process_index * rows : (self.process_index + 1) * rows]
        arrays = stack(self.encoded.manifest, [self._read(index, bad) for index in mine])
        if not self.control:
            arrays.pop("control", None)
        return arrays, bad

    def _read(self, index, bad):
        """The record, or the next of its bucket that can be read; appends to `bad`."""
        for _ in range(_TRIES):
            try:
                return self.encoded.read(index)
            except BadRecord as error:
                bad.append((int(index), str(error)))
                index = self.plan.after(index)
        index, reason = bad[-1]
        raise UserError(
            f"{_TRIES} records in a row cannot be used, the last being {self.encoded.where(index)}, which {reason}: "
            "copy the data set again or encode it again"
        )


def stack(manifest, records):
    """Records of one bucket as `Encoded.read` gives them -> arrays as of `Make`, all of them, text padded with zeros."""
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
    return {key: np.stack([record[key] for record in records]) for key in latents} | {
        name: text,
        "mask": mask,
    }


def iterate(
    encoded,
    *,
    seed,
    batch,
    start,
    stop,
    process_index=0,
    process_count=1,
    workers=0,
    max_bad=0.01,
    control=True,
    say=None,
):
    """Batches of the steps start to stop - 1, read ahead. Use as a context, and as an iterator within.

    Args:
      encoded: `Encoded`. seed, batch: of `Plan`; batch is the global one.
      process_index, process_count: this process gets rows [i batch / n, (i + 1) batch / n) and reads no other.
      workers: 0 reads in threads of this process, more in so many processes. These are spawned: the program
        that calls this needs an `if __name__ == "__main__"` guard, and takes some seconds to begin.
      max_bad: share of the records read that may be unreadable. Each is replaced by the next of its size,
        and said once; three are always forgiven.
      control: False leaves a condition out that the data set holds.
      say: called with a line about each unreadable record and about sizes that never fill a batch; default:
        a warning.
    Yields dicts of NumPy arrays as `Make` does.
    Raises UserError as `Make` does, now or in `next`, and past max_bad.
    """
    say = say or (lambda message: warnings.warn(message, stacklevel=3))
    make = Make(encoded, seed, batch, process_index, process_count, control)
    few = np.bincount(encoded.bucket_of, minlength=len(encoded.buckets))
    unused = [f"{h}x{w} ({n})" for (h, w), n in zip(encoded.buckets, few, strict=True) if n < batch]
    if unused:
        say(
            f"latent sizes with fewer examples than the global batch of {batch} are never seen: {', '.join(unused)}"
        )
    return _Batches(make, start, stop, workers, max_bad, say)


class _Batches:
    """The iterator of `iterate`."""

    def __init__(self, make, start, stop, workers, max_bad, say):
        self._encoded, self._max_bad, self._say = make.encoded, max_bad, say
        self._bad, self._read = set(), 0
        self._iterator = _read_ahead(make, start, stop, workers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._iterator.close()

    def __iter__(self):
        return self

    def __next__(self):
        arrays, bad = next(self._iterator)
        self._read += len(arrays["latent"]) + len(bad)
        for index, reason in bad:
            if index not in self._bad:
                self._bad.add(index)
                self._say(f"{self._encoded.where(index)} {reason}: another takes its place")
        # Each record counts once, however many epochs have passed.
        seen = min(self._read, len(self._encoded))
        if len(self._bad) > max(_FORGIVEN, self._max_bad * seen):
            raise UserError(
                f"{len(self._bad)} of {seen} records read from {self._encoded.path} cannot be used, more than the "
                f"share {self._max_bad} that is allowed: copy the data set again or encode it again"
            )
        return arrays


def _read_ahead(make, start, stop, workers):
    """A Grain iterator over make(start) … make(stop - 1), in that order."""
    import grain

    steps = grain.MapDataset.range(start, stop).map(make)
    batches = steps.to_iter_dataset(
        grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
    )
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, also where nobody parses any
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        )
    return iter(batches)
