"""Judges of training by a reward."""


def broken(prompts, images):
    """Fail as a judge without its weights does."""
    raise OSError("weights.bin is missing")
