"""Statistics and rules of the metrics: numbers of the official packages, and cases by hand."""

import json

import numpy as np
import pytest

from sprint_jax.errors import UserError
from sprint_jax.evaluation import clip_score, dpg, fid, geneval, prompt_sets, report
from sprint_jax.toy import checker, frechet


def features(seed, count, shift, scale, dim=64):
    """Return normal features [count, dim] with a shift and a scale."""
    rng = np.random.RandomState(seed)
    mix = rng.randn(dim, dim) / np.sqrt(dim)
    return np.abs(rng.randn(count, dim) @ mix) * scale + shift


def gaussian(x):
    """Return (mean, covariance) of features."""
    return fid.Moments.of(x).gaussian()


# Results of calculate_frechet_distance of pytorch-fid 0.3.0 and frechet_distance of clean-fid
# 0.1.35, equal to the last digit, on mean and np.cov of these features. NumPy 2.4.6, SciPy 1.17.1.
RECORDED = {600: 13.43088923898884, 40: 38.89231522434642}


@pytest.mark.parametrize("count", RECORDED)
def test_fid_equals_that_of_the_official_packages(count):
    """With 40 features of 64 numbers the product of the covariances is singular.

    Fails for a divisor of N instead of N - 1.
    """
    a, b = features(0, count, 0.0, 1.0), features(1, count, 0.1, 1.3)
    assert a[0, 0] == pytest.approx(
        1.1924016184953699, rel=1e-14
    )  # the features are the recorded ones
    assert fid.distance(gaussian(a), gaussian(b)) == pytest.approx(RECORDED[count], rel=1e-9)


def test_fid_of_singular_covariances():
    """Recorded as above, for covariances whose product is zero."""
    zero, one, other = np.zeros(8), np.diag([1.0] + [0] * 7), np.diag([0, 1.0] + [0] * 6)
    of = lambda mean, covariance: fid.Gaussian(mean, covariance, 0)
    assert fid.distance(of(zero, one), of(zero + 0.5, other)) == pytest.approx(4.0, rel=1e-9)
    assert fid.distance(of(zero, one), of(zero + 0.5, 0 * one)) == pytest.approx(3.0, rel=1e-9)


def test_fid_adds_to_the_diagonals_without_a_finite_root(monkeypatch):
    """If the root of the product is not finite, 1e-6 is added to both diagonals, in the root alone.

    The expected value is the closed form for diagonal matrices.
    """
    a, b, roots = np.array([1.0, 0.0, 2.0]), np.array([0.0, 0.0, 3.0]), [np.full((3, 3), np.nan)]
    true = fid._root
    monkeypatch.setattr(fid, "_root", lambda matrix: roots.pop() if roots else true(matrix))
    found = fid.distance(
        fid.Gaussian(np.zeros(3), np.diag(a), 0), fid.Gaussian(np.zeros(3), np.diag(b), 0)
    )
    assert not roots
    assert found == pytest.approx(
        a.sum() + b.sum() - 2 * np.sqrt((a + 1e-6) * (b + 1e-6)).sum(), rel=1e-12
    )


def test_a_complex_root_is_refused(monkeypatch):
    """Imaginary parts up to 1e-3 on the diagonal are rounding, as in pytorch-fid.

    Larger ones are an error.
    """
    one = fid.Gaussian(np.zeros(2), np.eye(2), 0)
    monkeypatch.setattr(fid, "_root", lambda matrix: np.eye(2) + np.diag([0.9e-3j, 0]))
    assert fid.distance(one, one) == 0
    monkeypatch.setattr(fid, "_root", lambda matrix: np.eye(2) + np.diag([1.1e-3j, 0]))
    with pytest.raises(UserError, match="imaginary part of 0.0011"):
        fid.distance(one, one)


def test_fid_of_diagonal_gaussians_in_closed_form():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 9.0])
    mean = np.array([1.0, -2.0, 0.0])
    found = fid.distance(
        fid.Gaussian(mean, np.diag(a), 0), fid.Gaussian(np.zeros(3), np.diag(b), 0)
    )
    assert found == pytest.approx(
        np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12
    )


def test_both_distances_agree():
    a, b = features(0, 600, 0.0, 1.0), features(1, 600, 0.1, 1.3)
    found = frechet.distance(frechet.moments(a), frechet.moments(b))
    assert fid.distance(gaussian(a), gaussian(b)) == pytest.approx(found, rel=1e-9)


def test_parts_merge_to_the_whole():
    """Any split in any order, with a mean of 1000 standard deviations.

    Fails where `between` is left out.
    """
    x = np.random.RandomState(0).randn(301, 6) + 1000
    cuts = np.split(x, [1, 40, 41, 200])
    merged = fid.merge(fid.Moments.of(part) for part in cuts)
    tree = fid.Moments.of(cuts[3]).merged(fid.merge(fid.Moments.of(p) for p in (cuts[4], cuts[0])))
    tree = tree.merged(fid.Moments.of(cuts[2]).merged(fid.Moments.of(cuts[1])))
    for found in (merged, tree):
        assert found.count == 301
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(
            found.gaussian().covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12
        )


def test_statistics_survive_a_file(tmp_path):
    path = tmp_path / "stats.npz"
    fid.save(
        path,
        gaussian(features(0, 20, 0, 1, dim=5)),
        {"resize": "pytorch-fid", "picture_size": None},
    )
    found, protocol = fid.load(path)
    expected = gaussian(features(0, 20, 0, 1, dim=5))
    np.testing.assert_array_equal(found.covariance, expected.covariance)
    np.testing.assert_array_equal(found.mean, expected.mean)
    assert found.count == 20
    assert protocol == {"resize": "pytorch-fid", "picture_size": ""}
    np.savez(
        tmp_path / "foreign.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32)
    )
    found, protocol = fid.load(tmp_path / "foreign.npz")
    assert found.count == 0
    assert protocol == {}
    assert found.covariance.dtype == np.float64


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(mu=np.zeros(3)), "mu and sigma"),
        (dict(mu=np.zeros(3), sigma=np.eye(4)), "belong together"),
        (dict(mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), "not finite"),
        (dict(mu=np.zeros(3), sigma=np.eye(3), count=np.arange(2)), "number of images"),
    ],
)
def test_bad_statistics_are_named(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=words):
        fid.load(tmp_path / "bad.npz")


def test_bad_comparisons_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        fid.load(tmp_path / "absent.npz")
    np.save(tmp_path / "array.npy", np.eye(3))
    with pytest.raises(UserError, match="cannot read"):
        fid.load(tmp_path / "array.npy")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="cannot read"):
        fid.load(tmp_path / "text.npz")
    with pytest.raises(UserError, match="3 and 4 numbers"):
        fid.distance(
            fid.Gaussian(np.zeros(3), np.eye(3), 0), fid.Gaussian(np.zeros(4), np.eye(4), 0)
        )
    with pytest.raises(UserError, match="at least two"):
        gaussian(np.zeros((1, 4)))


def test_clip_scores():
    """Recorded from torchmetrics 1.9.0 with a model that returns these features.

    The score is the mean, and 0 for opposites.
    """
    rng = np.random.RandomState(3)
    image = rng.randn(6, 16)
    text = rng.randn(6, 16) + 0.3 * image
    found = clip_score.cosines(image, text)
    assert clip_score.torchmetrics(found) == pytest.approx(39.83364231682234, rel=1e-9)
    # torchmetrics prints seven digits.
    np.testing.assert_allclose(
        100 * found, [15.2384, 8.7046, 45.4586, 48.8646, 45.8129, 74.9228], rtol=2e-6, atol=5e-5
    )
    assert clip_score.sana(found, np.log(100)) == pytest.approx(39.83364231682234, rel=1e-9)
    assert clip_score.sana(found, 1.0) == pytest.approx(np.e * 0.3983364231682234, rel=1e-9)
    opposite = clip_score.cosines(image, -image)
    assert clip_score.torchmetrics(opposite) == 0
    assert clip_score.sana(opposite, np.log(100)) == pytest.approx(-100)
    # One pair below zero lowers the mean in both: single pairs are not clipped.
    assert clip_score.torchmetrics([0.5, -0.25]) == pytest.approx(12.5)


def detection(name, confidence=0.9, box=(0, 0, 10, 10), color=None):
    """Return a detected object."""
    return {"class": name, "box": list(box), "confidence": confidence} | (
        {"colour": color} if color else {}
    )


def requirement(tag, *include, exclude=()):
    """Return a GenEval prompt."""
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


ONE_DOG = requirement("single_object", {"class": "dog", "count": 1})
THREE_DOGS = requirement(
    "counting", {"class": "dog", "count": 3}, exclude=[{"class": "dog", "count": 4}]
)
RED_DOG = requirement("colors", {"class": "dog", "count": 1, "color": "red"})
DOG_RIGHT_OF_CAT = requirement(
    "position",
    {"class": "cat", "count": 1},
    {"class": "dog", "count": 1, "position": ["right of", 0]},
)
RED_DOG_BLUE_CAT = requirement(
    "color_attr",
    {"class": "dog", "count": 1, "color": "red"},
    {"class": "cat", "count": 1, "color": "blue"},
)


@pytest.mark.parametrize(
    "metadata, objects, right",
    [
        (ONE_DOG, [detection("dog", 0.31)], True),
        (ONE_DOG, [detection("dog", 0.3)], False),  # above the threshold, not at it
        (ONE_DOG, [detection("cat")], False),
        (
            ONE_DOG,
            [detection("dog"), detection("dog"), detection("cat")],
            True,
        ),  # more objects are allowed without exclude
        (ONE_DOG, [], False),
        (THREE_DOGS, [detection("dog", 0.91)] * 3, True),
        # counting needs a confidence of 0.9
        (THREE_DOGS, [detection("dog", 0.91)] * 2 + [detection("dog", 0.89)], False),
        (THREE_DOGS, [detection("dog", 0.91)] * 3 + [detection("dog", 0.89)], True),
        (THREE_DOGS, [detection("dog", 0.95)] * 4, False),  # excluded
        (RED_DOG, [detection("dog", color="red")], True),
        (RED_DOG, [detection("dog", color="blue")], False),
        # Only the color of the most confident dog counts.
        (
            RED_DOG,
            [detection("dog", 0.5, color="red"), detection("dog", 0.8, color="blue")],
            False,
        ),
        (
            RED_DOG,
            [detection("dog", 0.5, color="blue"), detection("dog", 0.8, color="red")],
            True,
        ),
        (
            DOG_RIGHT_OF_CAT,
            [detection("cat", box=(0, 0, 10, 10)), detection("dog", box=(30, 0, 40, 10))],
            True,
        ),
        (
            DOG_RIGHT_OF_CAT,
            [detection("cat", box=(30, 0, 40, 10)), detection("dog", box=(0, 0, 10, 10))],
            False,
        ),
        # no object to be right of
        (DOG_RIGHT_OF_CAT, [detection("dog", box=(30, 0, 40, 10))], False),
        (RED_DOG_BLUE_CAT, [detection("dog", color="red"), detection("cat", color="blue")], True),
        (
            RED_DOG_BLUE_CAT,
            [detection("dog", color="blue"), detection("cat", color="red")],
            False,
        ),
    ],
)
def test_geneval_cases_by_hand(metadata, objects, right):
    correct, reasons = geneval.judge(objects, metadata)
    assert correct is right
    assert bool(reasons) is not right


@pytest.mark.parametrize(
    "box, other, expected",
    [
        ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),  # distance 30, 2 subtracted: 28/30
        ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),
        ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),  # y grows downwards
        ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
        ((20, 20, 30, 30), (0, 0, 10, 10), {"right of", "below"}),  # 18/28.28 = 0.64 on both axes
        ((2, 0, 12, 10), (0, 0, 10, 10), set()),  # distance 2, all of it margin
        ((3, 0, 13, 10), (0, 0, 10, 10), set()),  # 1/3 remains
        ((5, 0, 15, 10), (0, 0, 10, 10), {"right of"}),  # 3/5
        ((4, 0, 14, 10), (0, 0, 10, 10), set()),  # 2/4 is not more than half
        ((10, 20, 20, 30), (0, 0, 10, 10), {"below"}),  # 18/22.4 = 0.80 against 8/22.4 = 0.36
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_geneval_relations_by_hand(box, other, expected):
    assert geneval.relations(box, other) == expected


def test_geneval_keeps_sixteen_of_a_class():
    found = geneval.kept(
        [detection("dog", 0.5 + i / 100) for i in range(20)] + [detection("cat", 0.2)],
        "single_object",
    )
    assert [round(o["confidence"], 2) for o in found["dog"]] == [
        round(0.69 - i / 100, 2) for i in range(16)
    ]
    assert "cat" not in found


def test_geneval_overall_is_the_mean_of_tasks():
    """Two of three colors and one of one object give 0.8333; the mean over images would be 0.75."""
    pictures = [("a", RED_DOG), ("b", RED_DOG), ("c", RED_DOG), ("d", ONE_DOG)]
    detections = {n: [detection("dog", color="red")] for n in "abd"} | {"c": []}
    found = geneval.score(detections, pictures)
    assert found["tasks"] == {"single_object": 1.0, "colors": pytest.approx(2 / 3)}
    assert found["overall"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["wrong"] == {"c": ["expected 1 dog, found 0"]}


def test_geneval_missing_images_are_named(tmp_path):
    with pytest.raises(UserError, match="1 of 2 images have no detections, first b"):
        geneval.score({"a": []}, [("a", ONE_DOG), ("b", ONE_DOG)])
    with pytest.raises(UserError, match="detections of a lack a color"):
        geneval.score({"a": [detection("dog")]}, [("a", RED_DOG)])
    for row, words in (
        ({"file": "a"}, "line 2"),
        ({"file": "a", "objects": [{"class": "dog", "box": [1, 2, 3], "confidence": 1}]}, "line 2"),
        ({"file": "a", "objects": [detection("dog", color="mauve")]}, "mauve"),
        ({"file": "first", "objects": []}, "has a line already"),
    ):
        path = tmp_path / "detections.jsonl"
        path.write_text(
            json.dumps({"file": "first", "objects": []}) + "\n" + json.dumps(row) + "\n"
        )
        with pytest.raises(UserError, match=words):
            geneval.read_detections(path)
    for metadata in (
        {"tag": "size", "include": [{"class": "dog", "count": 1}]},
        {"tag": "colors", "include": []},
    ):
        with pytest.raises(UserError, match="prompt 7 is not GenEval metadata"):
            geneval.check_metadata(metadata, "prompt 7")
    dog = {"class": "dog", "count": 1}
    for extra, words in (
        ({"exclude": [{"class": "dog"}]}, "exclude 0 needs class and count"),
        ({"include": ["dog"]}, "include 0 needs class"),
        ({"include": [dog | {"count": "2"}]}, "include 0 needs class and count"),
        ({"include": [dog, dog | {"position": ["left of"]}]}, "include 1 has position"),
    ):
        with pytest.raises(UserError, match=words):
            geneval.check_metadata({"tag": "counting", "include": [dog]} | extra, "prompt 7")
    geneval.check_metadata(
        {"tag": "counting", "include": [dog, dog | {"position": ["left of", 0]}], "exclude": [dog]},
        "prompt 7",
    )
    with pytest.raises(UserError, match="earlier index"):
        geneval.check_metadata(
            requirement("position", {"class": "dog", "count": 1, "position": ["left of", 0]}),
            "prompt 7",
        )


def test_dpg_zeroes_questions_that_depend_on_a_no():
    """2 depends on 1, 3 on 2, and 4 on nothing: a no to 1 zeroes 2 and, through it, 3."""
    parents = {1: (), 2: (1,), 3: (2,), 4: ()}
    assert dpg.picture_score({1: True, 2: True, 3: True, 4: True}, parents) == 1
    assert dpg.picture_score({1: False, 2: True, 3: True, 4: True}, parents) == 0.25
    assert dpg.picture_score({1: True, 2: False, 3: True, 4: True}, parents) == 0.5
    assert dpg.picture_score({1: True, 2: True, 3: True, 4: False}, parents) == 0.75
    # A question that comes before its dependency is judged by the answer itself, as in the
    # original.
    assert dpg.picture_score(
        {1: False, 2: True, 3: True}, {3: (2,), 2: (1,), 1: ()}
    ) == pytest.approx(1 / 3)


QUESTIONS = """item_id,text,keywords,proposition_id,dependency,category_broad
lake,"a lake, at dusk",,1,0,entity
lake,"a lake, at dusk",,2,"1, 0",global
fox,a red fox,,1,0,entity
"""


def test_a_short_row_of_questions_is_named(tmp_path):
    (tmp_path / "q.csv").write_text(QUESTIONS + "fox,a red fox\n")
    with pytest.raises(UserError, match="line 5: proposition_id and dependency must be whole"):
        dpg.read_questions(tmp_path / "q.csv")


def test_dpg_from_files(tmp_path):
    """lake:

    1, 1, 0 and 0.5 over four images; fox: all right. The score is the mean over prompts, times 100.
    """
    (tmp_path / "q.csv").write_text(QUESTIONS)
    items = dpg.read_questions(tmp_path / "q.csv")
    assert [(i.id, i.prompt, i.parents) for i in items] == [
        ("lake", "a lake, at dusk", {1: (), 2: (1,)}),
        ("fox", "a red fox", {1: ()}),
    ]
    lake = [("yes", "yes"), ("yes", "yes"), ("no", "yes"), ("yes", "no")]
    rows = [
        {"item_id": "lake", "picture": n, "answers": {"1": a, "2": b}}
        for n, (a, b) in enumerate(lake)
    ]
    rows += [{"item_id": "fox", "picture": n, "answers": {"1": "yes"}} for n in range(4)]
    write = lambda rows: (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    write(rows)
    found = dpg.score(dpg.read_answers(tmp_path / "a.jsonl"), items)
    assert found["items"] == {"lake": 0.625, "fox": 1.0}
    assert found["score"] == pytest.approx(81.25)
    write(rows[:-1])
    with pytest.raises(UserError, match="1 of 8 images have no answers, first picture 3 of fox"):
        dpg.score(dpg.read_answers(tmp_path / "a.jsonl"), items)
    write([rows[0] | {"answers": {"1": "yes"}}, *rows[1:]])
    with pytest.raises(UserError, match="picture 0 of lake has no answer to proposition 2"):
        dpg.score(dpg.read_answers(tmp_path / "a.jsonl"), items)
    write([rows[0], rows[0]])
    with pytest.raises(UserError, match="line 2: picture 0 of lake has a line already"):
        dpg.read_answers(tmp_path / "a.jsonl")
    write([rows[0] | {"answers": {"1": 3}}])
    with pytest.raises(UserError, match="line 1 is not an answer"):
        dpg.read_answers(tmp_path / "a.jsonl")


def test_dpg_questions_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "q.csv"
    for text, words in (
        (QUESTIONS.replace('"1, 0"', "7"), "depends on proposition 7"),
        (QUESTIONS.replace('"1, 0"', "first"), "line 3"),
        (QUESTIONS.replace("item_id", "id"), "item_id"),
        ("", "item_id"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            dpg.read_questions(path)
    path.write_text(QUESTIONS + "fox,a red fox,,1,0,entity\n")
    with pytest.warns(UserWarning, match="fox has proposition 1 twice"):
        dpg.read_questions(path)


def test_grids_are_split_where_they_were_joined():
    images = np.random.RandomState(0).randint(0, 256, (4, 6, 8, 3)).astype(np.uint8)
    sheet = dpg.grid(images)
    assert sheet.shape == (12, 16, 3)
    np.testing.assert_array_equal(
        sheet[:6, 8:], images[1]
    )  # reading order: the second is at the top right
    np.testing.assert_array_equal(dpg.crops(sheet), images)
    with pytest.raises(UserError, match="11 x 16"):
        dpg.crops(sheet[:11])


def test_prompt_files(tmp_path):
    read = lambda name, text: (
        (tmp_path / name).write_text(text),
        prompt_sets.read(tmp_path / name),
    )[1]
    assert [(p.id, p.text) for p in read("a.txt", "one\n\ntwo\n")] == [
        ("00000", "one"),
        ("00001", "two"),
    ]
    rows = read("a.jsonl", '{"prompt": "one", "tag": "x"}\n{"id": "b", "prompt": "two"}\n')
    assert [(p.id, p.text) for p in rows] == [("00000", "one"), ("b", "two")]
    assert rows[0].row["tag"] == "x"
    assert [
        (p.id, p.text) for p in read("a.json", '{"k": {"prompt": "one", "category": "c"}}')
    ] == [("k", "one")]
    assert [(p.id, p.text) for p in read("a.csv", QUESTIONS)] == [
        ("lake", "a lake, at dusk"),
        ("fox", "a red fox"),
    ]
    mark = "\ufeff"  # the byte order mark of editors on Windows
    for name, text in (
        ("m.txt", "one"),
        ("m.jsonl", '{"prompt": "one"}'),
        ("m.json", '{"k": {"prompt": "one"}}'),
    ):
        assert [p.text for p in read(name, mark + text)] == ["one"]
    assert [p.id for p in read("m.csv", mark + QUESTIONS)] == ["lake", "fox"]
    odd = "a\u2028b \x85 c"  # not line ends, although str.splitlines splits at them
    assert (
        [p.text for p in read("o.txt", f"{odd}\ntwo")]
        == [
            p.text
            for p in read(
                "o.jsonl", json.dumps({"prompt": odd}, ensure_ascii=False) + '\n{"prompt": "two"}'
            )
        ]
        == [odd, "two"]
    )
    for name, text, words in (
        ("b.txt", "\n", "holds no prompt"),
        (
            "b.jsonl",
            '{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n',
            "1 ids occur twice, first a",
        ),
        ("b.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2"),
        ("b.jsonl", '{"id": "../a", "prompt": "x"}\n', "cannot name a file"),
        (
            "b.json",
            '{"k": {"prompt": "one"}, "k": {"prompt": "two"}}',
            "1 ids occur twice, first k",
        ),
        ("b.json", '["one"]', "not a table"),
    ):
        with pytest.raises(UserError, match=words):
            read(name, text)


@pytest.mark.parametrize("split", ["heldout", "selection", "final"])
def test_held_out_captions_are_those_of_a_run(split):
    """Each image is judged right by its own caption. Fails for captions of another split."""
    from sprint_jax.toy import shapes

    prompts = prompt_sets.heldout_captions(5, 12, 32, split)
    examples = [shapes.example(5, i, size=32, split=split) for i in range(12)]
    overall, _ = checker.score([e.image for e in examples], [shapes.parse(p.text) for p in prompts])
    assert overall == 1.0


def test_the_report_text():
    text = report.readable(
        {
            "suite": "geneval",
            "scores": {"overall": 0.5, "tasks": {"colors": 0.25}},
            "protocol": {"pictures": 4, "sizes": ["32 x 32"]},
            "details": {"wrong": {}},
        }
    )
    assert "| overall | 0.5 |" in text and "| tasks: colors | 0.25 |" in text
    assert "## protocol" in text
    assert "| sizes | 32 x 32 |" in text
    assert "details" not in text
