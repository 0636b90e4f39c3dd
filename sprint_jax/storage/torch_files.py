"""PyTorch's own weight files. Other code opens safetensors only; this is for networks published in no other form."""

from sprint_jax.errors import UserError


def read(path, elsewhere):
    """{name: NumPy array} of a .pth file, without running any code of the file. Needs PyTorch.

    elsewhere: what to do on a machine with PyTorch, for the error line where there is none. Raises UserError.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} can only be read where PyTorch is installed: {elsewhere}"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.numpy() for name, value in state.items()}
    except Exception as error:  # the library raises many kinds for a damaged file
        raise UserError(
            f"{path} is not a state dict of PyTorch ({' '.join(str(error).split())[:120]}): download it again"
        ) from None
