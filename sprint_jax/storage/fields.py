"""Fields of JSON objects that other programs or versions wrote: what each of them may hold."""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from sprint_jax.errors import UserError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = _SHORT.maxdict = 8
_LARGEST = 2**24  # of a size; what is larger is damaged, and would take hours to describe
_MOST_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may hold.

    words: says it, after "must be" in the error line. accepts: value -> whether it is one.
    """

    words: str
    accepts: Callable[[Any], bool]

    def or_null(self) -> "Kind":
        """Return the kind that also holds null."""
        return Kind(f"{self.words}, or null", lambda v: v is None or self.accepts(v))

    def many(self) -> "Kind":
        """Return the kind of lists of such values."""
        every = lambda v: isinstance(v, list | tuple) and all(map(self.accepts, v))
        return Kind(f"a list, each of its values {self.words}", every)

    def or_many(self) -> "Kind":
        """Return the kind that holds such a value, or a list of them."""
        many = self.many()
        accepts = lambda v: self.accepts(v) or (v != [] and many.accepts(v))
        return Kind(f"{self.words}, or a list of such", accepts)


def _is_number(value):
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_float(value):
    """Return whether a number stays finite and nonzero as float32."""
    return _is_number(value) and -1e38 < value < 1e38


SIZE = Kind(f"a whole number from 1 to {_LARGEST}", lambda v: type(v) is int and 1 <= v <= _LARGEST)
LAYERS = Kind(
    f"a whole number from 1 to {_MOST_LAYERS}", lambda v: type(v) is int and 1 <= v <= _MOST_LAYERS
)
NUMBER = Kind("a number", _is_float)
POSITIVE = Kind("a number above 0", lambda v: _is_float(v) and v > 1e-38)
FLAG = Kind("true or false", lambda v: type(v) is bool)
TEXT = Kind("text", lambda v: type(v) is str)
OBJECT = Kind("an object", lambda v: type(v) is dict)
ANY = Kind("anything", lambda v: True)
ODD = Kind("an odd number", lambda v: SIZE.accepts(v) and v % 2 == 1)


def only(*values: Any) -> Kind:
    """Return the kind of a field that has one right value, or a few."""
    same = lambda v, one: v == one and (type(v) is bool) == (type(one) is bool)
    return Kind(" or ".join(map(repr, values)), lambda v: any(same(v, one) for one in values))


def shown(value: Any) -> str:
    """Return a value for an error line, shortened where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return "a number of thousands of digits"


def name(value: Any) -> str:
    """Return a name for an error line: as it is, or shortened where it is long or no text."""
    return value if isinstance(value, str) and len(value) < 60 else shown(value)


def check(given: Mapping[str, Any], kinds: Mapping[str, Kind], what: str) -> None:
    """Raise UserError naming the first field that is unknown, or holds what it may not.

    what: names the object in the line, such as "the transformer config".
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{what} is {shown(given)}: it must be an object")
    for field in sorted(given, key=str):
        if field not in kinds:
            raise UserError(
                f"{what} has {name(field)}={shown(given[field])}, which is not supported here"
            )
        if not kinds[field].accepts(given[field]):
            raise UserError(
                f"{what} has {field}={shown(given[field])}; only {kinds[field].words} is supported"
            )


def kinds_of(described: type) -> dict[str, Kind]:
    """Return the kinds of the fields of a dataclass, by their types: int, float, bool and str."""
    by_type = {int: SIZE, float: POSITIVE, bool: FLAG, str: TEXT}
    return {field.name: by_type.get(field.type, ANY) for field in dataclasses.fields(described)}
