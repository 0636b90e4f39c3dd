"""The benchmark command: its arithmetic against known tables, its rows, and its peers."""

import dataclasses
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import bench as bench_lib
from benchmarks.harness import floors, machine, operations, rows, subjects, suites, timing, training
from sprint_jax.models import dc_ae, linear_dit
from sprint_jax.models.gemma2 import GEMMA2_2B
from sprint_jax.ops import cross_attention, linear_attention
from sprint_jax.ops.pallas import kernel as kernel_lib
from sprint_jax.planning import flops

SANA_600M = dataclasses.replace(linear_dit.SANA_600M, logvar_head=False)
SANA_1600M = dataclasses.replace(linear_dit.SANA_1600M, logvar_head=False)
HEADS = (2, 8, 14, 19)


# --- floors: the published sizes at 1024 px and 300 text tokens, summed by hand ---


def near_table(value):
    """Return an approximation: tables by hand are rounded to three or four digits."""
    return pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize(
    "model,gigaflop,weights,activations",
    [(SANA_600M, 1121, 1.18e9, 2.6e9), (SANA_1600M, 2967, 3.21e9, 3.7e9)],
)
def test_transformer_floor(model, gigaflop, weights, activations):
    work = floors.transformer(model, 1024, 300, itemsize=2)
    assert work.flop == near_table(gigaflop * 1e9)
    assert 2 * floors.parameters(model) == pytest.approx(weights, rel=0.01)
    assert work.bytes == pytest.approx(weights + activations, rel=0.015)
    ten = floors.transformer(model, 1024, 300, batch=10, itemsize=2)
    assert ten.flop == 10 * work.flop
    assert ten.bytes < 10 * work.bytes  # weights are read once


def test_decoder_floor():
    decode = lambda **options: floors.decoder(dc_ae.DCAE_F32C32, 32, 32, itemsize=2, **options)
    plain = decode(subpixel=False)
    assert plain.flop == near_table(8369e9)
    assert plain.bytes == pytest.approx(12.4e9, rel=0.01)
    ups = 2 * (38.7 + 77.3 + 154.6 + 309.2 + 309.2) * 1e9
    assert decode().flop == near_table(8369e9 - 5 / 9 * ups)
    assert floors.parameters(dc_ae.DCAE_F32C32, "decoder") == near_table(159e6)
    # All work is proportional to the latent cells.
    assert floors.decoder(dc_ae.DCAE_F32C32, 16, 16, itemsize=2).flop == pytest.approx(
        decode().flop / 4
    )


def test_text_floor():
    assert floors.gemma(GEMMA2_2B, 300, itemsize=2).flop == near_table(1234e9)
    assert floors.gemma(GEMMA2_2B, 512, itemsize=2).flop == near_table(2129e9)
    behind = floors.gemma(GEMMA2_2B, 312, prefix=200, itemsize=2).flop
    assert (
        behind
        < floors.gemma(GEMMA2_2B, 512, itemsize=2).flop
        - floors.gemma(GEMMA2_2B, 200, itemsize=2).flop
    )


@pytest.mark.parametrize(
    "model,generator,discriminator", [(SANA_600M, 11.9, 4.48), (SANA_1600M, 33.5, 15.44)]
)
def test_training_floor(model, generator, discriminator):
    """TFLOP for each sample. The tangent shares its value with the differentiated pass."""
    made = lambda step: step(model, 1024, 300, HEADS, batch=16, itemsize=2).flop / 16e12
    assert made(floors.generator_step) == pytest.approx(generator, rel=5e-3)
    assert made(floors.discriminator_step) == pytest.approx(discriminator, rel=5e-3)


def test_floor_is_the_slower_of_arithmetic_and_memory():
    rates = floors.Rates(flop=100.0, bytes=10.0)
    assert floors.seconds(floors.Work(200.0, 10.0), rates) == 2.0
    assert floors.seconds(floors.Work(200.0, 50.0), rates) == 5.0
    # The published one-step picture at 300 text tokens on an H200: 13.6 ms with plain
    # up-convolutions.
    stages = (
        floors.transformer(SANA_600M, 1024, 300, itemsize=2),
        floors.gemma(GEMMA2_2B, 300, itemsize=2),
    )
    total = (
        stages[0]
        + stages[1]
        + floors.decoder(dc_ae.DCAE_F32C32, 32, 32, itemsize=2, subpixel=False)
    )
    assert total.flop / floors.H200_BFLOAT16.flop == pytest.approx(13.6e-3, rel=5e-3)


TINY = dataclasses.replace(
    SANA_600M,
    in_channels=8,
    width=32,
    depth=2,
    heads=4,
    cross_heads=2,
    text_dim=36,
    remat="none",
    dtype="float32",
)
_BLOCKS = [dc_ae.RESIDUAL] * 3 + [dc_ae.EFFICIENT_VIT] * 3
_STAGES = tuple(
    dc_ae.Stage(c, 1, block, (5,) if block == dc_ae.EFFICIENT_VIT else ())
    for c, block in zip((8, 16, 16, 16, 32, 32), _BLOCKS, strict=True)
)
TINY_AE = dc_ae.DCAE(
    in_channels=3,
    latent_channels=8,
    head_dim=8,
    encoder=_STAGES,
    decoder=_STAGES,
    scaling_factor=0.4,
)


def array(*shape):
    """Return an abstract float32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_floors_count_what_the_programs_do():
    """Compare the formulas with the traced operations of networks of other shapes."""
    params = jax.eval_shape(TINY.init, jax.random.key(0))
    run = lambda *args: TINY.apply(*args).velocity
    counted = flops.count(
        run, params, array(3, 5, 5, 8), array(3), array(3, 7, 36), array(3, 7), array(3)
    )
    assert floors.transformer(TINY, 25, 7, batch=3, itemsize=4).flop == pytest.approx(
        counted.multiplied, rel=0.02
    )
    params = jax.eval_shape(TINY_AE.init, jax.random.key(0))
    counted = flops.count(TINY_AE.decode, params, array(2, 8, 8, 8))
    # The sub-pixel convolutions compute one row and one column more than needed.
    made = floors.decoder(TINY_AE, 8, 8, batch=2, itemsize=4).flop
    assert made <= counted.multiplied
    assert made == pytest.approx(counted.multiplied, rel=0.05)


@pytest.mark.parametrize("derivative", ["forward", "jvp", "sprint"])
def test_attention_floors_count_what_the_programs_do(derivative):
    """The backward pass of a stopped tangent is not computed; it would be several more."""
    derive, times = subjects._DERIVATIVES[derivative]
    tokens, weights = array(2, 64, 96), jnp.ones(32)
    plain = lambda qkv: linear_attention.attend(qkv, weights, weights, heads=4, eps=1e-5)
    counted = flops.count(derive(plain, 1), tokens, tokens).multiplied
    assert floors.linear_attention(64, 32, 8, batch=2, itemsize=4).flop * times[2] == pytest.approx(
        counted, rel=0.15
    )
    texts = [array(2, 64, 4, 8), array(2, 24, 4, 8), array(2, 24, 4, 8)]
    plain = lambda q, k, v: cross_attention.attend(q, k, v, jnp.ones((2, 24)))
    forward = floors.cross_attention(64, 24, 32, batch=2, itemsize=4).flop
    for sides, moving in ((1, 1), (2, 3)):
        counted = flops.count(derive(plain, 3), *texts, *texts[:moving]).multiplied
        assert forward * times[sides] == pytest.approx(counted, rel=0.01)


# --- times and rows ---


def scripted_clock(durations):
    """Return (clock, programs by name).

    Each call moves the clock by its next duration.
    """
    now, order = [0.0], []

    def call(name):
        def start():
            now[0] += durations[name].pop(0)
            order.append(name)

        return timing.Call(start, lambda result: None)

    return (lambda: now[0]), call, order


def test_programs_take_turns_and_warm_up_is_left_out():
    clock, call, order = scripted_clock({"a": [50.0, 1.0, 4.0, 2.0], "b": [60.0, 8.0, 6.0, 7.0]})
    programs = {name: timing.Program({"": call(name)}) for name in "ab"}
    times = timing.alternate(programs, 3, clock=clock)
    assert order == list("ab" * 4)
    assert times["a"].total == [1.0, 4.0, 2.0]
    assert timing.middle(times["a"].total) == 2.0
    assert timing.spread(times["b"].total) == [6.0, 8.0]
    assert timing.middle(times["b"].total) == 7.0


def test_short_calls_are_repeated_back_to_back():
    clock, call, order = scripted_clock({"a": [9.0, 0.5, *[0.25] * 8]})
    times = timing.alternate({"a": timing.Program({"": call("a")})}, 2, shortest=2.0, clock=clock)
    assert times["a"].total == [0.25, 0.25] and len(order) == 10
    assert timing.burst(0.3, 1.0) == 4
    assert timing.burst(5.0, 1.0) == 1
    assert timing.burst(0.0, 1.0) == 200


def test_a_program_of_several_calls_is_their_sum():
    times = timing.Times({"generator": [3.0, 5.0], "discriminator": [1.0, 2.0]})
    assert times.total == [4.0, 7.0]


WHERE = dict(device="a device", threads=2, jax="0", commit="abc")


def test_rows_have_all_keys(tmp_path):
    ours, peer = timing.Times({"": [2.0, 3.0, 9.0]}), timing.Times({"": [4.0, 5.0, 6.0]})
    row = rows.filled(rows.empty("x", WHERE, peer="theirs", floor_s=1.5), ours, peer)
    assert (row.ours_s, row.peer_s, row.ratio, row.spread) == (3.0, 5.0, 0.6, [2.0, 9.0])
    alone = rows.filled(rows.empty("y", WHERE), ours, None)
    rows.write(tmp_path / "rows.json", [row, alone])
    first, second = json.loads((tmp_path / "rows.json").read_text())
    promised = {
        "name",
        "device",
        "ours_s",
        "peer",
        "peer_s",
        "ratio",
        "floor_s",
        "spread",
        "jax",
        "commit",
        "error",
    }
    assert promised <= first.keys() == second.keys()
    assert first["ratio"] == 0.6
    assert first["floor_s"] == 1.5
    assert first["error"] is None
    assert second["peer"] is second["peer_s"] is second["ratio"] is second["floor_s"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    table = rows.table([row, alone]).splitlines()
    assert "| x | 3 s | 2 s to 9 s | theirs | 5 s | 0.60 | 1.5 s | 2.0 |  |" in table


def without_times(result):
    """Return a result without its times."""
    return timing.Program({"": timing.Call(lambda: None, lambda r: None)}, lambda: np.array(result))


def make_bench(**changes):
    """Return a bench with changes."""
    made = bench_lib.Bench(2)
    made.rates = lambda dtype: floors.Rates(1e9, 1e9)
    vars(made).update(changes)
    return made


def test_failures_are_rows_and_other_cases_continue():
    def broken():
        raise RuntimeError("out of memory\nand a second line")

    def absent():
        raise bench_lib.NoPeer("no peer: nothing here")

    def case(*peers):
        work = floors.Work(2e9, 0.0)
        options = dict(compile_s=0.5, dtype="float32", work=work, peers=peers)
        return bench_lib.Case(
            "c", lambda bench: bench_lib.Subject(program=without_times([3.0, 4.0]), **options)
        )

    def measured(*peers):
        return bench_lib.measure(case(*peers), make_bench())

    good = "good", lambda: without_times([3.0, 5.0])
    failed, whole = measured(("bad", broken), good)
    assert failed.error == "RuntimeError: out of memory"
    assert failed.ours_s is not None
    assert failed.peer_s is None
    assert whole.error is None
    assert whole.ratio is not None
    assert whole.floor_s == 2.0
    assert whole.compile_s == 0.5
    assert whole.difference == pytest.approx(1 / 34**0.5)
    (alone,) = measured(("one", absent), ("two", absent))
    assert alone.peer is None
    assert alone.note == "no peer: nothing here"
    assert alone.error is None
    assert alone.ours_s is not None
    (gone,) = bench_lib.measure(bench_lib.Case("c", lambda bench: broken()), make_bench())
    assert gone.error == "RuntimeError: out of memory" and gone.ours_s is None


def test_a_peer_that_fails_late_keeps_our_times():
    """One peer runs once and then fails, and the second step of another fails.

    Fails when an error of a peer between the measurements ends them, and when a peer is built
    before ours has run.
    """
    order = []

    def ours():
        order.append("ours")
        return np.array([1.0])

    def later(count):
        order.append("peer")
        calls = iter(range(count))
        return timing.Program(
            {"": timing.Call(lambda: next(calls), lambda r: None)}, lambda: np.array([1.0])
        )

    def never():
        raise RuntimeError("no memory for a step")

    steps = {
        "generator": timing.Call(lambda: None, lambda r: None),
        "discriminator": timing.Call(never, lambda r: None),
    }
    subject = bench_lib.Subject(
        program=timing.Program({"": timing.Call(lambda: None, lambda r: None)}, ours),
        compile_s=0.5,
        dtype="float32",
        work=None,
        peers=(("two steps", lambda: timing.Program(steps)), ("tires", lambda: later(1))),
    )
    second, tired = bench_lib.measure(bench_lib.Case("c", lambda bench: subject), make_bench())
    assert order == ["ours", "peer"]
    assert second.error == "RuntimeError: no memory for a step"
    assert tired.error.startswith("StopIteration")
    assert None not in (second.ours_s, tired.ours_s)
    assert second.peer_s is tired.peer_s is None


def test_operations_are_summed_by_name():
    """Two streams overlap: parallel operations count as busy once, and gaps as waiting.

    Fails when busy is the sum, and when a wait begins where the last stream to start ended.
    """
    events = [("b", 3.0, 4.0), ("a", 0.0, 2.0), ("b", 1.0, 2.5), ("a", 6.0, 7.0)]
    found = operations.summary(events, runs=2)
    assert (found.busy, found.wall) == (4.5 / 2, 7.0 / 2)
    assert found.waits == (2.0, 0.5)
    assert found.operations == (
        operations.Operation("a", 1.5, 1.0),
        operations.Operation("b", 1.25, 1.0),
    )
    assert "| a | 1.5e+03 | 66.7% | 1 |" in operations.table(found, 1)
    assert "| b |" not in operations.table(found, 1)
    with pytest.raises(ValueError, match="no operation"):
        operations.summary([], 1)


def test_operations_of_a_program_are_found():
    """A product of this size is most of its program's time, whatever XLA calls it.

    Fails when host events are counted.
    """
    a = jax.random.normal(jax.random.key(0), (600, 600))
    f, told = jax.jit(lambda a: (a @ a).sum()), []
    subject = lambda bench: bench_lib.Subject(
        program=bench_lib.program(f, a), compile_s=None, dtype="float32", work=None
    )
    (row,) = bench_lib.measure(
        bench_lib.Case("product", subject), make_bench(operations=3, say=told.append)
    )
    assert row.error is None
    assert len(told) == 1
    assert told[0].startswith("product: device busy")
    found = operations.profile(lambda: jax.block_until_ready(f(a)), runs=4)
    assert found.operations[0].count == pytest.approx(1, abs=0.3)
    assert found.operations[0].seconds > 0.3 * found.busy
    assert not [o for o in found.operations if "Execute" in o.name or "python" in o.name]


def test_launch_time_of_a_call():
    """A start moves the clock by 2 and a wait by 5; three in a row wait once.

    Fails when a single run is counted from the end of its start.
    """
    now = [0.0]
    moved = lambda by: now.__setitem__(0, now[0] + by)
    call = timing.Call(lambda: moved(2.0), lambda result: moved(5.0))
    assert timing.launching(call, 3, clock=lambda: now[0]) == timing.Launching(2.0, 7.0, 11 / 3)


def test_missing_peers_are_one_sentence():
    with pytest.raises(bench_lib.NoPeer, match="benchmarks/ folder"):
        make_bench().peers("no_such_module")


def test_suites_have_their_documented_names():
    names = {case.name for case in suites.cpu()}
    assert {"transformer_0.6b", "dcae_decode_512", "sprint_pair_embedded"} <= names
    assert {"transformer_0.6b", "dcae_decode_512", "sprint_pair_embedded"} <= {
        case.name for case in suites.gpu()
    }
    for suite in (
        suites.cpu(),
        suites.gpu(),
        suites.kernels("cpu"),
        suites.kernels("gpu"),
        suites.kernels("tpu"),
    ):
        assert len({case.name for case in suite}) == len(suite)


def test_bad_flags_are_one_line(command, tmp_path):
    flags = {
        "--suite=cpu": ["--only=dcae*,nothing_like_it"],
        "--suite": ["--out=x.json"],
        "--only=": ["--suite=cpu", "--only="],
        "--repeats=0": ["--suite=cpu", "--repeats=0"],
        f"--out={tmp_path}/missing/x.json": ["--suite=cpu", f"--out={tmp_path}/missing/x.json"],
        "--out=x.txt": ["--suite=cpu", "--out=x.txt"],
    }
    flags["--suite=cpu"].append("--suite=cpu")
    for named, words in flags.items():
        result = command("benchmarks", *words)
        assert result.returncode == 2 and result.stdout == "", words
        assert result.stderr.startswith("error: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert named in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_its_rows(command, tmp_path):
    out = tmp_path / "rows.json"
    result = command(
        "benchmarks",
        "--suite=kernels",
        "--only=linear_attention_0.6b_1024_forward*",
        "--repeats=1",
        f"--out={out}",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (row,) = json.loads(out.read_text())
    assert row["name"] == "linear_attention_0.6b_1024_forward_batch1"
    assert row["ours_s"] > 0
    assert row["floor_s"] > 0
    assert "| linear_attention_0.6b_1024_forward_batch1 |" in result.stdout


# --- the peers compute the same ---


@pytest.fixture
def one_thread(monkeypatch):
    """Let PyTorch use one thread."""
    monkeypatch.setattr(machine, "threads", lambda: 1)


def difference(case):
    """Return the relative difference between our result and the peer's."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    (row,) = bench_lib.measure(bench_lib.Case("c", case), make_bench())
    assert row.error is None and row.ratio is not None, row
    return row.difference


def test_peers_of_the_components(one_thread):
    assert (
        difference(lambda b: subjects.transformer(b, TINY, 4, dtype="float32", tokens=9, batch=2))
        < 1e-5
    )
    assert difference(lambda b: subjects.decoder(b, TINY_AE, 3, dtype="float32", batch=2)) < 1e-5


def test_peer_of_the_whole_image(one_thread):
    """Text after its cached prefix against the padded full pass, two steps and the decoder.

    Pixels may round either way.
    """
    text = dataclasses.replace(
        GEMMA2_2B, vocab=100, width=36, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=40
    )
    short = dict(dtype="float32", batch=2, prefix=5, tokens=7, published_tokens=12)
    assert difference(lambda b: subjects.picture(b, text, TINY, TINY_AE, 3, 2, **short)) < 1e-3


def test_layers_are_compiled_in_a_copy(monkeypatch):
    """The peer is timed with and without torch.compile, so its own layers must not change."""
    torch = pytest.importorskip("torch")
    peers = pytest.importorskip("benchmarks.peers")
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: seen.append(module))
    whole = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
    )
    copied = peers._by_layer(whole, whole[1])
    assert seen == list(copied[1]) and not set(seen) & set(whole.modules())
    for mine, theirs in zip(copied.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_sketch_is_encoded_and_its_copies_are_counted(one_thread):
    """A ControlNet with one of two blocks is measured without a peer.

    The floor has half a transformer more.
    """
    text = dataclasses.replace(
        GEMMA2_2B, vocab=100, width=36, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=40
    )
    short = dict(dtype="float32", prefix=5, tokens=7)
    with mock.patch.object(
        bench_lib, "compiled", return_value=(None, 0.0)
    ):  # its work is counted without it
        plain = subjects.picture(make_bench(), text, TINY, TINY_AE, 3, 1, **short).work
    built = []
    case = bench_lib.Case(
        "c",
        lambda b: (
            built.append(subjects.picture(b, text, TINY, TINY_AE, 3, 1, control_depth=1, **short))
            or built[-1]
        ),
    )
    (row,) = bench_lib.measure(case, make_bench())
    assert row.error is None
    assert row.peer is None
    assert row.ours_s > 0
    copies = floors.transformer(
        dataclasses.replace(TINY, guidance_embed=False), 9, 8, itemsize=4, blocks=1
    )
    assert built[-1].work.flop == pytest.approx(plain.flop + copies.flop)


def test_an_image_by_kernels():
    """Both transformer and autoencoder; there is no peer.

    Fails when one of them stays plain, and when heads of the autoencoder are mixed.
    """
    text = dataclasses.replace(
        GEMMA2_2B, vocab=100, width=36, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=40
    )
    build = functools.partial(
        subjects.picture,
        make_bench(),
        text,
        TINY,
        TINY_AE,
        3,
        1,
        dtype="float32",
        prefix=5,
        tokens=7,
    )
    with mock.patch.object(kernel_lib, "launch", wraps=kernel_lib.launch) as launch:
        plain, kernels = build(), build(attention="interpret")
    names = {call.kwargs["name"] for call in launch.call_args_list}
    assert names == {"cross_attention", "linear_attention_state", "linear_attention_out"}
    assert not kernels.peers
    widths = {
        call.args[3]["out"].array.shape[-1]
        for call in launch.call_args_list
        if call.kwargs["name"] == "linear_attention_out"
    }
    assert len(widths) > 1  # of the transformer and of the autoencoder
    assert (
        np.abs(plain.program.result().astype(int) - kernels.program.result().astype(int)).max() <= 1
    )


def test_three_programs_generate_the_same_image():
    """With a ControlNet, whose sketch the autoencoder encodes.

    Fails when one gets the parameters of another.
    """
    text = dataclasses.replace(
        GEMMA2_2B, vocab=100, width=36, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=40
    )
    short = dict(dtype="float32", prefix=5, tokens=7, control_depth=1)
    build = functools.partial(subjects.picture, make_bench(), text, TINY, TINY_AE, 3, 2, **short)
    one, three = build(), build(staged=True)
    assert not three.peers
    assert np.abs(one.program.result().astype(int) - three.program.result().astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["cross", "linear", "depthwise"])
def test_every_tile_gives_the_same_result(kernel):
    """All tiles that a search on a GPU may choose give the same result, interpreted.

    The larger tiles do not divide the sides. Fails when a kernel relies on the tiles in use, and
    when a choice does not reach its kernel.
    """
    from benchmarks import tiles

    module, every = tiles.CHOICES[kernel]
    choices = [choice for choice in every if not {"WARPS", "STAGES"} & set(choice)][
        :3
    ]  # an interpreter has none
    if kernel == "depthwise":
        choices = [{}, {"ROWS": 8, "CHANNELS": (32, 16)}]
        assert all(choice in every for choice in choices)
    small = tiles.subject(kernel, "interpret", 1, tokens=324, text=150, width=288, hidden=128)
    with (
        mock.patch.object(kernel_lib, "launch", wraps=kernel_lib.launch) as launch,
        mock.patch.dict(tiles.CHOICES, {kernel: (module, choices)}),
    ):
        found = tiles.search(kernel, small, lambda line: None, rounds=1, shortest=0)
    assert len(found) == len(choices) and all(len(of) == 3 for of in found.values())
    assert max(difference for of in found.values() for _, difference in of.values()) < 2e-2
    grids = {(call.kwargs["name"], call.args[1]) for call in launch.call_args_list}
    assert len(grids) > len({name for name, _ in grids})


@pytest.mark.slow
def test_the_torch_pair_is_the_same_computation():
    """Compare losses and gradient norms of both steps, with our weights and draws.

    Each variant of PyTorch is compared.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from benchmarks import torch_pair

    c = training.card("smoke", training.published_losses)
    stage, frozen, state, batch = training.start(c)
    names = ("generator", "loss", "grad_norm"), ("discriminator", "disc", "disc_grad_norm")
    ours = []
    for step, (_, loss, norm) in zip(stage.functions, names, strict=True):
        report = jax.jit(step)(state, frozen, batch)[1]
        ours += [report.scalars[loss], report.norms[norm]]
    theirs = torch_pair.batch_of_ours(batch)
    for choice in torch_pair.CHOICES:
        pair = torch_pair.of_ours(c, frozen, state, choice)
        made = []
        for name, loss, parameters in (
            ("generator", pair.generator_loss, pair.trained),
            ("discriminator", pair.discriminator_loss, list(pair.heads.parameters())),
        ):
            drawn = torch_pair.to_torch(
                torch_pair.draws_of_ours(c, 0, np.asarray(batch["latent"]), name)
            )
            value = loss(theirs, drawn)
            gradients = torch.autograd.grad(value, parameters)
            made += [value.item(), torch.sqrt(sum(g.square().sum() for g in gradients)).item()]
        np.testing.assert_allclose(made, np.array(ours, np.float64), rtol=1e-4)
