"""Configuration cards, by name or by file: `sprint`, `sprint:smoke`, `configs/sprint.py:smoke`.

A card is a module with `get_config`, which returns a ConfigDict and may take a preset. The shipped
cards are `sprint_jax.cards` (`configs/` of a checkout). Values of a card are replaced by overrides,
texts KEY=VALUE with dots between the keys, as `--config.KEY=VALUE` has them on the command line.
"""

import importlib
import importlib.util
import pathlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from sprint_jax.errors import UserError
from sprint_jax.runtime.renamed_keys import renamed
from sprint_jax.storage import files

_PACKAGE = "sprint_jax.cards"


def load(card: str, overrides: Sequence[str] = (), *, flag: str = "config") -> ConfigDict:
    """Return the configuration of a card, with its values replaced by the overrides.

    Args:
      card: NAME or FILE.py, and perhaps :PRESET.
      overrides: KEY=VALUE each, values as on the command line.
      flag: the option that gave the card, for error messages.

    Raises UserError if there is no such card, preset or key, for a value of another type, and for
    an address instead of a file.
    """
    if not card:
        raise UserError(f"--{flag} is missing: use --{flag}=configs/sprint.py")
    name, preset = split(files.given(card, f"--{flag}"))
    module = _import_file(name, card, flag) if name.endswith(".py") else _import_name(name, flag)
    get_config: Any = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"--{flag}={card}: {name} has no get_config, it is no config file; use "
            "configs/sprint.py:PRESET"
        )
    tree: Any = get_config(preset) if preset else get_config()
    return override(tree, overrides)


def split(card: str) -> tuple[str, str]:
    """Return (name or file, preset) of a card; the preset is "" if none was given."""
    name, _, preset = card.partition(":")
    return name, preset


def is_card(text: str) -> bool:
    """Return whether a text names a card: a .py file, or a shipped card that is no folder."""
    name, _ = split(text)
    return name.endswith(".py") or (name in shipped() and not pathlib.Path(text).is_dir())


def shipped() -> list[str]:
    """Return the names of the cards that come with the package."""
    package = importlib.import_module(_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _import_name(name: str, flag: str) -> ModuleType:
    known = shipped()
    if name not in known:
        raise UserError(
            f"no card --{flag}={name}: use one of {', '.join(known)}, or the path of a .py file"
        )
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _import_file(path: str, card: str, flag: str) -> ModuleType:
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(
            f"no config file --{flag}={card}: use --{flag}=configs/sprint.py in a checkout, or the "
            f"name of a shipped card, {', '.join(shipped())}"
        )
    spec = importlib.util.spec_from_file_location(f"_card_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a file of somebody else raises
        raise UserError(
            f"config file {path} cannot be imported ({type(error).__name__}: {error}): fix it"
        ) from None
    return module


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Return the configuration with values replaced, each KEY=VALUE.

    The values are parsed by ml_collections, as those of `python -m sprint_jax.main`. Raises
    UserError for an unknown key and for a value of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    if not overrides:
        return config
    arguments = ["", *(f"--config.{pair}" for pair in overrides)]
    values = flags.FlagValues()
    try:
        found = config_flags.DEFINE_config_dict(
            "config", config, sys_argv=arguments, flag_values=values
        )
        values(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(explain(error, arguments)) from None
    return found.value


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """Return one line for an error that ml_collections raised about `--config` and its keys."""
    if line := _unknown_key(error, arguments):
        return line
    # The message about a config file that raises holds its whole traceback; the last line says it.
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if "Traceback" in str(error) else " ".join(lines)


def _unknown_key(error: BaseException, arguments: Sequence[str]) -> str | None:
    """Return the line for a flag --config.KEY whose key the config does not have, else None."""
    while isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
        error = error.args[0]
    if not isinstance(error, KeyError):
        return None
    # ml_collections' own words; str(error) would put them in quotes.
    name, *hint = str(error.args[0]).splitlines()
    for key in (word.lstrip("-").partition("=")[0] for word in arguments[1:]):
        if key.startswith("config.") and name.strip("'") in key.split("."):
            if new := renamed(key.removeprefix("config.")):
                return f"unknown config key {key}: it is config.{new} now"
            remedy = " ".join(hint) or "see the config file for those that it has"
            return f"unknown config key {key}: {remedy}"
    return None
