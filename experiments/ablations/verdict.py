"""Does a difference over seeds agree with what was claimed? Welch's t-test, and how many seeds
would tell.

The rule. Let d be how much better the row claimed to be better is, and SE the standard error of d:
  agrees         d / SE is above the 95 % point of Student's t with Welch's degrees of freedom
  disagrees      d / SE is below minus that point
  not resolved   anything between, or fewer than two seeds of either row, or a value that is not
                 finite
Where no difference is claimed, it agrees when |d| is at most one standard deviation over seeds,
disagrees when a difference is resolved that is larger than that, and is not resolved otherwise.
"""

import dataclasses
import math

import numpy as np
import scipy.stats

AGREES, DISAGREES, UNRESOLVED = "agrees", "disagrees", "not resolved"
CONFIDENCE, POWER = 0.95, 0.80
MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Verdict:
    """word: one of the three. difference: how much better, in the metric's units; error: its
    standard error, nan with fewer than two seeds. seeds: of each row, that would resolve the
    difference seen with a probability of 80 %; None where no number up to MOST_SEEDS would, or
    where it cannot be said.
    """

    word: str
    difference: float
    error: float
    seeds: int | None


def summary(values) -> tuple[float, float]:
    """Return (mean, standard error of the mean) over seeds; the error is nan for one."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def compare(better, worse, *, higher: bool) -> Verdict:
    """Judge the claim that `better` (values over seeds) beats `worse`.

    higher: whether more is better.
    """
    difference, error, freedom = _welch(better, worse, higher)
    if math.isnan(error):
        return Verdict(UNRESOLVED, difference, error, None)
    bound = _bound(error, freedom)
    word = AGREES if difference > bound else DISAGREES if difference < -bound else UNRESOLVED
    return Verdict(word, difference, error, seeds_to_resolve(better, worse))


def equal(one, other, *, higher: bool) -> Verdict:
    """Judge the claim that there is no difference between two sets of values over seeds."""
    difference, error, freedom = _welch(one, other, higher)
    if math.isnan(error):
        return Verdict(UNRESOLVED, difference, error, None)
    spread = math.sqrt((np.var(one, ddof=1) + np.var(other, ddof=1)) / 2)
    resolved = abs(difference) > _bound(error, freedom)
    word = AGREES if abs(difference) <= spread else DISAGREES if resolved else UNRESOLVED
    return Verdict(word, difference, error, seeds_to_resolve(one, other))


def seeds_to_resolve(one, other) -> int | None:
    """Return how many seeds of each row the test needs, at least, to find the difference.

    It finds the difference, with the spreads seen here, in 80 % of all tries.
    """
    variance = float(np.var(one, ddof=1) + np.var(other, ddof=1))
    difference = abs(float(np.mean(one) - np.mean(other)))
    if difference == 0:
        return None
    if variance == 0:
        return 2
    # The normal approximation is a lower bound; from there the noncentral t, of equal variances;
    # Welch's test needs one or two more of few seeds.
    begin = (
        (scipy.stats.norm.ppf(CONFIDENCE) + scipy.stats.norm.ppf(POWER)) ** 2
        * variance
        / difference**2
    )
    for seeds in range(max(2, math.floor(begin)), MOST_SEEDS + 1):
        if power(difference, variance, seeds) >= POWER:
            return seeds
    return None


def power(difference: float, variance: float, seeds: int) -> float:
    """Return the probability that the one-sided test finds `difference` with `seeds` of each row.

    variance: sum of both rows'.
    """
    freedom = 2 * (seeds - 1)
    return float(
        scipy.stats.nct.sf(
            scipy.stats.t.ppf(CONFIDENCE, freedom),
            freedom,
            difference / math.sqrt(variance / seeds),
        )
    )


def _welch(one, other, higher):
    """Return (difference counted as better, its standard error, degrees of freedom)."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    difference = float(one.mean() - other.mean()) * (1 if higher else -1)
    if min(len(one), len(other)) < 2 or not np.isfinite([*one, *other]).all():
        return difference, math.nan, math.nan
    a, b = one.var(ddof=1) / len(one), other.var(ddof=1) / len(other)
    if a + b == 0:
        return difference, 0.0, math.inf
    return (
        difference,
        math.sqrt(a + b),
        float((a + b) ** 2 / (a**2 / (len(one) - 1) + b**2 / (len(other) - 1))),
    )


def _bound(error, freedom):
    """Return what a difference has to pass, in its own units."""
    return error * float(
        scipy.stats.t.ppf(CONFIDENCE, freedom)
        if math.isfinite(freedom)
        else scipy.stats.norm.ppf(CONFIDENCE)
    )
