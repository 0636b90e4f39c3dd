"""Combinations of weights: against closed forms on a noisy quadratic, and a power function's."""

import numpy as np
import pytest

from sprint_jax.optim import weight_space


def quadratic():
    """Return the loss of weights over eight checkpoints of a noisy descent, and its best weights.

    The optimum is 0, the loss 1/2 theta' H theta, so the best weights that sum to 1 are known.
    """
    rng = np.random.default_rng(0)
    H, theta, kept = np.diag(rng.uniform(0.2, 2, 12)), np.full(12, 2.0), []
    for i in range(400):
        theta = theta - 0.05 * (H @ theta + rng.standard_normal(12))
        if i >= 240 and (i + 1) % 20 == 0:
            kept.append(theta.copy())
    members = np.array(kept)
    best = np.linalg.solve(members @ H @ members.T, np.ones(8))
    loss = lambda a: float(0.5 * (a @ members) @ H @ (a @ members))
    return loss, best / best.sum()


def averages():
    """Return averages of several lengths over eight checkpoints."""
    steps = np.arange(1, 9) * 20
    return [weight_space.profile(steps, s) for s in (0.05, 0.1, 0.15, 0.2, 0.25)]


def test_the_search_reaches_the_best_weights():
    """LCSC's own: they have both signs, and no average is as good."""
    loss, best = quadratic()
    starts = averages()
    *_, last = weight_space.search(loss, starts, np.random.default_rng(1), rounds=400)
    assert loss(best) < 0.5 * min(map(loss, starts))
    assert best.min() < 0 < best.max()
    assert last[0].score == pytest.approx(loss(best), rel=0.2)
    assert last[0].weights.sum() == pytest.approx(1)
    assert [one.score for one in last] == sorted(one.score for one in last)


def test_each_candidate_is_scored_once_and_the_best_survive():
    asked = []

    def score(a):
        asked.append(tuple(a))
        return float(np.square(a - np.array([0.8, 0.2])).sum())

    starts = [np.array([0.5, 0.5]), np.array([0.0, 1.0])]
    rng = np.random.default_rng(0)
    rounds = list(weight_space.search(score, starts, rng, rounds=3, children=4, parents=2))
    assert len(asked) == len(set(asked)) <= 2 + 3 * 4
    best = [found[0].score for found in rounds]
    assert best == sorted(best, reverse=True)
    assert len(rounds) == 4 and all(len(found) == 2 for found in rounds)


@pytest.mark.parametrize("relative", [0.05, 0.1, 0.2])
def test_a_profile_has_the_length_that_was_asked(relative):
    """The spread of t under the weights of many checkpoints. Fails for another power."""
    steps = np.arange(1, 2001)
    weights = weight_space.profile(steps, relative)
    t = (steps - 0.5) / 2000
    mean = (weights * t).sum()
    spread = np.sqrt((weights * np.square(t - mean)).sum())
    assert weights.sum() == pytest.approx(1)
    assert spread == pytest.approx(relative, rel=1e-3)


def test_a_checkpoint_stands_for_the_time_since_the_one_before():
    weights = weight_space.profile([100, 200, 400], 0.2)
    # Halving the last interval splits its weight.
    finer = weight_space.profile([100, 200, 300, 400], 0.2)
    np.testing.assert_allclose(weights[:2], finer[:2])
    assert weights[2] == pytest.approx(finer[2] + finer[3])
    with pytest.raises(ValueError, match="relative length"):
        weight_space.profile([1], 0.3)


def test_a_combination():
    members = [{"a": np.float32([1, 2])}, {"a": np.float32([3, -1])}]
    found = weight_space.combine(members, np.array([1.5, -0.5]))
    np.testing.assert_allclose(found["a"], [0.0, 3.5])
    assert found["a"].dtype == np.float64
