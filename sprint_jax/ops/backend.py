"""Choosing what computes attention and depthwise convolutions.

"plain"      no kernel: JAX operations, compiled by XLA
"interpret"  the kernel body run as JAX operations; slow, works anywhere, for tests
"triton"     the kernel compiled by Pallas' Triton backend, for NVIDIA GPUs
"tpu"        the kernel compiled by Mosaic, for TPUs

Image generation on an NVIDIA GPU uses kernels by default, where they were measured to be faster.
Training uses them only on request, since its numbers on a GPU were not compared with "plain".
"""

import jax

BACKENDS = ("plain", "interpret", "triton", "tpu")
WANTED = ("plain", "pallas")
LARGEST_HEAD = 128
# Wider heads of linear attention need 128 x 128 states, which Triton compiles for minutes or never.
LARGEST_LINEAR_HEAD = {"triton": 64, "tpu": 128}
DTYPES = ("float32", "bfloat16")

# Backends of the depthwise convolution, which has no kernel for TPUs.
DEPTHWISE = ("plain", "interpret", "triton")

_COMPILED = {"gpu": "triton", "cuda": "triton", "tpu": "tpu"}


def depthwise(platform: str, attention: str = "pallas") -> str:
    """Return the backend of depthwise convolutions that goes with an attention backend.

    Args:
      platform: as named by `jax.default_backend()`.
      attention: "plain" disables kernels of convolutions too.
    """
    found = None if attention == "plain" else _compiled(platform)
    return found if found in DEPTHWISE else "plain"


def _compiled(platform: str) -> str | None:
    """Return the backend that compiles kernels for a platform, or None."""
    found = _COMPILED.get(platform)
    return None if found == "triton" and not _ampere() else found


def _ampere() -> bool:
    """Return whether the local GPU is an NVIDIA card that XLA's Triton supports, Ampere or newer.

    AMD GPUs report "gpu" as well. Without a local GPU a program for another machine is assumed.
    """
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return True
    major = str(capability).split(".")[0]
    return major.isdigit() and int(major) >= 8


def fastest(platform: str) -> str:
    """Return the member of `WANTED` that generates images fastest on a platform.

    platform: as named by `jax.default_backend()`.
    """
    return "pallas" if _compiled(platform) == "triton" else "plain"


def launches_cost(platform: str) -> bool:
    """Return whether image generation waits for the host to prepare launches on the device."""
    return _compiled(platform) == "triton"


def resolve(
    wanted: str, platform: str, linear: int | None, cross: int | None, dtype: str
) -> tuple[str, str | None]:
    """Choose the attention backend of a device.

    Args:
      wanted: "plain" or "pallas".
      platform: as named by `jax.default_backend()`.
      linear, cross: channels per head of linear attention and of cross-attention, None if the
        networks have no such attention.
      dtype: name of the compute dtype.

    Returns:
      The backend, one of `BACKENDS`, and one line that explains why it is "plain" although kernels
      were wanted, else None.

    Raises:
      ValueError: if `wanted` is neither "plain" nor "pallas".
    """
    if wanted not in WANTED:
        raise ValueError(f"attention {wanted!r}: use one of {', '.join(WANTED)}")
    if wanted == "plain":
        return "plain", None
    found = _compiled(platform)
    reason = _unsupported(platform, found, linear, cross, dtype)
    if found is None or reason:
        return "plain", f"attention: plain JAX instead of Pallas kernels: {reason}"
    return found, None


def _unsupported(
    platform: str, found: str | None, linear: int | None, cross: int | None, dtype: str
) -> str | None:
    """Return why kernels cannot be used, or None. found: the backend of the platform, if any."""
    widths = [d for d in (linear, cross) if d is not None]
    if platform not in _COMPILED:
        supported = " and ".join(sorted(set(_COMPILED) - {"cuda"}))
        return f"there is no compiled kernel for a {platform} (only for {supported})"
    if found is None:
        return "GPU kernels need an NVIDIA GPU with compute capability 8.0 or newer"
    if any(d % 8 or not 8 <= d <= LARGEST_HEAD for d in widths):
        listed = ", ".join(map(str, sorted(set(widths))))
        return f"heads are {listed} wide and kernels take multiples of 8 up to {LARGEST_HEAD}"
    if linear is not None and linear > LARGEST_LINEAR_HEAD[found]:
        return (
            f"heads of linear attention are {linear} wide and kernels for a {platform} take up to "
            f"{LARGEST_LINEAR_HEAD[found]}"
        )
    if dtype not in DTYPES:
        return f"the compute dtype is {dtype} and kernels take {' and '.join(DTYPES)}"
    return None


_ON_GPU = ("transformer", "controlnet", "text_encoder")
_UNROLLED = {"cpu": ("transformer", "controlnet"), "gpu": _ON_GPU, "cuda": _ON_GPU}


def unrolled(platform: str | None) -> tuple[str, ...]:
    """Return the names of published networks that run unrolled on a platform.

    A scan copies each block's weights. A CPU keeps the text encoder's loop, since it would compile
    26 layers for every padded length and gain little.

    Args:
      platform: as named by `jax.default_backend()`. None for that one, "" for several platforms,
        where all networks keep their loops.
    """
    return _UNROLLED.get(jax.default_backend() if platform is None else platform, ())
