"""The statistic of FID: Gaussians fitted to features, and the Fréchet distance between two of them, in float64.

What the features are is the caller's business (`extractors.py`); on the same features the distance equals that
of pytorch-fid and clean-fid. It is FID only on the pooled features of the published Inception network.
"""

import dataclasses
import pathlib
import warnings
import zipfile

import numpy as np
import scipy.linalg

from sprint_jax.errors import UserError
from sprint_jax.storage import files

# Added to both diagonals where the product of the covariances has no finite root (pytorch-fid's default).
EPS = 1e-6
# Largest imaginary part on the diagonal of the root that is rounding (pytorch-fid's tolerance).
_IMAGINARY = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """mean [D] and covariance [D, D] (divisor count - 1) of count features; count 0: not known."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What a stream of features [N, D] leaves behind; parts seen on several devices or hosts are merged.

    count: N. mean: float64 [D]. scatter: float64 [D, D], the sum of outer products of deviations from the mean.
    Deviations, not raw products: those would lose the digits that the mean and the spread have in common.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features):
        """[N, D], N at least 1."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merged(self, other):
        """The moments of both sets of features together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(
            count, self.mean + apart * (other.count / count), self.scatter + other.scatter + between
        )

    def gaussian(self) -> Gaussian:
        """Raises UserError for fewer than two features."""
        if self.count < 2:
            raise UserError(
                f"{self.count} picture has no covariance: give at least two, and thousands for an FID"
            )
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def merge(parts) -> Moments:
    """All parts as one. Raises UserError where there is none."""
    total = None
    for part in parts:
        total = part if total is None else total.merged(part)
    if total is None:
        raise UserError("no pictures: nothing to take statistics of")
    return total


def distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with pytorch-fid's treatment of singular products.

    Raises UserError for Gaussians of different sizes and for a root that is not real.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features have {len(a.mean)} and {len(b.mean)} numbers: both sets need the same extractor"
        )
    root = _root(a.covariance @ b.covariance)
    if not np.isfinite(root).all():
        offset = EPS * np.eye(len(a.mean))
        root = _root((a.covariance + offset) @ (b.covariance + offset))
    if np.iscomplexobj(root):
        if np.abs(np.diagonal(root).imag).max() > _IMAGINARY:
            largest = np.abs(root.imag).max()
            raise UserError(
                f"the root of the covariances has an imaginary part of {largest:.3g}: give more pictures"
            )
        root = root.real
    apart = a.mean - b.mean
    return float(
        apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root)
    )


def _root(matrix):
    with (
        warnings.catch_warnings()
    ):  # a singular product is expected of few pictures, and looked at by the caller
        warnings.simplefilter("ignore", RuntimeWarning)
        return scipy.linalg.sqrtm(matrix)


def save(path, gaussian: Gaussian, protocol: dict):
    """Writes an npz file with `mu`, `sigma`, `count` and every field of protocol, whole or not at all."""
    fields = {name: np.array("" if value is None else value) for name, value in protocol.items()}
    with files.whole(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            mu=gaussian.mean,
            sigma=gaussian.covariance,
            count=np.array(gaussian.count),
            **fields,
        )


def load(path) -> tuple[Gaussian, dict]:
    """(Gaussian, protocol fields as strings) of an npz file with at least `mu` and `sigma`, ours or another tool's.

    Raises UserError for anything else.
    """
    path = pathlib.Path(path)
    try:
        with np.load(path, allow_pickle=False) as stored:
            fields = {name: stored[name] for name in stored.files}
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:  # an npy file is an array alone
        raise UserError(
            f"cannot read statistics from {path} ({error}): give an npz file with mu and sigma"
        ) from None
    if not {"mu", "sigma"} <= fields.keys():
        raise UserError(
            f"{path} holds {sorted(fields)}: an npz file of statistics has mu and sigma"
        )
    mean, covariance = (np.asarray(fields.pop(name), np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path} has mu {mean.shape} and sigma {covariance.shape}: [D] and [D, D] belong together"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path} holds values that are not finite: compute the statistics again")
    count = fields.pop("count", np.array(0))
    if count.shape or not np.issubdtype(count.dtype, np.number):
        raise UserError(f"{path} has count {count}: it is the number of pictures")
    count = int(count)
    return Gaussian(mean, covariance, count), {
        name: str(value) for name, value in fields.items() if value.ndim == 0
    }
