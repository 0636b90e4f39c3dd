"""Encoded data sets: reading, the order of examples, and damage that is skipped or named."""

import hashlib
import itertools
import json
import multiprocessing
import pickle
import time
import warnings

import numpy as np
import pytest
import safetensors

from helpers.records import MANIFEST_FIELDS, is_readable, numbered_record
from sprint_jax.data import batches, encoded
from sprint_jax.errors import UserError

pytestmark = pytest.mark.second_pass


def write_set(folder, groups, kind="tokens", split="train"):
    """Write a data set of one shard for each list of (number, shape) in `groups`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = lambda i: folder / f"{split}-{i:05d}.array_record"
    shards = [
        encoded.write_shard(name(i), [numbered_record(*r, kind) for r in group])
        for i, group in enumerate(groups)
    ]
    changes = dict(text="features", text_dim=5) if kind == "text" else {}
    encoded.write_manifest(folder / "manifest.json", MANIFEST_FIELDS | changes, shards)
    return folder


def write_mixed_set(folder, kind="tokens"):
    """Write examples 0 to 22 of 4x4 and 23 to 31 of 2x8 to four shards of eight."""
    numbered = [(i, (4, 4) if i < 23 else (2, 8)) for i in range(32)]
    return write_set(folder, [numbered[i::4] for i in range(4)], kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a data set of two sizes."""
    return write_mixed_set(tmp_path_factory.mktemp("encoded") / "set")


@pytest.fixture(scope="module")
def data(folder):
    """Return the training split of that data set."""
    return encoded.Encoded(folder, "train")


def numbers(arrays):
    """Return the numbers of a batch's records."""
    return arrays["latent"][:, 0, 0, 0].astype(int).tolist()


# --- records ---


@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_written_records_are_read(tmp_path, kind):
    data = encoded.Encoded(write_mixed_set(tmp_path / "set", kind), "train")
    assert len(data) == 32 and data.buckets == [(2, 8), (4, 4)]
    seen = []
    for index in range(32):
        read = data.read(index)
        number = int(read["latent"][0, 0, 0])
        expected = numbered_record(number, data.buckets[data.bucket_of[index]], kind)
        assert read["latent"].dtype == np.float32
        assert read[kind].dtype == expected[kind].dtype
        for name in expected:
            np.testing.assert_array_equal(read[name], expected[name])
        seen.append(number)
    assert sorted(seen) == list(range(32))
    assert data.describe(9) == f"record 1 of {tmp_path / 'set'}/train-00001.array_record"


def test_the_manifest_entry_of_a_shard(tmp_path):
    path = tmp_path / "heldout-00007.array_record"
    entry = encoded.write_shard(
        path, [numbered_record(1, (4, 4)), numbered_record(2, (2, 8)), numbered_record(3, (4, 4))]
    )
    content = path.read_bytes()
    assert entry == {
        "file": "heldout-00007.array_record",
        "split": "heldout",
        "records": 3,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "buckets": {"2x8": 1, "4x4": 2},
    }
    again = tmp_path / "heldout-00008.array_record"
    assert (
        encoded.write_shard(
            again, [numbered_record(2, (2, 8)), numbered_record(1), numbered_record(3)]
        )["sha256"]
        == entry["sha256"]
    )


def test_a_shard_is_complete_or_absent(tmp_path):
    with pytest.raises(safetensors.SafetensorError):
        bad = numbered_record(2) | {"caption": np.array("text")}
        encoded.write_shard(tmp_path / "train-00000.array_record", [numbered_record(1), bad])
    assert list(tmp_path.iterdir()) == []


def test_counts_and_splits(tmp_path):
    shards = [
        encoded.write_shard(
            tmp_path / "train-00000.array_record", [numbered_record(1), numbered_record(2)]
        ),
        encoded.write_shard(tmp_path / "heldout-00000.array_record", [numbered_record(3)]),
    ]
    skipped = [{"key": str(i), "reason": "undecodable image"} for i in range(1200)]
    encoded.write_manifest(tmp_path / "manifest.json", MANIFEST_FIELDS, shards, skipped, 1500)
    heldout = encoded.Encoded(tmp_path, "heldout")
    assert heldout.manifest["counts"] == {"train": 2, "heldout": 1, "skipped": 1500}
    assert len(heldout.manifest["skipped"]) == 1000 and heldout.manifest["format"] == 1
    assert len(heldout) == 1 and heldout.read(0)["latent"][0, 0, 0] == 3
    with pytest.raises(UserError, match="'test': use one of train, heldout"):
        encoded.Encoded(tmp_path, "test")


def test_a_pickled_data_set_opens_its_own_files(data):
    blob = pickle.dumps(data)
    assert len(blob) < 1000
    again = pickle.loads(blob)
    np.testing.assert_array_equal(again.read(5)["latent"], data.read(5)["latent"])
    np.testing.assert_array_equal(again.bucket_of, data.bucket_of)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "_OPEN", 2)
    data = encoded.Encoded(write_set(tmp_path / "set", [[(i, (4, 4))] for i in range(6)]), "train")
    for index in (0, 5, 3, 0, 1, 2, 5, 4):
        assert data.read(index)["latent"][0, 0, 0] == index and len(data._readers) <= 2


# --- what is not a data set ---


def edit_manifest(folder, change):
    """Apply `change` to the manifest of a data set."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda f: (f / "manifest.json").unlink(),
            "no .*manifest.json: give a folder made by sprint-jax encode",
        ),
        (lambda f: (f / "manifest.json").write_text('{"format": 1,'), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (
            lambda f: edit_manifest(f, lambda m: m.update(format=2)),
            "has format 2, this version reads 1",
        ),
        (lambda f: edit_manifest(f, lambda m: m.pop("channels")), "damaged.*channels"),
        (lambda f: edit_manifest(f, lambda m: m.update(text_dim="5")), "damaged.*text_dim"),
        (lambda f: edit_manifest(f, lambda m: m.update(text="words")), "damaged.*words"),
        (
            lambda f: edit_manifest(f, lambda m: m["shards"][1]["buckets"].update({"4x4": 99})),
            "damaged.*train-00001",
        ),
        (lambda f: edit_manifest(f, lambda m: m["shards"][1].update(buckets={"4": 8})), "damaged"),
        (
            lambda f: (f / "train-00002.array_record").unlink(),
            "cannot find the shard .*train-00002",
        ),
        (
            lambda f: (f / "train-00002.array_record").write_bytes(b"half"),
            "train-00002.* has 4 bytes, manifest",
        ),
    ],
)
def test_what_is_not_a_data_set(tmp_path, damage, words):
    folder = write_mixed_set(tmp_path / "set")
    damage(folder)
    with pytest.raises(UserError, match=words):
        encoded.Encoded(folder, "train")


# --- records that cannot be used ---


def write_changed_set(tmp_path, change):
    """Write a data set of eight examples whose third record goes through `change`."""
    records = [numbered_record(i) for i in range(8)]
    records[2] = change(records[2])
    entry = encoded.write_shard(tmp_path / "train-00000.array_record", records)
    entry["buckets"] = {"4x4": 8}
    encoded.write_manifest(tmp_path / "manifest.json", MANIFEST_FIELDS, [entry])
    return encoded.Encoded(tmp_path, "train")


def with_nan(r):
    """Return the record with one NaN in its latent."""
    latent = r["latent"].copy()
    latent[3, 1, 2] = np.nan
    return r | {"latent": latent}


@pytest.mark.parametrize(
    "change, words",
    [
        (with_nan, "is not finite"),
        (lambda r: r | {"latent": np.full_like(r["latent"], -np.inf)}, "is not finite"),
        (lambda r: r | {"latent": r["latent"].astype(np.float32)}, "float32 .*not float16"),
        (lambda r: r | {"latent": r["latent"][..., :2]}, r"\(4, 4, 2\), not float16 \(4, 4, 3\)"),
        (lambda r: r | {"tokens": np.zeros(8, np.int32)}, r"\(8,\), not int32 of at most \(7,\)"),
        (lambda r: r | {"tokens": np.zeros(3, np.int64)}, "tokens int64"),
        (lambda r: {k: v for k, v in r.items() if k != "tokens"}, "not latent, caption and tokens"),
    ],
)
def test_a_bad_record_is_reported_and_others_are_read(tmp_path, change, words):
    data = write_changed_set(tmp_path, change)
    place = next(i for i in range(8) if not is_readable(data, i))
    with pytest.raises(encoded.BadRecord, match=words):
        data.read(place)
    assert sum(is_readable(data, i) for i in range(8)) == 7


def test_features_that_are_not_finite(tmp_path):
    text = np.zeros((2, 5), np.float16)
    text[1, 4] = np.inf
    entry = encoded.write_shard(
        tmp_path / "train-00000.array_record", [numbered_record(1, kind="text") | {"text": text}]
    )
    encoded.write_manifest(
        tmp_path / "manifest.json", MANIFEST_FIELDS | {"text": "features", "text_dim": 5}, [entry]
    )
    with pytest.raises(encoded.BadRecord, match="not finite"):
        encoded.Encoded(tmp_path, "train").read(0)


def test_is_finite():
    values = np.float16([0, 65504, -65504, 6e-8])
    assert encoded.is_finite(values)
    for bad in (np.nan, np.inf, -np.inf):
        assert not encoded.is_finite(np.append(values, np.float16(bad)))


def flip_bit(folder, number):
    """Flip a bit in the middle of a record's latent, on disk."""
    for path in folder.glob("*.array_record"):
        content = bytearray(path.read_bytes())
        place = content.find(np.full(12, number, np.float16).tobytes())
        if place >= 0:
            content[place + 2] ^= 1
            return path.write_bytes(content)
    raise AssertionError(f"no record {number}")


def test_a_flipped_bit_is_found(tmp_path):
    folder = write_mixed_set(tmp_path / "set")
    flip_bit(folder, 9)
    data = encoded.Encoded(folder, "train")
    bad = [i for i in range(32) if not is_readable(data, i)]
    assert len(bad) == 1 and data.describe(bad[0]).endswith("train-00001.array_record")
    with pytest.raises(encoded.BadRecord, match="cannot be read"):
        data.read(bad[0])
    assert is_readable(data, bad[0] - 1) and is_readable(data, bad[0] + 1)


# --- the plan ---


def plan_batches(sizes, seed=0, batch=4):
    """Return the batches of an epoch."""
    return batches.Plan(
        np.repeat(np.arange(len(sizes)), sizes).astype(np.int16), seed=seed, batch=batch
    )


def test_every_example_once_an_epoch():
    p = plan_batches([24, 8])
    assert p.steps_per_epoch == 8
    orders = []
    for epoch in range(4):
        steps = [p.indices(8 * epoch + i) for i in range(8)]
        assert sorted(np.concatenate(steps)) == list(range(32))
        orders.append(tuple(np.concatenate(steps)))
    assert len(set(orders)) == 4


def test_leftovers_are_dropped_and_change_with_the_epoch():
    p = plan_batches([23, 9, 3])
    assert p.steps_per_epoch == 7
    dropped = set()
    for epoch in range(20):
        seen = np.concatenate([p.indices(7 * epoch + i) for i in range(7)])
        assert len(set(seen)) == 28 and (seen < 32).all()
        dropped |= set(range(32)) - set(seen.tolist())
    assert len(dropped) > 20  # with 23 + 9 examples none is left over in all epochs


def test_buckets_are_never_mixed_and_alternate():
    p = plan_batches([24, 24])
    of_step = []
    for step in range(48):
        buckets = set((p.indices(step) >= 24).tolist())
        assert len(buckets) == 1
        of_step.append(buckets.pop())
    patterns = {tuple(of_step[i : i + 12]) for i in range(0, 48, 12)}
    assert len(patterns) == 4 and all(sum(pattern) == 6 for pattern in patterns)


def test_the_seed_decides_the_order():
    """The next epoch of a seed differs from the first of the next seed.

    With Grain alone they would be equal.
    """
    steps = lambda seed, start: [
        p.indices(start + i).tolist() for p in [plan_batches([24, 8], seed)] for i in range(8)
    ]
    assert steps(0, 0) == steps(0, 0)
    assert steps(0, 0) != steps(1, 0)
    assert steps(0, 8) != steps(1, 0)


def test_golden_order():
    """Runs resume in the middle of this order, so Grain must not change it unnoticed."""
    p = plan_batches([6, 5], batch=2)
    assert [p.indices(step).tolist() for step in (0, 1, 2, 1000003)] == [
        [4, 2],
        [7, 8],
        [5, 3],
        [1, 4],
    ]


def test_ten_million_examples_are_planned_fast():
    """Planning takes a second, and memory for the indices only."""
    buckets = np.random.default_rng(0).integers(0, 33, 10_000_000).astype(np.int16)
    begin = time.perf_counter()
    p = batches.Plan(buckets, seed=0, batch=512)
    first, late = p.indices(0), p.indices(10**9)
    assert time.perf_counter() - begin < 10
    assert len(set(buckets[first])) == len(set(buckets[late])) == 1


def test_no_bucket_fills_a_batch():
    with pytest.raises(UserError, match="batch 32, and at most 24 of the 32 examples"):
        plan_batches([24, 8], batch=32)
    with pytest.raises(UserError, match="batch 4, and at most 0 of the 0"):
        plan_batches([], batch=4)


# --- batches ---


def test_rows_are_padded_and_masked(tmp_path):
    for kind in ("tokens", "text"):
        data = encoded.Encoded(write_mixed_set(tmp_path / kind, kind), "train")
        arrays, bad = batches.BatchReader(data, seed=0, batch=4)(0)
        assert bad == [] and arrays["latent"].shape in ((4, 4, 4, 3), (4, 2, 8, 3))
        assert arrays[kind].shape == ((4, 7) if kind == "tokens" else (4, 7, 5))
        assert {a.dtype.name for a in arrays.values()} == (
            {"float32", "int32"} if kind == "tokens" else {"float32"}
        )
        for row, number in enumerate(numbers(arrays)):
            length = 1 + number % 7
            np.testing.assert_array_equal(arrays["mask"][row], np.arange(7) < length)
            expected = np.where(np.arange(7) < length, number, 0)
            found = (
                arrays[kind][row] if kind == "text" else np.repeat(arrays[kind][row][:, None], 5, 1)
            )
            np.testing.assert_array_equal(found, np.repeat(expected[:, None], 5, 1))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_a_batch(data, count):
    whole = batches.BatchReader(data, seed=3, batch=4)
    parts = [
        batches.BatchReader(data, seed=3, batch=4, process_index=i, process_count=count)
        for i in range(count)
    ]
    for step in range(20):
        expected, shares = whole(step)[0], [part(step)[0] for part in parts]
        for name in expected:
            np.testing.assert_array_equal(
                np.concatenate([share[name] for share in shares]), expected[name]
            )


def test_a_process_reads_only_its_own_rows(data, monkeypatch):
    read, original = [], encoded.Encoded.read
    noting = lambda self, index: (read.append(int(index)), original(self, index))[1]
    monkeypatch.setattr(encoded.Encoded, "read", noting)
    make = batches.BatchReader(data, seed=3, batch=8, process_index=1, process_count=4)
    make(5)
    assert read == make.plan.indices(5)[2:4].tolist()


def test_a_batch_that_does_not_divide(data):
    with pytest.raises(UserError, match="global batch of 6 does not divide by 4 processes"):
        batches.BatchReader(data, seed=0, batch=6, process_index=0, process_count=4)


def take(data, start, stop, **options):
    """Return batches `start` to `stop`."""
    silent = lambda message: None
    with batches.iterate(
        data, **dict(seed=3, batch=4, start=start, stop=stop, say=silent) | options
    ) as ahead:
        return [(numbers(arrays), arrays["mask"].tolist()) for arrays in ahead]


def test_read_ahead_in_order(data):
    make = batches.BatchReader(data, seed=3, batch=4)
    assert take(data, 0, 20) == [
        (numbers(make(step)[0]), make(step)[0]["mask"].tolist()) for step in range(20)
    ]


def test_resumed_batches_are_the_tail(data):
    assert take(data, 13, 20) == take(data, 0, 20)[13:]


def test_reading_stops_early(data):
    with batches.iterate(data, seed=0, batch=4, start=0, stop=10**9, say=print) as ahead:
        first = next(ahead)
    assert numbers(first) == numbers(batches.BatchReader(data, seed=0, batch=4)(0)[0])
    with pytest.raises(ValueError, match="closed"):  # no thread continues to read
        next(ahead)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(data):
    assert take(data, 2, 9, workers=2) == take(data, 2, 9)
    assert not multiprocessing.active_children()


def test_sizes_that_never_fill_a_batch_are_reported(data):
    said = []
    batches.iterate(data, seed=0, batch=10, start=0, stop=1, say=said.append)
    assert len(said) == 1
    assert "batch of 10" in said[0]
    assert "2x8 (9)" in said[0]
    assert "4x4" not in said[0]
    batches.iterate(data, seed=0, batch=9, start=0, stop=1, say=said.append)
    assert len(said) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches.iterate(data, seed=0, batch=10, start=0, stop=1)
    assert [str(w.message) for w in caught] == said


# --- batches with bad records ---


def write_damaged_set(tmp_path, bad):
    """Write 64 examples of one size and flip a bit in each of `bad`."""
    folder = write_set(
        tmp_path / "set", [[(i, (4, 4)) for i in range(32)], [(i, (4, 4)) for i in range(32, 64)]]
    )
    for number in bad:
        flip_bit(folder, number)
    return encoded.Encoded(folder, "train")


def test_a_bad_record_is_replaced_by_the_next(tmp_path):
    """The next one of its bucket, past other bad ones, in a ring; the same in each epoch."""
    data = write_damaged_set(tmp_path, [10, 11, 63])
    stands_in = {10: 12, 11: 12, 63: 0}
    make = batches.BatchReader(data, seed=0, batch=16)
    for step in range(8):
        expected = make.plan.indices(step).tolist()
        arrays, bad = make(step)
        assert numbers(arrays) == [stands_in.get(i, i) for i in expected]
        met = [[10, 11] if i == 10 else [i] for i in expected if i in stands_in]
        assert [index for index, _ in bad] == list(itertools.chain(*met))


def test_the_replacement_is_of_the_same_bucket(data):
    p = batches.BatchReader(data, seed=0, batch=4).plan
    for index in range(32):
        follower = p.replacement(index)
        assert follower != index and data.bucket_of[follower] == data.bucket_of[index]
    rings = {index: p.replacement(index) for index in range(32)}
    assert sorted(rings.values()) == list(range(32))


def test_each_bad_record_is_reported_once_and_three_are_allowed(tmp_path):
    data, said = write_damaged_set(tmp_path, [5, 17, 40]), []
    with batches.iterate(
        data, seed=0, batch=16, start=0, stop=40, max_bad=0.0, say=said.append
    ) as ahead:
        assert len(list(ahead)) == 40
    assert len(said) == 3
    assert all("cannot be read" in line and "another takes its place" in line for line in said)
    assert any("record 8 of" in line and "train-00001" in line for line in said)


def test_too_many_bad_records_end_the_run(tmp_path):
    data, said = write_damaged_set(tmp_path, range(1, 64, 10)), []  # 7 of 64
    with batches.iterate(
        data, seed=0, batch=16, start=0, stop=40, max_bad=0.12, say=said.append
    ) as ahead:
        assert len(list(ahead)) == 40
    with (
        batches.iterate(
            data, seed=0, batch=16, start=0, stop=40, max_bad=0.05, say=said.append
        ) as ahead,
        pytest.raises(
            UserError, match=r"[4-7] of \d\d records read from .* more than the share 0.05"
        ),
    ):
        list(ahead)


def test_the_share_counts_distinct_examples(tmp_path):
    """A bad record and its replacement are one example, and so is one that is read again."""
    folder = write_set(tmp_path / "set", [[(i, (4, 4)) for i in range(16)]])
    for number in (0, 4, 8, 12):
        flip_bit(folder, number)
    data = encoded.Encoded(folder, "train")
    options = dict(seed=0, batch=16, start=0, stop=5, say=lambda message: None)
    with batches.iterate(data, **options, max_bad=0.26) as ahead:
        assert len(list(ahead)) == 5
    with (
        batches.iterate(data, **options, max_bad=0.24) as ahead,
        pytest.raises(UserError, match="4 of 16 records"),
    ):
        next(ahead)


def test_no_readable_record_is_an_error(tmp_path):
    data = write_damaged_set(tmp_path, [])
    data._files = ["manifest.json"] * 2
    with pytest.raises(
        UserError, match="100 records in a row cannot be used, the last being record"
    ):
        batches.BatchReader(data, seed=0, batch=16)(0)
