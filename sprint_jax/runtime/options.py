"""Command-line options as frozen dataclasses.

`parse` builds one from arguments, Python callers build it themselves.

A field's type decides its form on the command line: `str`, `int`, `float`, `Literal` and `bool` are
single flags, `files.LocalPath` is a text that names a file or folder, `tuple[X, ...]` is one flag
with commas between values, `list[str]` is a flag that may be repeated, and `X | None` is any of
these without a default. The string below a field is its help.
A trailing underscore is dropped from a flag's name: `from_` is `--from`.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from sprint_jax.errors import UserError
from sprint_jax.storage import files

T = TypeVar("T")

OVERRIDES = "overrides"  # the field that collects --config.KEY=VALUE, as KEY=VALUE
_WORDS = {int: "INT", float: "NUMBER", str: "TEXT"}
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def parse(options: type[T], arguments: Sequence[str], *, prog: str, description: str | None) -> T:
    """Return the options that command-line arguments spell out.

    Args:
      options: the dataclass. Every field has a default.
      arguments: what follows the command's name. `--help` prints every option and exits.
      prog: the command as it was typed, for the first line of the help.
      description: text of the help, above the options.

    Raises UserError for an unknown flag, a value of the wrong type, a flag without its value and
    for anything that is no flag.
    """
    import tyro

    collected, tokens = [], []
    for token in _normalized(options, arguments, prog):
        (collected if _is_override(token) else tokens).append(token)
    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(lambda info: _struct(info.type) if info.type is options else None)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                options,
                prog=prog,
                description=(description or "").strip(),
                args=tokens,
                use_underscores=True,
                compact_help=False,
                registry=registry,
                config=(tyro.conf.UseAppendAction, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(said.getvalue())) from None
    if not collected:
        return parsed
    pairs = tuple(token.removeprefix("--config.") for token in collected)
    replace: Any = dataclasses.replace  # T is a dataclass, which no bound can say
    return replace(parsed, **{OVERRIDES: pairs})


def _is_override(token: str) -> bool:
    return token.startswith("--config.")


def _flag(field: dataclasses.Field) -> str:
    return field.name.rstrip("_")


def _normalized(options: type, arguments: Sequence[str], prog: str) -> Iterator[str]:
    """Yield the arguments as `--name=value`, then `--name` for booleans without their default.

    Raises UserError for what names no flag, and for a flag without its value.
    """
    fields = {_flag(field): field for field in dataclasses.fields(options)}
    takes_overrides = OVERRIDES in fields and fields.pop(OVERRIDES)
    hints = typing.get_type_hints(options)
    switches = {}
    rest = iter(arguments)
    for token in rest:
        if token in ("-h", "--help", "--helpfull"):
            yield "--help"
            continue
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}: flags look like --name=value")
        name, equals, value = token[2:].partition("=")
        if takes_overrides and name.startswith("config."):
            yield token if equals else f"{token}={_next(rest, name)}"
            continue
        name, negated = name.replace("-", "_"), False
        if name not in fields and name.startswith("no"):
            shorter = name.removeprefix("no").removeprefix("_")
            if shorter in fields and hints[fields[shorter].name] is bool and not equals:
                name, negated = shorter, True
        if name not in fields:
            raise UserError(_unknown(name, list(fields), prog))
        if hints[fields[name].name] is bool:
            switches[name] = not negated and (not equals or _truth(name, value))
            continue
        yield f"--{name}={value if equals else _next(rest, name)}"
    for name, wanted in switches.items():
        if wanted != fields[name].default:
            yield f"--{name}" if wanted else f"--no_{name}"


def _next(rest: Iterator[str], name: str) -> str:
    value = next(rest, None)
    if value is None or value.startswith("--"):
        raise UserError(f"--{name} has no value: write --{name}=value")
    return value


def _truth(name: str, value: str) -> bool:
    if value.lower() not in _TRUE + _FALSE:
        raise UserError(f"--{name}={value}: use True or False")
    return value.lower() in _TRUE


def _unknown(name: str, known: list[str], prog: str) -> str:
    near = difflib.get_close_matches(name, known, 1)
    remedy = f"did you mean --{near[0]}?" if near else f"{prog} --help lists those it has"
    return f"unknown flag --{name}: {remedy}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One option as the command line has it.

    name: without dashes. value: a placeholder for its value, "" for a boolean.
    default: as it is written, "" for none. help: its text, on one line.
    """

    name: str
    value: str
    default: str
    help: str


def flags(options: type) -> dict[str, Flag]:
    """Return {field: flag} of a dataclass of options."""
    hints, help_of, found = typing.get_type_hints(options), field_docs(options), {}
    marked = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        default, hint = _default(field), hints[field.name]
        found[field.name] = Flag(
            name=_flag(field),
            value="" if hint is bool else _placeholder(hint, files.is_path(marked[field.name])),
            default="" if default in (None, "", (), []) or hint is bool else _shown(default),
            help=" ".join(help_of.get(field.name, "").split()),
        )
    return found


def _struct(options: type) -> Any:
    """Return the dataclass as tyro's list of fields, each with its own reader of values."""
    import tyro

    hints, known, fields = typing.get_type_hints(options), flags(options), []
    for field in dataclasses.fields(options):
        hint, flag = hints[field.name], known[field.name]
        hidden = [tyro.conf.Suppress] if field.name == OVERRIDES else []
        given = f"(default: {flag.default})" if flag.default else ""
        markers = [tyro.conf.arg(name=flag.name, help_behavior_hint=given), *hidden]
        if hint is not bool and typing.get_origin(hint) is not list:
            markers.append(_reader(flag, hint))
        fields.append(
            tyro.constructors.StructFieldSpec(
                name=field.name,
                type=typing.Annotated[(hint, *markers)],  # pyright: ignore
                default=_default(field),
                helptext=flag.help,
            )
        )
    return tyro.constructors.StructConstructorSpec(instantiate=options, fields=tuple(fields))


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is dataclasses.MISSING:
        raise TypeError(f"option {field.name} needs a default: the command says what is missing")
    return field.default


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _reader(flag: Flag, hint: Any) -> Any:
    """Return tyro's specification of one flag: its placeholder and its reader."""
    import tyro

    kind, several = _kind(hint)

    def read(texts: list[str]) -> Any:
        text = texts[0]
        if not several:
            return _value(flag.name, text, kind, text)
        parts = [part.strip() for part in text.split(",")] if text else []
        return tuple(_value(flag.name, part, kind, text, several=True) for part in parts)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=flag.value,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_shown(value)],
    )


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return (int, float, str or a Literal; whether there may be several with commas between)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _placeholder(hint: Any, path: bool) -> str:
    kind, several = _kind(hint)
    if typing.get_origin(kind) is list:
        (kind,) = typing.get_args(kind)
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    word = f"{{{','.join(choices)}}}" if choices else "PATH" if path else _WORDS[kind]
    return word + (",..." if several else "")


def _value(name: str, text: str, kind: Any, given: str, *, several: bool = False) -> Any:
    """Return one value. given: the whole text of the flag. Raises UserError where it is none."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            some = "some of" if several else "one of"
            raise UserError(f"--{name}={given}: use {some} {', '.join(choices)}")
        return text
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        remedy = f"give {what}s with commas between" if several else f"use a {what}"
        raise UserError(f"--{name}={given}: {remedy}") from None


def field_docs(options: type) -> dict[str, str]:
    """Return {field: the string below it}, of the dataclass and those that it inherits from."""
    docs = {}
    for part in reversed(options.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    docs[field.target.id] = inspect.cleandoc(str(below.value.value))
    return docs


def _one_line(box: str) -> str:
    """Return the first paragraph of a message that tyro draws in a box, without the box."""
    lines = [line.strip("│| ") for line in box.splitlines()]
    kept = []
    for line in lines:
        if kept and (not line or set(line) <= set("─-")):
            break
        if line and not set(line[:1]) & set("╭╰+"):
            kept.append(line)
    return " ".join(kept) or "these arguments cannot be read"
