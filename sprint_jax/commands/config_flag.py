"""The flag --config, shared by the commands that take a card: configs/FILE.py[:preset], --config.key=value."""

import pathlib

from absl import flags
from ml_collections import config_flags

from sprint_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, optionally with :preset.")


def path_and_preset():
    """(path, preset) of --config; preset is "" where none was given. Raises UserError where there is no file."""
    if CONFIG.value is None:
        raise UserError("--config is missing: use --config=configs/sprint.py")
    path, _, preset = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"no config file {path}: use --config=configs/sprint.py")
    return pathlib.Path(path), preset
