"""safetensors files against the library's own readers and writers."""

import io
import os
import stat
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from sprint_jax.errors import UserError
from sprint_jax.storage import safetensors_files, weights


def arrays():
    draw = np.random.default_rng(0).standard_normal
    return {
        "large": draw((70, 5)).astype(np.float32),
        "brain": draw((3, 4, 2)).astype(ml_dtypes.bfloat16),
        "half": draw((9,)).astype(np.float16),
        "number": np.array(draw(), np.float32),
        "none": np.zeros((0, 4), np.float32),
    }


@pytest.mark.parametrize("arrange", [None, lambda a: a])
def test_tensors_are_read_as_the_library_reads_them(tmp_path, monkeypatch, arrange):
    """In pieces as well: fails when a piece starts at another row, or the last one is dropped."""
    monkeypatch.setattr(safetensors_files, "_PIECE", 16)
    safetensors.numpy.save_file(arrays(), tmp_path / "a.safetensors")
    found = safetensors_files.scan(tmp_path / "a.safetensors")
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        for dtype in (array.dtype, np.float64):
            out = np.full((2, *array.shape), 7, dtype)
            safetensors_files.read(found[name], out[1, ...], arrange)
            np.testing.assert_array_equal(out[1], array.astype(dtype))
            assert (out[0] == 7).all()


def test_a_tensor_goes_to_any_view(tmp_path):
    """Columns of a larger array are no contiguous memory."""
    safetensors.numpy.save_file(arrays(), tmp_path / "a.safetensors")
    tensor, out = safetensors_files.scan(tmp_path / "a.safetensors")["large"], np.zeros((70, 10))
    safetensors_files.read(tensor, out[:, 2:7])
    np.testing.assert_array_equal(out[:, 2:7], arrays()["large"])
    assert not out[:, :2].any() and not out[:, 7:].any()


def test_written_files_are_the_librarys_and_open_to_others(tmp_path):
    """Fails when strides are ignored, or the file keeps the library's mode of 600."""
    turned = {"turned": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    safetensors_files.write_file(tmp_path / "a.safetensors", turned, metadata={"k": "v"})
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found["turned"], turned["turned"])
    assert safetensors_files.metadata(tmp_path / "a.safetensors") == {"k": "v"}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_full_disk_keeps_its_number(tmp_path):
    """The library hides it in a text; command lines need it for their remedy."""
    program = (
        "import resource, signal, sys, numpy as np\n"
        "from sprint_jax.storage import safetensors_files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    safetensors_files.write_file(sys.argv[1], {'a': np.zeros(10000)})\n"
        "except OSError as error:\n"
        "    print(error.errno, error.strerror)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "27 File too large\n", result.stderr


def test_streams_hold_what_the_library_reads():
    """What is streamed is a safetensors file, and every cut of it is noticed."""
    flat = {"b": np.arange(6, dtype=np.int32).reshape(2, 3), "a": arrays()["brain"]}
    stream = io.BytesIO()
    safetensors_files.write_stream(stream, flat)
    library = dict(safetensors.deserialize(stream.getvalue()))
    stream.seek(0)
    ours = dict(safetensors_files.read_stream(stream))
    assert list(ours) == list(flat)
    for name, array in flat.items():
        np.testing.assert_array_equal(ours[name], array)
        assert bytes(library[name]["data"]) == array.tobytes()
    for damaged in (stream.getvalue()[:-1], stream.getvalue() + b"x"):
        with pytest.raises(ValueError, match="cut off|bytes after"):
            list(safetensors_files.read_stream(io.BytesIO(damaged)))


@pytest.mark.parametrize("content", [b"", b"12345678", b"\2" + bytes(7) + b"{}x", b"\2" + bytes(7)])
def test_damaged_files_are_one_line(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a.safetensors is not a whole safetensors file \(.*copy"):
        safetensors_files.scan(tmp_path / "a.safetensors")


def test_files_that_are_not_there_are_one_line(tmp_path):
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf"cannot read .* \({why}.*\): give an existing"):
            safetensors_files.scan(path)


def test_a_tree_is_read_within_its_own_size(tmp_path):
    """Fails when the library's mapping of the file counts beside the arrays."""
    tree = {"net": {str(i): np.full((1 << 20,), i, np.float32) for i in range(64)}}
    weights.save(tmp_path / "a.safetensors", tree)
    program = (
        "import re, sys, numpy as np, jax\n"
        "from sprint_jax.storage import weights\n"
        # Of this program alone: the maximum of getrusage includes the process that started it.
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status())[1]) / 2**10\n"
        "shape = jax.ShapeDtypeStruct((1 << 20,), np.float32)\n"
        "before = peak()\n"
        "tree = weights.load(sys.argv[1], {'net': {str(i): shape for i in range(64)}})\n"
        "assert all((leaf == int(i)).all() for i, leaf in tree['net'].items())\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert float(result.stdout) < 1.3 * 256, result.stdout + result.stderr
