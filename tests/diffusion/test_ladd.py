"""LADD: hinge losses, renoising and discriminator heads against NumPy from their description."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import max_error, normals, relative_error
from sprint_jax.diffusion import ladd
from sprint_jax.models import discriminator
from sprint_jax.models.discriminator import LADDHeads

pytestmark = pytest.mark.second_pass

WIDTH, TOKENS, HEADS = 6, 12, 2


def logits(batch, seed):
    """Return logits of two heads with different numbers of tokens.

    A mean of the heads' means then differs from the mean of all logits.
    """
    return [2 * normals(batch, n, seed=seed + n) for n in (5, 9)]


@pytest.mark.parametrize("reduction", ["code", "paper"])
def test_generator_loss(reduction):
    """The loss is minus the logits.

    Fails when "paper" takes heads.mean and when jnp.negative is left out.
    """
    given = logits(3, 0)
    value = ladd.generator_loss(given, reduction=reduction)
    per_head = [-one.astype(np.float64).mean(1) for one in given]
    assert max_error(value, np.sum(per_head, 0) * (0.5 if reduction == "code" else 1)) < 1e-6


@pytest.mark.parametrize("reduction", ["code", "paper"])
def test_discriminator_loss(reduction):
    """Check the hinge of each side.

    Fails when relu(1 - d) becomes relu(1 + d) and when "code" loses its half.
    """
    real, fake = logits(3, 0), logits(6, 50)
    value = ladd.discriminator_loss(real, fake, reduction=reduction)
    on_real = [np.maximum(0, 1 - d.astype(np.float64)).mean() for d in real]
    on_fake = [np.maximum(0, 1 + d.astype(np.float64)).mean() for d in fake]
    if reduction == "code":
        expected = 0.5 * (np.mean(on_real) + np.mean(on_fake))
    else:
        expected = sum(on_real) + sum(on_fake)
    assert max_error(value, expected) < 1e-6


def test_hinge_is_flat_outside_its_margin():
    """Real logits above 1 and fake logits below -1 cost nothing.

    Fails when relu is left out of either side.
    """
    sure = [np.full((2, 4), 3, np.float32)]
    loss = lambda real, fake: ladd.discriminator_loss(real, fake, reduction="paper")
    assert float(loss(sure, [-sure[0]])) == 0
    assert float(loss([-sure[0]], sure)) == 8
    slopes = jax.grad(loss, (0, 1))([0 * sure[0]], [0 * sure[0]])
    np.testing.assert_allclose(slopes[0][0], -1 / 8, rtol=1e-6)
    np.testing.assert_allclose(slopes[1][0], 1 / 8, rtol=1e-6)


def test_unknown_reduction_is_refused():
    """Fails when _over_heads stops looking up its reduction in the list."""
    with pytest.raises(ValueError, match="reduction 'sum'"):
        ladd.generator_loss(logits(3, 0), reduction="sum")


def test_misaligned():
    """Image i meets text i + 1. Fails when the roll is along axis 1 and when it is by zero."""
    x0 = normals(4, 3, 3, 2)
    np.testing.assert_array_equal(ladd.misaligned(x0), x0[[3, 0, 1, 2]])


def test_renoise():
    """Fails when the state is not divided by sigma_d."""
    x0, z, s = normals(4, 3, 3, 2), normals(4, 3, 3, 2, seed=1), np.float32([0.1, 0.6, 1.2, 1.5])
    angle = s.astype(np.float64)[:, None, None, None]
    assert max_error(ladd.renoise(x0, z, s), 2 * (np.cos(angle) * x0 + np.sin(angle) * z)) < 1e-6


@functools.cache
def new_heads():
    """Return (heads, parameters, spectral vectors) of new heads."""
    heads = LADDHeads(width=WIDTH, count=HEADS, dtype="float32")
    init = jax.jit(
        heads.init, compiler_options={"xla_backend_optimization_level": 0}
    )  # compiles faster
    return heads, *jax.tree.map(np.asarray, init(jax.random.key(0)))


def leading(kernel):
    """Return the largest singular value of a kernel with all but its last axis flattened."""
    return np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)[0]


def test_spectral_norm_finds_the_largest_singular_value():
    """Fails when a power iteration multiplies by the kernel twice in one direction (u from kernel @
    v).
    """
    kernel = normals(9, 6)
    vectors = {"u": np.eye(6, dtype=np.float32)[0], "v": np.zeros(9, np.float32)}
    refine = jax.jit(lambda vectors: discriminator.power_iteration(kernel, vectors))
    for _ in range(200):
        vectors = refine(vectors)
    normalized = discriminator.spectral_norm(kernel, vectors)
    sigma = vectors["v"] @ kernel @ vectors["u"]
    assert abs(sigma / leading(kernel) - 1) < 1e-5
    assert abs(leading(normalized) - 1) < 1e-5
    for name in ("u", "v"):
        assert abs(np.linalg.norm(vectors[name]) - 1) < 1e-5


def test_new_heads_know_their_singular_values():
    """After init, sigma is correct to a few per cent.

    Fails when _init_head runs no power iteration.
    """
    _, params, spectral = new_heads()
    for name, vectors in spectral.items():
        for kernel, u, v in zip(params[name]["kernel"], vectors["u"], vectors["v"]):
            assert 0.9 < v @ kernel @ u / leading(kernel) < 1.0001


def test_spectral_norm_gradient_treats_u_and_v_as_constants():
    """d<M, K/sigma>/dK = (M - <M, K/sigma> v u') / sigma. Fails when advance is not stopped."""
    kernel, M = normals(9, 6), normals(9, 6, seed=1)
    heads = LADDHeads(width=6, count=1, dtype="float32")
    start = {"conv_in": {"u": np.eye(6, dtype=np.float32)[:1], "v": np.zeros((1, 9), np.float32)}}

    def value(kernel):
        after = heads.advance({"conv_in": {"kernel": kernel[None]}}, start)["conv_in"]
        return (M * discriminator.spectral_norm(kernel, jax.tree.map(lambda a: a[0], after))).sum()

    slope = jax.jit(jax.grad(value))(kernel)
    K = kernel.astype(np.float64)
    v = K[:, 0] / np.linalg.norm(K[:, 0])
    u = v @ K / np.linalg.norm(v @ K)
    sigma = v @ K @ u
    expected = (M - (M * K / sigma).sum() * np.outer(v, u)) / sigma
    assert max_error(slope, expected) < 1e-5


def test_advance_is_one_power_iteration_of_every_head():
    """conv_out has one column and has converged from the start.

    Fails when advance takes another head's kernel.
    """
    heads, params, spectral = new_heads()
    after = jax.jit(heads.advance)(params, spectral)
    for i in range(HEADS):
        for name in ("conv_in", "conv_mid"):
            v = params[name]["kernel"][i] @ spectral[name]["u"][i]
            v = v / np.linalg.norm(v)
            u = v @ params[name]["kernel"][i]
            assert max_error(after[name]["v"][i], v) < 1e-5
            assert max_error(after[name]["u"][i], u / np.linalg.norm(u)) < 1e-5
            assert np.abs(after[name]["u"][i] - spectral[name]["u"][i]).max() > 0


def group_norm(x, groups, scale, bias):
    """Normalize with NumPy each channel over the tokens of the samples of each group."""
    out = []
    for part in np.split(x.astype(np.float64), groups):
        part = (part - part.mean((0, 1))) / np.sqrt(part.var((0, 1)) + 1e-5)
        out.append(part * scale + bias)
    return np.concatenate(out)


@pytest.mark.parametrize(("batch", "groups"), [(4, 1), (8, 1), (16, 2), (24, 3), (12, 2)])
def test_batch_norm_local_statistics(batch, groups):
    """Fails when GROUP is 4, and when the variance is that of g instead of g - mean."""
    x = 3 + 2 * normals(batch, TOKENS, WIDTH) * np.arange(1, batch + 1)[:, None, None]
    scale, bias = normals(WIDTH, seed=1), normals(WIDTH, seed=2)
    value = discriminator.batch_norm_local(jnp.asarray(x, jnp.float32), scale, bias)
    assert max_error(value, group_norm(x, groups, scale, bias)) < 1e-5


def test_batch_norm_local_groups_do_not_mix():
    """Sample 9 changes samples 8 to 15 and no others. Fails when GROUP is 16."""
    x = normals(16, TOKENS, WIDTH)
    changed = x.copy()
    changed[9] += 5
    run = lambda x: np.asarray(discriminator.batch_norm_local(x, np.ones(WIDTH), np.zeros(WIDTH)))
    moved = np.abs(run(x) - run(changed)).max((1, 2))
    assert (moved[:8] == 0).all() and (moved[8:] > 0.01).all()
    with pytest.raises(ValueError, match="batch 9 does not split into 2"):
        run(x[:9])


def test_circular_windows():
    """The window begins at offset -4 and wraps around. Fails when jnp.roll takes +o."""
    x = normals(2, TOKENS, WIDTH)
    windows = np.asarray(discriminator.circular_windows(x)).reshape(2, TOKENS, 9, WIDTH)
    for token in range(TOKENS):
        for place in range(9):
            np.testing.assert_array_equal(
                windows[:, token, place], x[:, (token + place - 4) % TOKENS]
            )


def circular_conv(x, kernel, bias):
    """Apply PyTorch's circular Conv1d: wrap 4 tokens on both sides, then cross-correlate.

    `kernel` is [9, in, out].
    """
    padded = np.pad(x, ((0, 0), (4, 4), (0, 0)), mode="wrap")
    return sum(padded[:, k : k + x.shape[1]] @ kernel[k] for k in range(9)) + bias


def numpy_head(p, spectral, x):
    """Apply one head in float64; `p` is from LADDHeads.init without its leading axis."""
    leaky = lambda x: np.where(x > 0, x, 0.2 * x)
    weight = {}
    for name, vectors in spectral.items():
        kernel = p[name]["kernel"].astype(np.float64)
        weight[name] = kernel / (vectors["v"].astype(np.float64) @ kernel @ vectors["u"])
    groups = -(-len(x) // 8)
    h = x.astype(np.float64) @ weight["conv_in"] + p["conv_in"]["bias"]
    h = leaky(group_norm(h, groups, **p["norm_in"]))
    mid = circular_conv(h, weight["conv_mid"].reshape(9, WIDTH, WIDTH), p["conv_mid"]["bias"])
    h = (h + leaky(group_norm(mid, groups, **p["norm_mid"]))) / np.sqrt(2)
    return (h @ weight["conv_out"] + p["conv_out"]["bias"])[..., 0]


def random_heads():
    """Return `new_heads` with noise added to every parameter."""
    heads, params, spectral = new_heads()
    leaves, tree = jax.tree.flatten(params)
    leaves = [a + 0.3 * normals(*a.shape, seed=i) for i, a in enumerate(leaves)]
    return heads, jax.tree.unflatten(tree, leaves), spectral


def test_heads_against_numpy():
    """Fails when sqrt(2) is 2, when the slope is 0.1, when the residual is dropped, and when a
    kernel is not divided by sigma.
    """
    heads, params, spectral = random_heads()
    features = [normals(16, TOKENS, WIDTH, seed=i) for i in range(HEADS)]
    values = jax.jit(heads.apply)(params, spectral, features)
    for i, value in enumerate(values):
        take = lambda tree: jax.tree.map(lambda a: a[i], tree)
        assert max_error(value, numpy_head(take(params), take(spectral), features[i])) < 1e-5
    with pytest.raises(ValueError, match="1 features for 2 heads"):
        heads.apply(params, spectral, features[:1])


def test_heads_in_bfloat16():
    """The heads are near those of float32, forward and back, with no float32 product of
    activations.

    Fails when windows or logits are multiplied in the dtype of the norm, and when gradients of
    parameters are rounded to bfloat16.
    """
    heads, params, spectral = random_heads()
    features = [normals(16, TOKENS, WIDTH, seed=i) for i in range(HEADS)]

    def slopes(heads):
        loss = lambda params, features: sum(
            jnp.sin(v).sum() for v in heads.apply(params, spectral, features)
        )
        return jax.jit(jax.grad(loss, (0, 1)))

    low = dataclasses.replace(heads, dtype="bfloat16")
    for value, expected in zip(
        jax.jit(low.apply)(params, spectral, features),
        heads.apply(params, spectral, features),
        strict=True,
    ):
        assert value.dtype == jnp.float32 and 1e-4 < max_error(value, expected) < 2e-2
    found, expected = slopes(low)(params, features), slopes(heads)(params, features)
    # A Euclidean error: where an input crosses the kink of LeakyReLU, a single slope differs.
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert relative_error(a, b) < 5e-2
    for name in ("conv_in", "conv_mid", "conv_out"):
        kernel = found[0][name]["kernel"]
        assert relative_error(kernel, expected[0][name]["kernel"]) < 5e-2
        assert not np.array_equal(kernel, np.asarray(kernel, jnp.bfloat16))
    products = re.findall(
        r"stablehlo.dot_general .* : \((.*)\) ->", slopes(low).lower(params, features).as_text()
    )
    vectors = lambda operands: any(
        operand.count("x") == 1 for operand in operands.split(", ")
    )  # of the spectral norm
    assert len(products) >= 9 * HEADS
    assert [p for p in products if "f32" in p and not vectors(p)] == []


def test_adversarial_gradient_reaches_the_student():
    """Compare with differences of the NumPy heads.

    Fails when renoise or _apply_head has a stop_gradient.

    The frozen network is one tanh layer for each head.
    """
    heads, params, spectral = random_heads()
    x0_hat, z, s = (
        normals(4, 3, 4, 2),
        normals(4, 3, 4, 2, seed=1),
        np.float32([0.1, 0.6, 1.2, 1.5]),
    )
    frozen = normals(HEADS, 2, WIDTH, seed=2)

    def loss(x0_hat):
        u = ladd.renoise(x0_hat, z, s).reshape(4, TOKENS, 2)
        features = [jnp.tanh(u @ one) for one in frozen]
        values = heads.apply(params, spectral, features)
        return ladd.generator_loss(values, reduction="code").mean()

    def numpy_loss(x0_hat):
        angle = s.astype(np.float64)[:, None, None, None]
        u = (2 * (np.cos(angle) * x0_hat + np.sin(angle) * z)).reshape(4, TOKENS, 2)
        heads_of = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
        values = [
            numpy_head(heads_of(params, i), heads_of(spectral, i), np.tanh(u @ frozen[i]))
            for i in range(HEADS)
        ]
        return -np.mean(values)

    value, slope = jax.jit(jax.value_and_grad(loss))(x0_hat)
    assert max_error(value, numpy_loss(x0_hat)) < 1e-5
    h, start = 1e-6, x0_hat.astype(np.float64)
    for seed in range(3):
        direction = normals(*x0_hat.shape, seed=10 + seed)
        difference = (numpy_loss(start + h * direction) - numpy_loss(start - h * direction)) / (
            2 * h
        )
        assert abs((slope * direction).sum() / difference - 1) < 1e-3
    by_sample = np.abs(slope).max((1, 2, 3))
    assert (by_sample > 0).all()
