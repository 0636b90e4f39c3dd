"""Types of the formulas: arrays with one axis of samples, and networks as callables.

Axis letters: b samples, d any other axes.
"""

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Array, Float

Samples: TypeAlias = Float[Array, " b *d"]
PerSample: TypeAlias = Float[Array, " b"]
Scalar: TypeAlias = float | Float[Array, ""]

# A network in flow matching or TrigFlow: (state, time) -> prediction.
Network: TypeAlias = Callable[[Samples, PerSample], Samples]
# A student in TrigFlow: (state, angle) -> prediction and log-variance.
Student: TypeAlias = Callable[[Samples, PerSample], tuple[Samples, PerSample]]
