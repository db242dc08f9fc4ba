"""The filters and tests that a template may use, each paid for before it runs.

The list is what published templates use, and near relations. The results are Jinja's, mostly by Jinja's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, cast

import markupsafe
from jinja2 import Undefined, filters, pass_context, tests
from jinja2.runtime import Context

from exl_cli.models.sandbox.meter import ITEM_BYTES, SandboxError, room
from exl_cli.models.sandbox.operations import Operations

Filter = Callable[..., Any]
_MAX_NAME = 200
_MAX_DOTS = 2
_MAX_PRECISION = 30


def _operations(context: Context) -> Operations:
    operations = context.environment.operations  # type: ignore[attr-defined]  # each context here is a Sandbox's
    assert isinstance(operations, Operations)  # noqa: S101 - for the type checker
    return operations


def _paid(run: Callable[..., Any]) -> Filter:
    """A filter that `run` makes of the operations and its arguments."""
    return pass_context(lambda context, *args, **kwargs: run(_operations(context), *args, **kwargs))


def _free(run: Callable[..., Any]) -> Filter:
    """A filter that costs the same whatever its values."""
    return pass_context(lambda context, *args, **kwargs: run(*args, **kwargs))


def _listed(operations: Operations, values: Iterable[Any]) -> Any:
    """The values, which are made a list unless they have a length: so no chain of generators can grow."""
    return values if isinstance(values, (list, tuple, dict, str, range, Undefined)) else operations.listed(values)


def _check_names(*names: Any) -> None:
    """Refuse, where an attribute, filter or test is named, what has no bound on hashing or splitting it."""
    for name in names:
        plain = isinstance(name, str) and len(name) <= _MAX_NAME and name.count(".") + name.count(",") <= _MAX_DOTS
        if not (name is None or isinstance(name, int) or plain):
            raise SandboxError("it passes something else where a name is expected")


def _lazy(run: Callable[..., Any], names: int) -> Filter:
    """`map`, `select` and the like, whose first arguments name an attribute, a filter or a test."""

    def wrapped(context: Context, values: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        _check_names(*args[:names], kwargs.get("attribute"))
        operations = _operations(context)
        items = _listed(operations, values) if values else ()  # None passes as empty, as in Jinja
        return run(context, operations.each(items), *args, **kwargs)

    return pass_context(wrapped)


def _ordered(run: Callable[..., Any]) -> Filter:
    """`sort` and the like, which compare items with each other, whole or by an attribute."""

    def wrapped(context: Context, values: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        operations = _operations(context)
        _check_names(*args, *kwargs.values())
        items = operations.copied(_listed(operations, values))
        operations.step(20 * len(items))
        # Two more: to compare without regard to case makes a copy of each text first.
        operations.weigh(items, times=2 + len(items).bit_length())
        return run(context.environment, items, *args, **kwargs)

    return pass_context(wrapped)


def _attributes(context: Context, values: Iterable[Any], attribute: Any) -> Iterable[Any]:
    _check_names(attribute)
    items = _operations(context).each(values)
    attributes: Iterable[Any] = items if attribute is None else filters.do_map(context, items, attribute=attribute)
    return attributes


@pass_context
def _join(context: Context, values: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    operations = _operations(context)
    return operations.join(str(operations.text(d)), _attributes(context, values, attribute))


@pass_context
def _sum(context: Context, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    add = _operations(context).arithmetic
    return reduce(lambda total, item: add("+", total, item), _attributes(context, values, attribute), start)


@pass_context
def _unique(context: Context, values: Iterable[Any], case_sensitive: bool = False) -> Any:
    operations = _operations(context)
    items = [operations.key(item) for item in operations.each(values)]
    operations.weigh(items, times=2)
    return filters.do_unique(context.environment, items, case_sensitive)


def _of_text(name: str) -> Filter:
    """A filter that is a method of text, for any value written out as text."""

    def run(operations: Operations, value: Any, *args: Any) -> Any:
        method = operations.method(operations.text(value), name)
        return None if method is None else method(*args)

    return _paid(run)


def _replace(operations: Operations, value: Any, old: Any, new: Any, count: int | None = None) -> Any:
    text, old, new = (str(operations.text(item)) for item in (value, old, new))
    method = operations.method(text, "replace")
    return None if method is None else method(old, new, -1 if count is None else count)


def _indent(operations: Operations, text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    spaces = len(width) if isinstance(width, str) else int(width)
    if spaces > _MAX_NAME:
        raise SandboxError("it indents by too much")
    if not isinstance(text, str):
        raise TypeError("only text can be indented")
    split = operations.method(text, "splitlines")
    operations.pay(4 * spaces * (2 + len(split()) if split else 0))
    return filters.do_indent(text, width, first, blank)


def _format(operations: Operations, value: Any, *args: Any, **kwargs: Any) -> str:
    return operations.percent(operations.text(value), kwargs or args)


def _title(operations: Operations, value: Any) -> str:
    text = operations.text(value)
    operations.pay(ITEM_BYTES * len(text))  # and each word
    return filters.do_title(text)


def _escape(operations: Operations, value: Any) -> Any:
    text = operations.text(value)
    operations.pay(6 * room(text))
    return markupsafe.escape(text)


def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if not isinstance(value, (int, float)) or abs(precision) > _MAX_PRECISION:
        raise SandboxError("it rounds something that is not a number")
    return filters.do_round(value, precision, method)


def _remainder(operations: Operations, value: Any, divisor: Any) -> Any:
    return operations.arithmetic("%", value, divisor)


def _refused(kind: str, name: str) -> Filter:
    """One that Jinja has and the lists below have not: refused where it is used, not where it is only written."""

    def run(*_: Any, **__: Any) -> None:
        raise SandboxError(f"it uses the {kind} {name!r}, which is not supported")

    return run


def _compare(name: str) -> Filter:
    return _paid(lambda operations, value, other: operations.compare(value, name, other))


FILTERS: dict[str, Filter] = {
    "abs": _free(abs),
    "capitalize": _of_text("capitalize"),
    "count": _free(len),
    "d": _free(filters.do_default),
    "default": _free(filters.do_default),
    "dictsort": _ordered(lambda environment, *args, **kwargs: filters.do_dictsort(*args, **kwargs)),
    "e": _paid(_escape),
    "escape": _paid(_escape),
    "first": pass_context(lambda context, values: filters.do_first(context.environment, values)),
    "float": _paid(lambda operations, *args, **kwargs: operations.number(filters.do_float, *args, **kwargs)),
    "format": _paid(_format),
    "indent": _paid(_indent),
    "int": _paid(lambda operations, *args, **kwargs: operations.number(filters.do_int, *args, **kwargs)),
    "items": _paid(lambda operations, value: filters.do_items(operations.copied(value) if value else value)),
    "join": _join,
    "last": pass_context(lambda context, values: filters.do_last(context.environment, values)),
    "length": _free(len),
    "list": _paid(Operations.listed),
    "lower": _of_text("lower"),
    "map": _lazy(filters.do_map, names=1),
    "max": _ordered(filters.do_max),
    "min": _ordered(filters.do_min),
    "reject": _lazy(filters.do_reject, names=1),
    "rejectattr": _lazy(filters.do_rejectattr, names=2),
    "replace": _paid(_replace),
    "reverse": _paid(lambda operations, values: filters.do_reverse(operations.copied(_listed(operations, values)))),
    "round": _free(_round),
    "safe": _paid(lambda operations, value: filters.do_mark_safe(operations.output(value))),
    "select": _lazy(filters.do_select, names=1),
    "selectattr": _lazy(filters.do_selectattr, names=2),
    "sort": _ordered(filters.do_sort),
    "string": _paid(Operations.text),
    "sum": _sum,
    "title": _paid(_title),
    "tojson": _paid(Operations.tojson),
    "trim": _of_text("strip"),
    "unique": _unique,
    "upper": _of_text("upper"),
}

_FREE_TESTS = (
    *("boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number"),
    *("sameas", "sequence", "string", "true", "undefined"),
)
TESTS: dict[str, Filter] = {
    **{name: cast(Filter, tests.TESTS[name]) for name in _FREE_TESTS},
    "divisibleby": _paid(lambda operations, value, num: _remainder(operations, value, num) == 0),
    "even": _paid(lambda operations, value: _remainder(operations, value, 2) == 0),
    "odd": _paid(lambda operations, value: _remainder(operations, value, 2) == 1),
    "in": _paid(lambda operations, value, seq: operations.contains(seq, value)),
    "lower": _paid(lambda operations, value: operations.output(value).islower()),
    "upper": _paid(lambda operations, value: operations.output(value).isupper()),
    **dict.fromkeys(("==", "eq", "equalto"), _compare("eq")),
    **dict.fromkeys(("!=", "ne"), _compare("ne")),
    **dict.fromkeys(("<", "lt", "lessthan"), _compare("lt")),
    **dict.fromkeys(("<=", "le"), _compare("lteq")),
    **dict.fromkeys((">", "gt", "greaterthan"), _compare("gt")),
    **dict.fromkeys((">=", "ge"), _compare("gteq")),
}

FILTERS.update({name: _refused("filter", name) for name in filters.FILTERS if name not in FILTERS})
TESTS.update({name: _refused("test", name) for name in tests.TESTS if name not in TESTS})
