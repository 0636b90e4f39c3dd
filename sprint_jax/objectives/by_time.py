"""Loss statistics by time: sums over the samples of each part of [0, top].

Sums, not means, because a part may be empty.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

# Even in time. A bucket holds four of 32 samples on average; a row of 20 steps has eighty and more.
COUNT = 8


def by_time(t: jax.Array, top: float, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Sum over the samples of each bucket and divide by the size of the batch.

    Every entry is a mean over samples, so averages over parts of a batch and over batches of one
    size are those of all samples together. The mean inside a bucket is an entry over its share. A
    share of 0 means an empty bucket, and non-finite values stay in their own bucket.

    Args:
      t: [B] times in [0, top]. Bucket i is [i, i + 1) top / COUNT, the last one with its end.
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
