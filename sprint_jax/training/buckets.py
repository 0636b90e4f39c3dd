"""Values of a batch by time: what a step reports of each part of [0, top], without dividing by what may be empty."""

import jax.numpy as jnp

# Even in time. Of a batch of 32 a bucket holds four samples on average, of a row of 20 steps eighty and more.
COUNT = 8


def by_time(t, top, values):
    """Sums over the samples of each bucket, over the size of the batch.

    Every entry is a mean over samples, so averages over parts of a batch and over batches of one size are those
    of all samples together. What a bucket holds on average is an entry over its share; a share of 0 says that
    it was empty, and non-finite values stay in their own bucket.

    Args:
      t: [B] times in [0, top]; bucket i is [i, i + 1) top / COUNT, the last one with its end.
      values: {name: [B]}.
    Returns:
      {"share": [COUNT], name: [COUNT], ...} float32.
    """
    index = jnp.clip(jnp.floor(t * (COUNT / top)), 0, COUNT - 1)
    inside = index[:, None] == jnp.arange(COUNT)
    sums = {
        name: jnp.where(inside, v.astype(jnp.float32)[:, None], 0).mean(0)
        for name, v in values.items()
    }
    return {"share": inside.astype(jnp.float32).mean(0)} | sums
