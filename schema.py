"""schema.py - what JSON files may hold: types and ranges, checked as a file is read.

JSON has no types, and files come from other programs, other people and damaged disks: "false" is a text and
true, a list may stand in a number's place, a model may claim to have a million layers. A schema names the
fields that a reader uses, each with its `Kind`; `checked` refuses everything else by file and field, before
anything is computed with it. Fields that no schema names are left alone.
What differs from the paper: nothing; it does not speak of files.

    python -m doctest schema.py        runs the example below
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from console import shown
from run import UserError


@dataclass(frozen=True)
class Kind:
    """What a field may hold. name: in words, for messages. holds: whether a value is of this kind. may_lack:
    whether the field may be missing or null."""

    name: str
    holds: Callable[[object], bool]
    may_lack: bool = False


Schema = dict[str, Kind]


def checked(value, schema: Schema, where: str) -> dict:
    """The value, an object whose fields are as the schema has them; else a UserError that says which is not.

    >>> checked({"layers": "12"}, {"layers": integer(1, 1000)}, "config.json")
    Traceback (most recent call last):
    run.UserError: config.json: 'layers' is '12', not a whole number from 1 to 1000
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {shown(value)}, not a JSON object")
    for field, kind in schema.items():
        found = value.get(field)
        if found is None and kind.may_lack:
            continue
        if field not in value:
            raise UserError(f"{where}: {field!r} is missing; it should be {kind.name}")
        if not kind.holds(found):
            raise UserError(f"{where}: {field!r} is {shown(found)}, not {kind.name}")
    return value


# ------------------------------------------------------------------------- kinds

def integer(low: int, high: int) -> Kind:
    """Whole numbers; true and false are none."""
    return Kind(f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high)


def real(low: float, high: float) -> Kind:
    """Numbers, which are neither nan nor infinite."""
    return Kind(f"a number from {low:g} to {high:g}",
                lambda x: type(x) in (int, float) and low <= x <= high and math.isfinite(x))


def one_of(*choices: str) -> Kind:
    """These texts."""
    return Kind(f"one of {', '.join(choices)}", lambda x: isinstance(x, str) and x in choices)


def listing(kind: Kind, least: int = 0) -> Kind:
    """Lists of one kind."""
    number = f" of at least {least}" if least else ""
    return Kind(f"a list{number}, each {kind.name}",
                lambda x: isinstance(x, list) and len(x) >= least and all(map(kind.holds, x)))


def record(schema: Schema) -> Kind:
    """Objects with fields of their own."""
    def holds(value) -> bool:
        return isinstance(value, dict) and all(
            kind.holds(value[field]) if value.get(field) is not None else kind.may_lack
            for field, kind in schema.items())

    fields = "; ".join(f"{field!r} {kind.name}" for field, kind in schema.items())
    return Kind(f"an object ({fields})", holds)


def optional(kind: Kind) -> Kind:
    """The same, or nothing: the field may be missing or null."""
    return Kind(kind.name, kind.holds, may_lack=True)


TEXT = Kind("a text", lambda x: isinstance(x, str))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))


def are_token_ids(value) -> bool:
    """Whether a value is a list of token ids. There are many and they are long, so it is read in one pass."""
    if not isinstance(value, list) or not value:
        return value == []
    return set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 2**31


TOKEN_IDS = Kind("a list of token ids", are_token_ids)
