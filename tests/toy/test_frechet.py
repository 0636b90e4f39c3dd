"""The Fréchet distance: closed forms, and the order of images by their quality."""

import numpy as np
import pytest

from sprint_jax.toy import frechet, shapes


def test_equal_moments_have_distance_zero():
    rng = np.random.RandomState(0)
    moments = frechet.moments(rng.randn(500, 8))
    assert abs(frechet.distance(moments, moments)) < 1e-9


def test_diagonal_gaussians_have_a_closed_form():
    """Fails when the factor 2 of the cross term is dropped."""
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 9.0])
    mean = np.array([1.0, -2.0, 0.0])
    found = frechet.distance((mean, np.diag(a)), (np.zeros(3), np.diag(b)))
    assert found == pytest.approx(
        np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-9
    )


def test_rotated_gaussians_against_the_matrix_root():
    rng = np.random.RandomState(1)
    a, b = (m @ m.T for m in rng.randn(2, 5, 5))
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet.distance((np.zeros(5), a), (np.zeros(5), b)) == pytest.approx(expected, rel=1e-9)


def test_features_order_images_by_quality():
    """Other real images are near, noisy ones farther and pure noise far."""
    real = [np.stack([shapes.example(s, i).image for i in range(400)]) for s in (0, 1)]
    noise = np.random.RandomState(0).randint(0, 256, real[0].shape).astype(np.uint8)
    noisy = np.clip(real[1] + np.random.RandomState(1).randn(*real[1].shape) * 30, 0, 255).astype(
        np.uint8
    )
    reference = frechet.moments(frechet.features(real[0]))
    near, middle, far = (
        frechet.distance(reference, frechet.moments(frechet.features(x)))
        for x in (real[1], noisy, noise)
    )
    assert near < middle / 2 < far / 4


def test_features_do_not_depend_on_chunks():
    images = np.stack([shapes.example(0, i).image for i in range(150)])
    whole = frechet.features(images)
    assert whole.shape == (150, frechet.DIM)
    np.testing.assert_allclose(whole[140:], frechet.features(images[140:]), rtol=1e-5)
