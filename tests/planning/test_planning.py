"""Estimates without the machine: work of traced functions, collectives, and data sheets."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks.harness import launches
from sprint_jax.errors import UserError
from sprint_jax.models import linear_dit
from sprint_jax.ops import depthwise
from sprint_jax.planning import collectives, flops, hardware


def array(*shape):
    """Return an abstract float32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count_flop(function, *args):
    """Return the FLOP of products in a function."""
    return flops.count(function, *args).multiplied


# --- FLOP: a product [B, K] [K, N] is 2 B K N ---

PRODUCT = 2 * 8 * 16 * 16


def test_matmul():
    assert flops.count(jnp.matmul, array(8, 16), array(16, 32)) == flops.Flops(
        matmul=2 * 8 * 16 * 32
    )
    assert count_flop(
        lambda a, b: jnp.einsum("bnhd,bmhd->bhnm", a, b), array(2, 5, 3, 7), array(2, 11, 3, 7)
    ) == (2 * 2 * 3 * 5 * 11 * 7)


def test_elementwise_counts_outputs_reductions_inputs_and_moves_nothing():
    assert flops.count(lambda a: jnp.tanh(a) * a, array(8, 16)) == flops.Flops(
        elementwise=2 * 8 * 16
    )
    assert (
        flops.count(lambda a: jax.lax.reduce_sum_p.bind(a, axes=(0, 1)), array(8, 16)).elementwise
        == 8 * 16
    )
    moves = lambda a: jnp.concatenate([a.T, a.T], 1)[1:].astype(jnp.bfloat16)
    assert flops.count(moves, array(8, 16)) == flops.Flops()


def conv(x, w, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_convolutions():
    """The count is twice outputs x taps x input channels of the group."""
    assert (
        flops.count(conv, array(2, 8, 8, 6), array(3, 3, 6, 10)).convolution
        == 2 * (2 * 8 * 8 * 10) * 9 * 6
    )
    strided = functools.partial(conv, stride=2)
    assert (
        count_flop(strided, array(2, 8, 8, 6), array(3, 3, 6, 10)) == 2 * (2 * 4 * 4 * 10) * 9 * 6
    )
    grouped = functools.partial(conv, groups=3)
    assert (
        count_flop(grouped, array(2, 8, 8, 6), array(3, 3, 2, 12)) == 2 * (2 * 8 * 8 * 12) * 9 * 2
    )


@pytest.mark.parametrize("stride,groups", [(1, 1), (2, 1), (1, 6)])
def test_gradient_of_a_convolution_is_three(stride, groups):
    """Forward pass, input gradient and weight gradient cost the same.

    So they do with strides and groups.
    """
    loss = lambda x, w: jnp.square(conv(x, w, stride, groups)).sum()
    args = array(2, 8, 8, 6), array(3, 3, 6 // groups, 6)
    assert count_flop(jax.value_and_grad(loss, (0, 1)), *args) == 3 * count_flop(loss, *args)


def test_gradient_of_the_depthwise_layer_is_three():
    """The rule for its weights is a linear call with its own transpose.

    It has a branch for each platform.
    """
    loss = lambda x, w: jnp.square(depthwise.depthwise_conv(x, w)).sum()
    args = array(2, 8, 8, 6), array(3, 3, 6)
    assert flops.count(loss, *args).convolution == 2 * (2 * 8 * 8 * 6) * 9
    assert count_flop(jax.value_and_grad(loss, (0, 1)), *args) == 3 * count_flop(loss, *args)
    assert count_flop(lambda x, w: jax.jvp(loss, (x, w), (x, w)), *args) == 3 * count_flop(
        loss, *args
    )


def test_scan_gradient_and_remat():
    """Five layers: their gradient takes three times as much, and recomputing them one more."""

    def loss(x, w, remat):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()

    args = array(8, 16), array(5, 16, 16)
    plain, remat = (functools.partial(loss, remat=r) for r in (False, True))
    assert count_flop(plain, *args) == count_flop(remat, *args) == 5 * PRODUCT
    assert count_flop(jax.value_and_grad(plain, (0, 1)), *args) == 3 * 5 * PRODUCT
    assert count_flop(jax.value_and_grad(remat, (0, 1)), *args) == 4 * 5 * PRODUCT


def test_gradient_beside_a_stopped_jvp():
    """The form of sCM over 3 recomputed layers takes 2 + 4 products for each layer.

    Primal and tangent take 2; forward, recomputed and backward pass take 4.
    """
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    net = lambda w, x: jax.lax.scan(layer, x, w)[0]
    stop = jax.lax.stop_gradient

    def loss(w, x, dx):
        _, tangent = jax.jvp(lambda x: net(stop(w), x), (x,), (dx,))
        out = net(w, x)
        return jnp.square(out - stop(out) - stop(tangent)).mean()

    args = array(3, 16, 16), array(8, 16), array(8, 16)
    assert count_flop(jax.jit(jax.value_and_grad(loss)), *args) == 6 * 3 * PRODUCT


def test_unused_results_are_not_counted():
    def wasteful(a, b):
        _ = jax.jit(jnp.matmul)(a, b)
        return a @ b

    assert count_flop(wasteful, array(8, 16), array(16, 16)) == PRODUCT


def test_branches_loops_and_custom_rules():
    a, w = array(8, 16), array(16, 16)
    dear = lambda a, w: a @ w @ w
    assert (
        count_flop(lambda a, w: jax.lax.cond(a[0, 0] > 0, jnp.matmul, dear, a, w), a, w)
        == 2 * PRODUCT
    )

    @jax.custom_vjp
    def custom(a, w):
        return a @ w

    custom.defvjp(lambda a, w: (a @ w, (a, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    assert count_flop(custom, a, w) == PRODUCT
    assert (
        count_flop(jax.value_and_grad(lambda a, w: jnp.square(custom(a, w)).sum(), (0, 1)), a, w)
        == 3 * PRODUCT
    )

    def until_small(a, w):
        return jax.lax.while_loop(lambda a: jnp.abs(a).max() > 1, lambda a: a @ w, a)

    counted = flops.count(until_small, a, w)
    assert counted.matmul == PRODUCT and counted.unknown_loops == 1
    assert flops.count(dear, a, w).unknown_loops == 0


def test_shard_map_counts_all_devices():
    """The trace contains the part of one device; the count is that of the whole program."""
    mesh = jax.sharding.AbstractMesh(
        (4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.P("data", None)
    mapped = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec, axis_names={"data"}
    )
    # Only "data" is manual: along "fsdp" the body is still whole.
    assert count_flop(mapped, array(8, 16), array(16, 16)) == PRODUCT


def test_unknown_repetition_is_refused():
    solve = lambda a, b: jax.lax.custom_linear_solve(
        lambda x: a @ x, b, lambda matvec, b: b, symmetric=True
    )
    with pytest.raises(UserError, match="custom_linear_solve"):
        flops.count(solve, array(16, 16), array(16))


def test_published_network():
    """One step of SANA-Sprint 0.6B at 1024 px and 300 text tokens: 560.7 GMAC, summed by hand."""
    net = linear_dit.SANA_600M
    params = jax.eval_shape(net.init, jax.random.key(0))
    run = lambda p, x, t, text, mask, guidance: net.apply(p, x, t, text, mask, guidance).velocity
    args = array(1, 32, 32, 32), array(1), array(1, 300, 2304), array(1, 300), array(1)
    counted = flops.count(run, params, *args)
    assert counted.multiplied == pytest.approx(2 * 560.7e9, rel=0.01)
    # The depthwise convolution takes 45 multiply-adds for each token and channel.
    assert counted.convolution == 2 * 45 * 1024 * 1152 * 28


# --- collectives ---

PROGRAM = """
import json, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
sharded = lambda *spec: NamedSharding(mesh, P(*spec))
placed = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharded(*spec))
whole = NamedSharding(mesh, P())

def fsdp(x, w):
    def layer(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None
    return jax.lax.scan(layer, x, w)[0]

def manual(function, *axes):
    options = dict(mesh=mesh, in_specs=P(("data", "fsdp")), check_vma=False)
    return jax.shard_map(function, out_specs=P(*axes), **options)

def rotated(x):
    return jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])

programs = dict(
    fsdp=(fsdp, placed((64, 32), ("data", "fsdp"), None), placed((5, 32, 32), None, "fsdp", None)),
    sum=(manual(lambda x: jax.lax.psum(x, "data"), "fsdp"), placed((800,), ("data", "fsdp"))),
    scatter=(manual(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), ("data", "fsdp")),
             placed((512,), ("data", "fsdp"))),
    exchange=(manual(lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True), ("data", "fsdp")),
              placed((512,), ("data", "fsdp"))),
    shift=(manual(rotated, ("data", "fsdp")), placed((512,), ("data", "fsdp"))),
)
compiled = {name: jax.jit(f).lower(*args).compile() for name, (f, *args) in programs.items()}
print(json.dumps({name: program.as_text() for name, program in compiled.items()}))
"""


@functools.cache
def compiled():
    """Return the HLO text of programs for 8 simulated devices, mesh data 2 x fsdp 4."""
    quick = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_fsdp_gathers_each_layer_in_the_loop():
    text = compiled()["fsdp"]
    expected = [collectives.Collective(kind="all-gather", bytes=32 * 32 * 4, times=5, group_size=4)]
    assert collectives.parse(text) == expected
    assert collectives.totals(expected) == {"all-gather": 5 * 32 * 32 * 4}
    # The trip count from the loop's condition, and a loop without a readable count.
    unnoted = text.replace('"known_trip_count":{"n":"5"}', '"other":{}')
    assert unnoted != text and collectives.parse(unnoted) == expected
    unread = unnoted.replace("direction=LT", "direction=NE")
    assert collectives.parse(unread) == [
        collectives.Collective(
            kind="all-gather", bytes=32 * 32 * 4, times=1, group_size=4, known=False
        )
    ]


@pytest.mark.parametrize(
    "name,kind,size,group",
    [
        ("sum", "all-reduce", 400, 2),
        ("scatter", "reduce-scatter", 256, 4),  # its operand; the result is a quarter
        ("exchange", "all-to-all", 256, 4),
        ("shift", "collective-permute", 256, 2),
    ],
)
def test_single_collectives(name, kind, size, group):
    assert collectives.parse(compiled()[name]) == [
        collectives.Collective(kind=kind, bytes=size, times=1, group_size=group)
    ]


# Output of the TPU compiler, shortened: 16 devices as data 2 x fsdp 8.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=16

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%start.1 (p: bf16[1,128,1024]) -> (bf16[1,128,1024], bf16[1,1024,1024]) {
  %p = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=30, \
replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}, dimensions={1}
  ROOT %t = (bf16[1,128,1024]{2,1,0}, bf16[1,1024,1024]{2,1,0}) tuple(%p, %all-gather.1)
}

%done.1 (q: bf16[1,128,1024]) -> bf16[1,1024,1024] {
  %q = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%q), channel_id=30, \
replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp'}, dimensions={1}
}

%all-reduce-scatter.clone.1 (r: bf16[1024,1024]) -> bf16[128,1024] {
  %r = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.5 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%r), channel_id=5, \
replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = bf16[128,1024]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.5, %zero, %zero), \
dynamic_slice_sizes={128,1024}
}

%wide.body (state: (s32[], bf16[128,1024], /*index=2*/bf16[1024,1024])) -> (s32[], \
bf16[128,1024], bf16[1024,1024]) {
  %state = (s32[]{:T(128)}, bf16[128,1024]{1,0}, /*index=2*/bf16[1024,1024]{1,0}) parameter(0)
  %async-collective-start = (bf16[1,128,1024]{2,1,0:T(8,128)(2,1)S(1)}, \
/*index=1*/bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)}) fusion(%shard), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%start.1
  %async-collective-done = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} fusion(%other), \
kind=kCustom, calls=%done.1
  %fusion.38 = bf16[128,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%grad), kind=kCustom, \
calls=%all-reduce-scatter.clone.1
  ROOT %next = (s32[]{:T(128)}, bf16[128,1024]{1,0}, /*index=2*/bf16[1024,1024]{1,0}) tuple(%i, \
%fusion.38, %w)
}

%wide.condition (state.1: (s32[], bf16[128,1024], /*index=2*/bf16[1024,1024])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[128,1024]{1,0}, /*index=2*/bf16[1024,1024]{1,0}) parameter(0)
  %constant.28 = s32[]{:T(128)} constant(28)
  %counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %constant.28), direction=LT
}

%twice.body (state.2: (s32[])) -> (s32[]) {
  %state.2 = (s32[]{:T(128)}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}) while(%init), condition=%wide.condition, body=%wide.body
}

%scattered (v: f32[64]) -> f32[16] {
  %v = f32[64]{0:T(256)} parameter(0)
  ROOT %rs = f32[16]{0:T(256)} reduce-scatter(%v), channel_id=9, replica_groups=[4,4]<=[16], \
dimensions={0}, \
to_apply=%add
}

%rare (z: pred[100]) -> pred[100] {
  %z = pred[100]{0:T(256)} parameter(0)
  ROOT %all = pred[100]{0:T(256)} all-reduce(%z), channel_id=10, replica_groups={}, to_apply=%add
}

%never (z.1: pred[100]) -> pred[100] {
  ROOT %z.1 = pred[100]{0:T(256)} parameter(0)
}

ENTRY %main.3_spmd (param: f32[4096,128]) -> f32[4096,128] {
  %param = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %outer = (s32[]{:T(128)}) while(%init.1), condition=%unread, body=%twice.body, \
backend_config={"known_trip_count":{"n":"2"}}
  %collective-permute-start = (f32[4096,128]{1,0:T(8,128)}, f32[4096,128]{1,0:T(8,128)S(1)}, \
u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%param), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done = f32[4096,128]{1,0:T(8,128)S(1)} \
collective-permute-done(%collective-permute-start)
  %all-gather-start = ((bf16[16]{0}, u8[2,3]{1,0}), (bf16[128]{0}, \
u8[16,3]{1,0})) all-gather-start(%x, %y), \
channel_id=2, replica_groups=mesh['data'=2,'fsdp'=8] {'data','fsdp':(2)4}, dimensions={0}
  %all-gather-done = (bf16[128]{0}, u8[16,3]{1,0}) all-gather-done(%all-gather-start)
  %all-reduce-start = (f32[8]{0}, s4[8]{0}) all-reduce-start(%m, %n), channel_id=3, \
replica_groups={{0,8}}, \
to_apply=%add
  %all-reduce-done = (f32[8]{0}, s4[8]{0}) all-reduce-done(%all-reduce-start)
  %rs-start = ((f32[64]{0:T(256)}), f32[16]{0:T(256)}, u32[]{:S(2)}) async-start(%k), \
calls=%scattered
  %rs-done = f32[16]{0:T(256)} async-done(%rs-start), calls=%scattered
  %rs-start.1 = ((f32[64]{0:T(256)}), f32[16]{0:T(256)}, u32[]{:S(2)}) async-start(%rs-done), \
calls=%scattered
  %rs-done.1 = f32[16]{0:T(256)} async-done(%rs-start.1), calls=%scattered
  ROOT %chosen = pred[100]{0} conditional(%which, %g, %h), branch_computations={%rare, %never}
}
"""


def test_text_of_a_tpu():
    def one(kind, size, times, group_size, known=True):
        return collectives.Collective(
            kind=kind, bytes=size, times=times, group_size=group_size, known=known
        )

    found = collectives.parse(TPU)
    assert found == [
        one("all-gather", 2 * 1024 * 1024, 2 * 28, 8),  # a chain of fusions on one channel
        one("reduce-scatter", 2 * 1024 * 1024, 2 * 28, 8),
        one("collective-permute", 4 * 4096 * 128, 1, 2),
        one("all-gather", 2 * 128 + 16 * 3, 1, 8),  # the result in (operands, results) of the start
        one("all-reduce", 4 * 8 + 8 // 2, 1, 2),
        one("reduce-scatter", 4 * 64, 1, 4),  # two calls of one computation count twice
        one("reduce-scatter", 4 * 64, 1, 4),
        one("all-reduce", 100, 1, 16, known=False),  # in one branch of two
    ]
    assert collectives.totals(found) == {
        "all-gather": 56 * 2 * 1024 * 1024 + 304,
        "reduce-scatter": 56 * 2 * 1024 * 1024 + 2 * 256,
        "collective-permute": 4 * 4096 * 128,
        "all-reduce": 36 + 100,
    }


@pytest.mark.parametrize(
    "text,device,shape,count",
    [
        ("v5e:16x16", hardware.V5E, (16, 16), 256),
        ("v5p:4x4x4", hardware.V5P, (4, 4, 4), 64),
        ("v6e:2x4", hardware.V6E, (2, 4), 8),
        ("h200:8x8", hardware.H200, (8, 8), 64),
    ],
)
def test_topologies(text, device, shape, count):
    assert hardware.parse_topology(text) == (device, shape, count)


WRONG = (
    "v5e",
    "v5e:",
    "v5e:16",
    "v5e:16x16x16",
    "v5p:4x4",
    "h200:8x0",
    "v5e:-4x4",
    "v5e:4×4",
    "v5e:²x4",
)


@pytest.mark.parametrize("text", WRONG)
def test_wrong_shapes_are_refused_with_an_example(text):
    with pytest.raises(UserError, match="positive numbers, as in (v5e|v5p|h200):4x4") as caught:
        hardware.parse_topology(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_devices_are_refused_with_the_known():
    with pytest.raises(UserError, match="'v9'.*v5e, v5p, v6e, h100, h200, a100"):
        hardware.parse_topology("v9:4x4")


def test_data_sheets_have_plausible_units():
    """Values are within the range of today's machines.

    One in GB, TFLOP or Gbit would be far outside.
    """
    for d in hardware.DEVICES:
        assert 1e14 < d.peak_bf16 < 1e16, d
        assert 1e10 < d.memory < 1e12, d
        assert 5e11 < d.bandwidth < 1e13, d
        assert 1e10 < d.outside <= d.link < d.bandwidth, d
        assert 100 < d.peak_bf16 / d.bandwidth < 1000, d


GPU_SUM = """HloModule jit_step, num_partitions=8

ENTRY %main (p: f32[100], q: bf16[7]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %q = bf16[7]{0} parameter(1)
  %all-reduce-start.1 = ((f32[100]{0}, bf16[7]{0}), (f32[100]{0}, \
bf16[7]{0})) all-reduce-start(%p, %q), channel_id=1, \
replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}, to_apply=%add
  %all-reduce-done.1 = (f32[100]{0}, bf16[7]{0}) all-reduce-done(%all-reduce-start.1)
  %all-reduce-start.2 = (f32[100]{0}, bf16[7]{0}) all-reduce-start(%p, %q), channel_id=2, \
replica_groups={}, to_apply=%add
  %all-reduce-done.2 = (f32[100]{0}, bf16[7]{0}) all-reduce-done(%all-reduce-start.2)
  ROOT %out = f32[100]{0} get-tuple-element(%all-reduce-done.1), index=0
}
"""


def test_sums_of_gpus_are_not_counted_twice():
    """The start of one GPU has operands and results, and that of another only results.

    Fails when both count.
    """
    found = [c.bytes for c in collectives.parse(GPU_SUM)]
    assert found == [414, 414]


# --- launches of a program on a GPU ---


GPU_TEXT = """HloModule jit_run, entry_computation_layout={()->f32[]}

%fused_silu (p0: bf16[8,4], p1: f32[4]) -> bf16[8,4] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  ROOT %silu = bf16[8,4]{1,0} multiply(%p0, %p0)
}

%fused_slice (p0.1: f32[5,16], p1.1: s32[]) -> f32[1,16] {
  %p0.1 = f32[5,16]{1,0} parameter(0)
  %flat = f32[5,16]{1,0} bitcast(%p0.1)
  %p1.1 = s32[] parameter(1)
  ROOT %row = f32[1,16]{1,0} dynamic-slice(%flat, %p1.1, %p1.1), dynamic_slice_sizes={1,16}
}

%fused_update (p0.2: f32[5,16], p1.2: f32[1,16], p2.2: s32[]) -> f32[5,16] {
  %p0.2 = f32[5,16]{1,0} parameter(0)
  %p1.2 = f32[1,16]{1,0} parameter(1)
  %p2.2 = s32[] parameter(2)
  ROOT %new = f32[5,16]{1,0} dynamic-update-slice(%p0.2, %p1.2, %p2.2, %p2.2)
}

%gemm_computation (p0.3: bf16[8,4], p1.3: bf16[4,4]) -> f32[8,4] {
  %p0.3 = bf16[8,4]{1,0} parameter(0)
  %p1.3 = bf16[4,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%p0.3, %p1.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[5,16])) -> (s32[], f32[5,16]) {
  %state = (s32[], f32[5,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[5,16]{1,0} get-tuple-element(%state), index=1
  %one = f32[1,16]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %start = ((f32[5,16]{1,0}, f32[1,16]{1,0}, s32[]), f32[5,16]{1,0}, u32[]) fusion-start(%stack, \
%one, %i), kind=kLoop, calls=%fused_update
  %done = f32[5,16]{1,0} fusion-done(%start)
  ROOT %next = (s32[], f32[5,16]{1,0}) tuple(%i, %done)
}

%condition (state.1: (s32[], f32[5,16])) -> pred[] {
  %state.1 = (s32[], f32[5,16]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (x: bf16[8,4], w: bf16[4,4], b: f32[4], stack: (s32[], f32[5,16])) -> f32[5,16] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4,4]{1,0} parameter(1)
  %b = f32[4]{0} parameter(2)
  %stack.2 = (s32[], f32[5,16]{1,0}) parameter(3)
  %a = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(run)/dot_general"}
  %c = f32[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm_computation, \
backend_config={"kind":"__triton_nested_gemm_fusion"}
  %d = bf16[8,4]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton"
  %e = bf16[8,4]{1,0} fusion(%x, %b), kind=kLoop, calls=%fused_silu, \
metadata={op_name="jit(run)/silu"}
  %f = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%x, %w), custom_call_target="__cudnn$convForward"
  %loop = (s32[], f32[5,16]{1,0}) while(%stack.2), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  ROOT %out = f32[5,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_launches():
    """Bytes are computed by hand.

    Fails when a slice counts as the whole, unread data as read, a start and its done as two, and a
    loop once.
    """
    found = launches.parse(GPU_TEXT)
    x, w, wide, row = 8 * 4 * 2, 4 * 4 * 2, 8 * 4 * 4, 16 * 4
    assert [(f.kind, f.bytes, f.times) for f in found] == [
        ("product", x + w + wide + 64, 1),
        ("product by Triton", x + w + wide, 1),
        ("kernel", 2 * x, 1),
        ("pass", 2 * x, 1),
        ("convolution", 2 * x + w, 1),
        ("pass", row + row + 4, 7),
        ("pass", row + row + 4, 7),
    ]
    assert [(f.shape, f.source) for f in found[:1]] == [("f32[8,4]", "jit(run)/dot_general")]
    assert launches.totals(found)["pass"] == (15, 2 * x + 14 * (2 * row + 4))
    assert launches.parse("") == []
