"""Tars and folders that are damaged or mixed: nothing is lost without a line that says so."""

import io
import json
import os
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from sprint_jax.data import captioned, sources
from sprint_jax.errors import UserError
from sprint_jax.storage import files


def image_bytes(form="PNG", level=90):
    """Return an image file of 60 x 60 noisy pixels, which is several blocks of a tar."""
    pixels = np.random.RandomState(level).randint(0, 256, (60, 60, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


PNG = image_bytes()


def tar_bytes(members, form=tarfile.PAX_FORMAT):
    """Return a tar of (name, bytes or text), or of TarInfo for members without content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            data = data if isinstance(data, bytes) else data.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def samples(start, stop):
    """Return the members of samples with captions "caption NUMBER"."""
    return [
        member
        for i in range(start, stop)
        for member in ((f"{i:03d}.png", PNG), (f"{i:03d}.txt", b"caption %d" % i))
    ]


TEN = tar_bytes(samples(0, 10))
EACH = 512 + -(-len(PNG) // 512) * 512 + 1024  # bytes of a sample
PADDING = len(TEN) - 10 * EACH  # the end of the archive


def write(root, content):
    """Write {name: bytes or text} below a folder and return the folder."""
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def read(root, caption_field="prompt"):
    """Return {key: caption, or in brackets why the example cannot be used} of a source."""
    source, found = sources.open_source(root, caption_field), {}
    for index in range(len(source)):
        try:
            example = source[index]
            captioned.decode_image(example.image)
            found[source.key(index)] = example.caption
        except captioned.BadExample as error:
            found[source.key(index)] = f"[{error}]"
    assert len(found) == len(source)  # keys are unique
    return found


def read_tar(root, data, **listed):
    """Return `read` of a tar alone in a folder, and of a listing with the given fields."""
    write(root, {"0.tar": data})
    if listed:
        write(root, {"wids-meta.json": json.dumps({"shardlist": [{"url": "0.tar", **listed}]})})
    return read(root)


def good(*numbers):
    """Return what `read` gives of undamaged samples of `samples`."""
    return {f"0.tar:{number:03d}": f"caption {number}" for number in numbers}


def zeroed(start, stop):
    return TEN[:start] + bytes(stop - start) + TEN[stop:]


DAMAGED, ZEROS, CUT = (
    "[damaged header in the tar]",
    "[zeros in the tar where members should be]",
    "[the tar is cut]",
)
LOST_IMAGE = {"0.tar:005": "[missing picture]"}


@pytest.mark.parametrize(
    "data, expected",
    [
        (TEN, good(*range(10))),
        (TEN[: 5 * EACH], good(*range(5)) | {f"0.tar:byte {5 * EACH}": CUT}),
        (TEN[: 5 * EACH + 200], good(*range(5)) | {f"0.tar:byte {5 * EACH}": CUT}),
        (TEN[: 10 * EACH], good(*range(10)) | {f"0.tar:byte {10 * EACH}": CUT}),
        (TEN[: 5 * EACH + 900], good(*range(5)) | {"0.tar:005": "[corrupt record]"}),
        (
            TEN[: 5 * EACH] + b"\xff" * 512 + TEN[5 * EACH + 512 :],
            good(0, 1, 2, 3, 4, 6, 7, 8, 9) | LOST_IMAGE | {f"0.tar:byte {5 * EACH}": DAMAGED},
        ),
        (
            zeroed(5 * EACH, 5 * EACH + 512),
            good(0, 1, 2, 3, 4, 6, 7, 8, 9) | LOST_IMAGE | {f"0.tar:byte {5 * EACH}": DAMAGED},
        ),
        (
            zeroed(5 * EACH, 5 * EACH + 1024),
            good(0, 1, 2, 3, 4, 6, 7, 8, 9) | LOST_IMAGE | {f"0.tar:byte {5 * EACH}": DAMAGED},
        ),
        (b"\xff" * 512 + TEN[512:], good(*range(1, 10)) | {
            "0.tar:000": "[missing picture]", "0.tar:byte 0": DAMAGED}),
        (zeroed(5 * EACH, len(TEN)), good(*range(5)) | {f"0.tar:byte {5 * EACH}": ZEROS}),
        (zeroed(5 * EACH, 7 * EACH), good(0, 1, 2, 3, 4, 7, 8, 9) | {
            f"0.tar:byte {5 * EACH}": ZEROS}),
        (TEN + tar_bytes(samples(10, 12)), good(*range(12))),
        (TEN[: 10 * EACH + 1024] + tar_bytes(samples(10, 12)), good(*range(12))),
        (TEN + b"garbage" * 200, good(*range(10)) | {f"0.tar:byte {len(TEN)}": DAMAGED}),
    ],
    ids=["whole", "border", "in a header", "no end", "in a member", "header", "zeroed header",
         "two zeroed blocks", "first header", "zeros at the end", "hole", "joined",
         "joined without padding", "garbage"],
)  # fmt: skip
def test_a_damaged_tar_is_read_to_its_end(tmp_path, data, expected):
    """Fails when reading ends at the first damaged or empty block, and when that is not listed."""
    assert read_tar(tmp_path, data) == expected


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_tars_of_gnu_tar_are_read_as_it_lists_them(tmp_path, form):
    """Long names, dots, hard links and joined archives, beside what --ignore-zeros lists."""
    long = "" if form == "v7" else "d" * 60 + "/" + "e" * 60 + "/"
    names = [f"{long}{i}.5" for i in range(3)]
    write(tmp_path / "in", {f"{n}{e}": d for n in names for e, d in ((".png", PNG), (".txt", n))})
    os.link(tmp_path / "in" / f"{names[0]}.png", tmp_path / "in/9.png")
    write(tmp_path / "in", {"9.txt": "linked"})
    joined = b""
    for part in (["9.png", "9.txt"], [long.partition("/")[0] or "."]):
        command = ["tar", f"--format={form}", "-cf", "-", "--exclude=9.*" * (part[0][0] != "9")]
        out = subprocess.run(
            [word for word in command if word] + ["-C", tmp_path / "in", *part],
            capture_output=True,
            check=True,
        )
        joined += out.stdout
    write(tmp_path / "out", {"0.tar": joined})
    listing = subprocess.run(
        ["tar", "--ignore-zeros", "-tf", tmp_path / "out/0.tar"], capture_output=True, text=True
    )
    wanted = {
        name.removeprefix("./").rpartition(".")[0]
        for name in listing.stdout.split()
        if not name.endswith("/")
    }
    found = read(tmp_path / "out")
    assert found.keys() == {f"0.tar:{name}" for name in wanted}
    assert [found[f"0.tar:{name}"] for name in (*names, "9")] == [*names, "linked"]


def test_numbers_of_samples_are_compared(tmp_path):
    """Fails when `nsamples` is not read, and when a listed damaged part counts for nothing."""
    write(tmp_path, {"wids-meta.json": "\ufeff" + json.dumps({"shardlist": [
        {"url": "0.tar", "nsamples": 10}]})})  # fmt: skip
    lost = b"\xff" * EACH
    for data, count in ((TEN, 10), (TEN[: 10 * EACH], 10), (TEN[: 5 * EACH] + lost
            + TEN[6 * EACH :], 10)):  # fmt: skip
        write(tmp_path, {"0.tar": data})
        assert len(sources.open_source(tmp_path)) == count
    for data, found in ((TEN[: 5 * EACH], 5), (zeroed(5 * EACH, len(TEN)), 5), (TEN + TEN, 20)):
        write(tmp_path, {"0.tar": data})
        with pytest.raises(UserError, match=f"0.tar has {found} samples .* nsamples 10"):
            sources.open_source(tmp_path)


def test_damaged_parts_count_towards_the_share(tmp_path):
    """Fails when damaged parts are warnings beside the examples."""
    from helpers import encoding

    broken = bytearray(TEN)
    for number in range(1, 9, 2):
        broken[number * EACH : number * EACH + 512] = b"\xff" * 512
    write(tmp_path, {"in/0.tar": bytes(broken)})
    with pytest.raises(UserError, match=r"of 14 examples cannot be used, .*0.tar:"):
        encoding.encode_folder(tmp_path / "in", tmp_path / "out", max_bad=0.1, shard_records=99)


def test_names_are_split_at_the_last_dot(tmp_path):
    """Fails when `img 1.5.png` is of no sample, and when a second image of a sample is silent."""
    found = read_tar(
        tmp_path,
        tar_bytes(
            [
                ("img 1.5.png", PNG),
                ("img 1.5.txt", b"dotted"),
                ("v1.0/a.b.c.png", PNG),
                ("v1.0/a.b.c.json", b'{"prompt": "two dots"}'),
                ("x.seg.png", PNG),
                ("x.jpg", image_bytes("JPEG")),
                ("x.txt", b"an x"),
                ("y.jpg", image_bytes("JPEG")),
                ("y.png", PNG),
                ("y.txt", b"a y"),
                ("z.cls", b"7"),
                ("z.png", PNG),
                ("z.txt", b"a z"),
            ]
        ),
    )
    assert found == {
        "0.tar:img 1.5": "dotted",
        "0.tar:v1.0/a.b.c": "two dots",
        "0.tar:x.seg": "[missing caption]",
        "0.tar:x": "an x",
        "0.tar:y": "a y",
        "0.tar:y.jpg": "[another image of its sample]",
        "0.tar:z": "a z",
    }


def test_names_that_occur_twice_in_a_tar_are_samples_each(tmp_path):
    """Fails when the later one silently takes the place of the first."""
    other = image_bytes(level=3)
    data = tar_bytes([("0.png", PNG), ("0.txt", b"one"), ("0.txt", b"two"), ("0.png", other),
        ("1.png", PNG), ("1.txt", b"a"), ("1.txt", b"b")])  # fmt: skip
    assert read_tar(tmp_path, data) == {
        "0.tar:0": "one",
        "0.tar:0#2": "two",
        "0.tar:1": "a",
        "0.tar:1#2": "[missing picture]",
    }
    assert sources.open_source(tmp_path)[1].image == other


def link(name, kind, target):
    """Return a member that is a link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_in_tars_are_the_files_that_they_name(tmp_path):
    """Fails when a hard link, which GNU tar writes for a file that it has, is a missing image."""
    data = tar_bytes(
        [
            ("d/0.png", PNG),
            ("d/0.txt", b"zero"),
            link("1.png", tarfile.LNKTYPE, "./d/0.png"),
            ("1.txt", b"hard"),
            link("d/2.png", tarfile.SYMTYPE, "0.png"),
            ("d/2.txt", b"symbolic"),
            link("3.png", tarfile.LNKTYPE, "1.png"),
            ("3.txt", b"chain"),
            link("4.png", tarfile.LNKTYPE, "gone.png"),
            ("4.txt", b"nowhere"),
            link("5.png", tarfile.SYMTYPE, "5.png"),
            ("5.txt", b"itself"),
        ]
    )
    nowhere = "[link without its file]"
    assert list(read_tar(tmp_path, data).values()) == [
        "zero", "hard", "symbolic", "chain", nowhere, nowhere]  # fmt: skip


def test_archives_inside_tars_are_listed(tmp_path):
    data = tar_bytes([("0.png", PNG), ("0.txt", b"zero"), ("in/1.tar", TEN), ("2.TAR.GZ", b"gz")])
    reason = "[archive in the tar, which is not read]"
    assert read_tar(tmp_path, data) == {
        "0.tar:0": "zero", "0.tar:in/1.tar": reason, "0.tar:2.TAR.GZ": reason}  # fmt: skip


def test_listed_tars_are_found_in_another_case(tmp_path):
    write(tmp_path, {"Shard-0.TAR": TEN, "a.tar": TEN, "b.tar": TEN})
    write(tmp_path, {"wids-meta.json": '{"shardlist": [{"url": "gs://b/shard-0.tar"}]}'})
    assert [key.partition(":")[0] for key in read(tmp_path)] == ["Shard-0.TAR"] * 10
    write(tmp_path, {"wids-meta.json": '{"shardlist": [{"url": "a.tar"}, {"url": "a.tar"}]}'})
    with pytest.raises(UserError, match="lists a.tar twice"):
        read(tmp_path)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "0.tar .it is empty"),
        (bytes(40960), "0.tar .zeros in the tar"),
        (b"\xfe" * 4000, "0.tar .damaged header"),
        (TEN[:150] + b"x" * 8 + TEN[158:512], "0.tar .damaged header"),
        (b"<html>" * 300, "0.tar is no tar but a web page"),
        (b"\x1f\x8b\x08" + b"x" * 999, "0.tar is no tar but a gzip archive"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "0.tar is no tar but a pointer of Git LFS",
        ),
    ],
)
def test_a_file_without_any_member_is_refused_by_name(tmp_path, data, words):
    """A tar without a readable member is refused, not listed as one damaged example."""
    write(tmp_path, {"0.tar": data, "1.tar": TEN})
    with pytest.raises(UserError, match=words):
        sources.open_source(tmp_path)


ENDINGS = ("gif", "bmp", "tif", "tiff", "jfif", "jpe", "webp", "jp2", "tga", "ppm", "avif", "qoi",
    "apng", "dib", "ico", "GIF", "Tif")  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_of_all_endings_are_read(tmp_path, kind):
    """Fails for an ending that Pillow reads and the source does not."""
    forms = Image.registered_extensions()
    content = {}
    for ending in ENDINGS:
        form = forms["." + ending.lower()]
        if form == "AVIF":
            continue  # not in all builds of Pillow
        content |= {f"{ending}-x.{ending}": image_bytes(form), f"{ending}-x.txt": ending}
    if kind == "tar":
        content = {"0.tar": tar_bytes(content.items())}
    found = read(write(tmp_path, content))
    assert sorted(found.values()) == sorted(set(ENDINGS) - {"avif"})


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_is_not_read_is_listed_with_the_reason(tmp_path, kind):
    """Fails when a video, a drawing or a captioned file of another format is passed over."""
    content = {"a.png": PNG, "a.txt": "an a", "b.mp4": "video", "b.txt": "of b", "c.svg": "<svg/>",
        "d.HEIC": "heic", "d.txt": "of d", "f.png": PNG, "f.txt": "an f", "f.npz": "features",
        "README.md": "x"}  # fmt: skip
    names = {"b": "b.mp4", "c": "c.svg", "d": "d.HEIC"}
    if kind == "tar":
        content = {"0.tar": tar_bytes(content.items())}
        names = dict(zip(names, names, strict=True))
    else:
        content |= {"e.blend": "other", "e.txt": "of e"}
    prefix = "0.tar:" if kind == "tar" else ""
    expected = {
        prefix + names["b"]: "[.mp4 files are not read]",
        prefix + names["c"]: "[.svg files are not read]",
        prefix + names["d"]: "[.heic files are not read]",
    }
    a = {"0.tar:a": "an a", "0.tar:f": "an f"} if prefix else {"a.png": "an a", "f.png": "an f"}
    other = {} if prefix else {"e.blend": "[.blend files are not read]"}
    assert read(write(tmp_path, content)) == expected | a | other


@pytest.mark.parametrize(
    "content, first, second",
    [
        (["0.tar", "sub/1.tar"], "tars", "sub/1.tar"),
        (["0.tar", "p.png", "p.txt"], "tars", "p.png"),
        (["0.tar", "sub/p.gif"], "tars", "sub/p.gif"),
        (["0.tar", "1.tar.gz"], "tars", "1.tar.gz"),
        (["0.TAR", "1.zip"], "tars", "1.zip"),
        (["p.png", "p.txt", "sub/1.tar"], "captioned images", "sub/1.tar"),
        (["p.png", "p.txt", "images.ZIP"], "captioned images", "images.ZIP"),
        (["p.png", "p.txt", "t/1.0.0/dataset_info.json"], "captioned images", "dataset_info.json"),
        (["dataset_info.json", "features.json", "0.tar"], "a TFDS data set", "0.tar"),
        (["dataset_info.json", "features.json", "p.png"], "a TFDS data set", "p.png"),
    ],
)
def test_a_folder_of_two_kinds_is_refused(tmp_path, content, first, second):
    """Fails when one of the kinds is read and the other passed over."""
    made = {".tar": TEN, ".png": PNG, ".gif": PNG, ".txt": b"caption"}
    write(tmp_path, {name: made.get(name[-4:].lower(), b"{}") for name in content})
    with pytest.raises(UserError, match=f"holds {first}.* and also .*{second}") as caught:
        sources.open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_packed_archive_alone_is_named(tmp_path):
    write(tmp_path, {"a.tar.gz": b"\x1f\x8b", "notes.md": "x"})
    with pytest.raises(UserError, match="a.tar.gz is packed: unpack it"):
        sources.open_source(tmp_path)


def test_two_captions_of_one_image_are_listed(tmp_path):
    """Fails when one of two captions that differ silently wins."""
    rows = [("a", "one"), ("b", "one"), ("b", "two"), ("c", "same"), ("c", "same"), ("d", "one")]
    lines = [json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in rows]
    content = {f"{name}.png": PNG for name in "abcdefg"}
    content |= {"metadata.jsonl": "\n".join(lines), "d.txt": "two", "c.txt": "same\n"}
    content |= {"e.txt": "one", "e.TXT": "two", "f.TXT": "f", "F.txt": "F", "g.txt": "g"}
    differ = "[two captions: that of metadata.jsonl is not that of its .txt]"
    assert read(write(tmp_path, content)) == {
        "a.png": "one", "b.png": "[two captions]", "c.png": "same", "d.png": differ,
        "e.png": "[two captions]", "f.png": "f", "g.png": "g"}  # fmt: skip


def test_pointers_of_git_lfs_are_named(tmp_path):
    """Every image of a repository that was cloned without its large files is such a pointer."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    assert read(write(tmp_path, {"a.png": pointer, "a.txt": "a"})) == {
        "a.png": "[a pointer of Git LFS, not the image]"
    }


def test_links_that_lead_nowhere_are_listed(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.txt": "a", "b.txt": "b"})
    (tmp_path / "b.png").symlink_to("gone.png")
    assert read(tmp_path) == {"a.png": "a", "b.png": "[missing picture]"}


def test_an_ambiguous_name_of_the_official_listing_is_listed(tmp_path):
    listing = json.dumps({"img_names": ["1", "2"]})
    content = {"1.png": PNG, "1.jpg": image_bytes("JPEG"), "1.txt": "x", "meta_data.json": listing}
    content |= {"2.GIF": image_bytes("GIF"), "2.txt": "y"}
    assert read(write(tmp_path, content)) == {"1.png": "[two images of that name]", "2.GIF": "y"}


HIDDEN = (".Trash-1000/files/t.png", "._a.png", "__MACOSX/m.png", "x/.ipynb_checkpoints/c.png",
    "@eaDir/a.png", "$Recycle.Bin/r.png", "#recycle/s.png", ".png")  # fmt: skip


def with_captions(names):
    """Return {file: content} of images and captions, a caption naming its image."""
    pairs = (((name, PNG), (os.path.splitext(name)[0] + ".txt", name)) for name in names)
    return dict(pair for two in pairs for pair in two)


def test_hidden_files_are_never_read(tmp_path):
    """Fails when one of the readers of folders has a rule of its own."""
    from sprint_jax.data import condition
    from sprint_jax.evaluation import image_sets

    root = write(tmp_path / "f", with_captions(["x/a.png", *HIDDEN]))
    assert read(root) == {"x/a.png": "x/a.png"}
    assert image_sets.found(root) == [root / "x/a.png"]
    found = condition.targets(root, tmp_path / "out", image_sets.found)
    assert list(found.values()) == [root / "x/a.png"]
    rows = [{"file_name": name, "text": "t"} for name in ("x/a.png", *HIDDEN)]
    write(root, {"x/a.txt": "t", "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert read(root) == {"x/a.png": "t"} | dict.fromkeys(HIDDEN, "[hidden file]")


def test_hidden_members_and_tars_are_never_read(tmp_path):
    members = with_captions(["./x/a.png", "../b.png", *HIDDEN]).items()
    content = {"0.tar": tar_bytes(members), "._0.tar": b"\0\5\x16\7", ".cache/1.tar": TEN}
    assert read(write(tmp_path, content)) == {"0.tar:x/a": "./x/a.png", "0.tar:../b": "../b.png"}


def test_hidden_samples_of_geneval_are_not_scored(tmp_path):
    from sprint_jax.evaluation import options, records

    row = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    write(
        tmp_path,
        {
            "00000/metadata.jsonl": json.dumps(row),
            "00000/samples/00000.png": PNG,
            "00000/samples/._00000.png": b"\0",
            ".Trash-1000/metadata.jsonl": json.dumps(row),
            ".Trash-1000/samples/00000.png": PNG,
        },
    )
    found = records._geneval_images(
        options.Options(suite="geneval", folder=str(tmp_path), detections="x"), None
    )
    assert [file for file, _ in found] == ["00000/samples/00000.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    write(tmp_path, {"a.png": PNG, "a.txt": "a", "b/b.png": PNG})
    (tmp_path / "b").chmod(0)
    with pytest.raises(UserError, match="cannot read the folder"):
        list(files.below(tmp_path))


def test_names_in_another_case_are_found(tmp_path):
    """Fails when A.JPG lacks the caption A.TXT, and when a table's names must agree in case."""
    jpeg = image_bytes("JPEG")
    root = write(tmp_path / "f", {"A.JPG": jpeg, "A.TXT": "upper", "b.Png": PNG, "B.txt": "other",
        "é.png": PNG, "E\u0301.txt": "accent", "c.png": PNG, "C.png": PNG, "c.txt": "small",
        "C.txt": "large"})  # fmt: skip
    assert read(root) == {"A.JPG": "upper", "b.Png": "other", "é.png": "accent", "c.png": "small",
        "C.png": "large"}  # fmt: skip
    rows = [{"file_name": name, "text": name} for name in ("sub/a.PNG", "SUB\\b.png", "gone.png")]
    root = write(tmp_path / "m", {"Sub/A.png": PNG, "Sub/b.png": PNG,
        "Metadata.JSONL": "\n".join(map(json.dumps, rows))})  # fmt: skip
    assert read(root) == {"Sub/A.png": "sub/a.PNG", "Sub/b.png": "SUB\\b.png",
        "gone.png": "[missing picture]"}  # fmt: skip
    write(root, {"sub/A.png": PNG})
    with pytest.raises(UserError, match="line 1: sub/a.PNG may be Sub/A.png or sub/A.png"):
        read(root)
    write(tmp_path / "t", {"UP.TAR": tar_bytes([("A.JPG", jpeg), ("a.txt", b"lower"),
        ("B.PNG", PNG), ("B.JSON", b'{"prompt": "upper"}')])})  # fmt: skip
    assert read(tmp_path / "t") == {"UP.TAR:A": "lower", "UP.TAR:B": "upper"}


WRONG, NULS = (
    "[caption is not UTF-8]",
    "[caption holds NUL characters, as UTF-16 without a byte-order mark does]",
)


@pytest.mark.parametrize(
    "data, expected",
    [
        ("café".encode("latin-1"), WRONG),
        ("a café 猫".encode("utf-16"), "a café 猫"),
        ("a café".encode("utf-16-be"), WRONG),
        ("\ufeffa 猫".encode("utf-16-be"), "a 猫"),
        ("\ufeffa 猫".encode("utf-32-le"), "a 猫"),
        ("a fox".encode("utf-16-le"), NULS),
        (b"a\0fox", NULS),
        ("\ufeffa 猫\r\n".encode(), "a 猫"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_encodings_of_captions(tmp_path, kind, data, expected):
    """Fails when UTF-16 without a mark passes with NULs, and when a reason names no encoding."""
    if kind == "tar":
        found = read_tar(tmp_path, tar_bytes([("a.png", PNG), ("a.txt", data)]))
    else:
        found = read(write(tmp_path, {"a.png": PNG, "a.txt": data}))
    assert list(found.values()) == [expected]


def test_encodings_of_fields(tmp_path):
    """Captions in JSON: a list of strings counts by its first one that is not blank."""
    forms = [
        ('{"prompt": ["", "one", "uno"]}', "one"), ('{"prompt": ["one", 2]}', "[missing caption]"),
        ('{"prompt": []}', "[missing caption]"), ('{"prompt": "a\\u0000b"}', NULS),
        ('{"prompt": "café"}'.encode("latin-1"), WRONG), ('\ufeff{"prompt": "é"}', "é"),
        ('{"prompt": "é"}'.encode("utf-16"), "é"), ('{"prompt": "x"', "[corrupt record]"),
    ]  # fmt: skip
    members = []
    for i, (data, _) in enumerate(forms):
        members += [(f"{i}.png", PNG), (f"{i}.json", data)]
    found = read_tar(tmp_path / "t", tar_bytes(members))
    assert list(found.values()) == [expected for _, expected in forms]
    lines = '{"file_name": "a.png", "text": ["one", "uno"]}\n{"file_name": "b.png", "text": "é"}'
    for name in ("utf-8-sig", "utf-16"):
        root = write(tmp_path / name, {"a.png": PNG, "b.png": PNG,
            "metadata.jsonl": lines.encode(name)})  # fmt: skip
        assert read(root) == {"a.png": "one", "b.png": "é"}
    write(root, {"metadata.jsonl": lines.encode("latin-1")})
    with pytest.raises(UserError, match="metadata.jsonl is not UTF-8"):
        read(root)


def test_a_huge_tail_of_zeros_is_passed_quickly(tmp_path):
    """A sparse download of a gigabyte ends in zeros; they are read in large parts."""
    write(tmp_path, {"0.tar": TEN[: 5 * EACH]})
    with open(tmp_path / "0.tar", "r+b") as file:
        file.truncate(2**27 + 512 * 7)
    assert read(tmp_path) == good(*range(5)) | {f"0.tar:byte {5 * EACH}": ZEROS}


def test_sizes_beyond_eight_gibibytes_and_signed_checksums(tmp_path):
    """Both are old variants of headers that GNU tar reads."""
    data = bytearray(tar_bytes([("é.png", PNG), ("é.txt", b"signed")], tarfile.GNU_FORMAT))
    for at in (0, 512 + -(-len(PNG) // 512) * 512):
        size = int(data[at + 124 : at + 135], 8)
        data[at + 124 : at + 136] = b"\x80" + size.to_bytes(11, "big")
        data[at + 148 : at + 156] = b" " * 8
        signed = sum(struct.unpack("512b", data[at : at + 512]))
        data[at + 148 : at + 156] = b"%06o\0 " % signed
    assert read_tar(tmp_path, bytes(data)) == {"0.tar:é": "signed"}
