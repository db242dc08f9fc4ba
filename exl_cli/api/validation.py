"""pydantic's validation errors in the words of clients: the field, what it must be, what it is.

Error types: https://docs.pydantic.dev/latest/errors/validation_errors
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exl_cli.errors import brief

# Names of union branches in pydantic's error locations, besides list[...] and the like.
_BRANCHES = {"str", "int", "float", "bool", "Part", "Block", "Item"}

_KINDS = {
    "string_type": "a string",
    "string_sub_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
}
_JSON = {"False": "false", "True": "true"}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_LENGTHS = {
    "too_short": ("at least", "min_length", "item"),
    "too_long": ("at most", "max_length", "item"),
    "string_too_short": ("at least", "min_length", "character"),
    "string_too_long": ("at most", "max_length", "character"),
}


@dataclass(frozen=True)
class Fault:
    """The first fault of some data.

    Attributes:
        field: its place, as "messages.0.content"; empty for the whole.
        problem: a predicate, as "must be a string, got 5".
        is_missing: the field is not there.
    """

    field: str
    problem: str
    is_missing: bool = False


def first_fault(errors: Sequence[Mapping[str, Any]]) -> Fault:
    """The first of the errors that pydantic's `ValidationError.errors()` lists, which has at least one.

    Of a union, the branch that got furthest counts, or the one whose type is right: probably the one that was meant.
    """
    same_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same_field, key=lambda e: (len(e["loc"]), e["type"] == "too_long", e["type"] not in _KINDS))
    place = _place(first["loc"])
    if first["type"] == "missing":
        return Fault(place, "is missing", is_missing=True)
    if first["type"] in _KINDS:
        alike = [e["type"] for e in same_field if len(e["loc"]) == len(first["loc"]) and _place(e["loc"]) == place]
        kinds = dict.fromkeys(_KINDS[kind] for kind in alike if kind in _KINDS)
        return Fault(place, f"must be {_either(kinds)}{_got(first)}")
    return Fault(place, _problem(first))


def _place(parts: Iterable[str | int]) -> str:
    """A location without the names of union branches."""
    names = (str(part) for part in parts)
    return brief(".".join(name for name in names if not {"[", "-"} & set(name) and name not in _BRANCHES))


def _problem(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        limit = context[name]
        return f"must be {words} {int(limit) if limit == int(limit) else limit:,}{_got(error)}"
    if kind in _LENGTHS:
        words, name, unit = _LENGTHS[kind]
        count = context[name]
        return f"must have {words} {count:,} {unit}{'' if count == 1 else 's'}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", '"')
        return f"must be {_JSON.get(expected, expected)}{_got(error)}"
    if kind in ("extra_forbidden", "none_required"):
        return "is not supported; leave it out"
    return f"is invalid: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _got(error: Mapping[str, Any]) -> str:
    value = error.get("input")
    if isinstance(value, (list, tuple)):
        return ", got a list"
    if isinstance(value, Mapping):
        return ", got an object"
    if isinstance(value, (str, int, float, type(None))):
        return f", got {brief(json.dumps(value, ensure_ascii=False), 60)}"
    return ""


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
