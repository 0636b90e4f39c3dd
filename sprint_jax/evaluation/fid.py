"""The statistic of FID: Gaussians fitted to features, and their Fréchet distance, in float64.

Callers choose the features (`extractors.py`). On the same features the distance equals that of
pytorch-fid and clean-fid. It is FID only on the pooled features of the published Inception network.
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.linalg

from sprint_jax.errors import UserError
from sprint_jax.storage import files, signatures
from sprint_jax.toy import frechet

# Added to both diagonals if the covariances' product has no finite root (pytorch-fid's default).
EPS = 1e-6
# The largest imaginary part on the root's diagonal that passes for rounding (pytorch-fid's).
_IMAGINARY = 1e-3
_LARGEST = 1e100  # of a mean or covariance; the distance of larger ones overflows


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """A Gaussian fitted to features.

    mean: [D]. covariance: [D, D], with divisor count - 1. count: of features, 0 if it is unknown.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a stream of features [N, D]. Those of parts, on several hosts say, can be merged.

    count: N. mean: float64 [D]. scatter: float64 [D, D], the sum of outer products of deviations
    from the mean. Sums of raw products would lose the digits that mean and spread have in common.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Return the moments of features [N, D], N at least 1."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of features together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(
            count, self.mean + apart * (other.count / count), self.scatter + other.scatter + between
        )

    def gaussian(self) -> Gaussian:
        """Return the fitted Gaussian.

        Raises UserError for fewer than two features, and for features that are too large.
        """
        if self.count < 2:
            raise UserError(
                f"{self.count} image has no covariance: give at least two, and thousands for an FID"
            )
        covariance = self.scatter / (self.count - 1)
        if not (np.isfinite(self.mean).all() and np.isfinite(covariance).all()):
            raise UserError("the features are too large for a covariance: scale them down")
        return Gaussian(self.mean, covariance, self.count)


def merge(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all parts together. Raises UserError if there is no part."""
    total: Moments | None = None
    for part in parts:
        total = part if total is None else total.merged(part)
    if total is None:
        raise UserError("no images: nothing to take statistics of")
    return total


def distance(a: Gaussian, b: Gaussian) -> float:
    """Return the Fréchet distance, with pytorch-fid's treatment of singular covariances.

    Raises UserError for Gaussians of different sizes and for a root that is not real.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features have {len(a.mean)} and {len(b.mean)} numbers: both sets need the same "
            "extractor"
        )
    return frechet.distance(
        (a.mean, a.covariance), (b.mean, b.covariance), trace_of_root=_trace_of_root
    )


def _trace_of_root(a, b):
    """Return tr((a b)^(1/2)) by the matrix root, as pytorch-fid does.

    The sum of the roots of eigenvalues, `frechet.trace_of_root`, is the same number for regular
    covariances. For singular ones the two roundings differ in the eighth digit.
    """
    root = _root(a @ b)
    if not np.isfinite(root).all():
        offset = EPS * np.eye(len(a))
        root = _root((a + offset) @ (b + offset))
    if np.iscomplexobj(root):
        if np.abs(np.imag(np.diagonal(root))).max() > _IMAGINARY:
            largest = np.abs(np.imag(root)).max()
            raise UserError(
                f"the root of the covariances has an imaginary part of {largest:.3g}: give more "
                "images"
            )
        root = np.real(root)
    return np.trace(root)


def _root(matrix):
    with warnings.catch_warnings():  # few images give a singular product, which callers expect
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(scipy.linalg.sqrtm(matrix))


def save(path: str | os.PathLike, gaussian: Gaussian, protocol: Mapping[str, Any]) -> None:
    """Write an npz file with `mu`, `sigma`, `count` and every field of protocol."""
    fields: dict[str, Any] = {
        name: np.array("" if value is None else value) for name, value in protocol.items()
    }
    with files.whole(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            mu=gaussian.mean,
            sigma=gaussian.covariance,
            count=np.array(gaussian.count),
            **fields,
        )


def load(path: str | os.PathLike) -> tuple[Gaussian, dict[str, str]]:
    """Return (Gaussian, fields of the protocol) of an npz file, ours or another tool's.

    The file has at least `mu` and `sigma`. Raises UserError for anything else.
    """
    path = pathlib.Path(path)
    try:
        with np.load(path, allow_pickle=False) as stored:
            fields = {name: stored[name] for name in stored.files}
    except Exception as error:  # NumPy raises many kinds; an npy file is no context manager
        why = " ".join(str(error).split())[:200]
        kind = signatures.describe(path)
        if kind is not None and "NumPy" not in kind:
            why = f"it is {kind}"
        raise UserError(
            f"cannot read statistics from {path} ({why}): give an npz file with mu and sigma"
        ) from None
    if not {"mu", "sigma"} <= fields.keys():
        raise UserError(
            f"{path} holds {sorted(fields)}: an npz file of statistics has mu and sigma"
        )
    for name in ("mu", "sigma"):
        if fields[name].dtype.kind not in "uif":
            raise UserError(f"{path} has {name} of type {fields[name].dtype}: it must be numbers")
    mean, covariance = (fields.pop(name).astype(np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or not mean.size or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path} has mu {mean.shape} and sigma {covariance.shape}: [D] and [D, D] belong "
            "together"
        )
    _check_values(path, mean, covariance)
    return Gaussian(mean, covariance, _count(path, fields.pop("count", np.array(0)))), {
        name: str(value) for name, value in fields.items() if value.ndim == 0
    }


def _check_values(path: pathlib.Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Raise UserError for numbers that are those of no Gaussian."""
    for values in (mean, covariance):
        if not np.isfinite(values).all():
            raise UserError(
                f"{path} holds values that are not finite: compute the statistics again"
            )
        if np.abs(values).max() > _LARGEST:
            raise UserError(f"{path} holds values above {_LARGEST}: compute the statistics again")
    apart = np.abs(covariance - covariance.T).max()
    if apart > 1e-3 * np.abs(covariance).max() or (np.diagonal(covariance) < 0).any():
        raise UserError(
            f"{path} has a sigma that is no covariance (not symmetric, or below 0 on the "
            "diagonal): compute the statistics again"
        )


def _count(path: pathlib.Path, count: np.ndarray) -> int:
    """Return the number of images. Raises UserError for anything but a whole number."""
    whole = not count.shape and count.dtype.kind in "uif" and np.isfinite(count) and count >= 0
    if not whole or count != np.floor(count):
        raise UserError(f"{path} has count {str(count)[:60]}: it is the number of images")
    return int(count)
