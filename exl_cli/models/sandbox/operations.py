"""What a template does to values: operators, comparisons, methods, JSON. Each is paid for before it runs.

The price is an upper bound of the bytes read and made, computed from the sizes of the operands alone.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from string import Formatter
from typing import Any

from exl_cli.models.sandbox.meter import ITEM_BYTES, Meter, SandboxError, room

_MAX_INT_BITS = 1024
_MAX_DIGITS = 1000
_MAX_JSON_SPACE = 16
_MAX_DEPTH = 100
_ESCAPED = 6  # `Markup` writes one character as up to six
_PERCENT = re.compile(r"%(?:\(\w{1,64}\))?(?:0?\d{1,2})?(?:\.\d{1,2})?[sdifxX%]")

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SEARCHING = {"count", "find", "index", "partition", "replace", "rfind", "rindex", "rpartition", "rsplit", "split"}
_STRIPPING = {"lstrip", "rstrip", "strip"}
_CHECKING = {
    *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit"),
    *("islower", "isnumeric", "isspace", "istitle", "isupper"),
}
_CASING = {"capitalize", "casefold", "lower", "swapcase", "title", "upper"}
_ENDS = {"endswith", "removeprefix", "removesuffix", "startswith"}
_STR_METHODS = _SEARCHING | _STRIPPING | _CHECKING | _CASING | _ENDS | {"splitlines"}

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}


class Operations(Meter):
    """A meter with every operation that a template may use."""

    def mapping(self, /, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """`dict(...)`."""
        if args and isinstance(args[0], Mapping):
            self.copied(args[0])
        elif args:
            args = ([(self.key(key), value) for key, value in self.each(args[0])], *args[1:])
        return dict(*args, **kwargs)

    def cut(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        if isinstance(value, (str, list, tuple)):
            self.copied(value)
        return value[start:stop:step]

    def arithmetic(self, op: str, left: Any, right: Any) -> Any:
        """`left op right` on text, lists and numbers."""
        if op == "%" and isinstance(left, str):
            return self.percent(left, right)
        if op == "+":
            self._pay_sum(left, right)
        elif op == "*":
            self._pay_repeat(left, right)
            self._pay_repeat(right, left)
        elif op == "**" and isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
            _check_bits(left.bit_length() * max(right, 0))
        return _check_int(_BINARY[op](left, right))

    def _pay_sum(self, left: Any, right: Any) -> None:
        if isinstance(left, str) and isinstance(right, str):
            markup = hasattr(left, "__html__") or hasattr(right, "__html__")
            self.pay(room(left, right) * (_ESCAPED if markup else 1))
        elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            self.pay(64 + 8 * len(left) + 8 * len(right))

    def _pay_repeat(self, value: Any, times: Any) -> None:
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            one = room(value) - room("") if isinstance(value, str) else 8 * len(value)
            self.pay(room("") + one * max(times, 1))

    def percent(self, pattern: str, values: Any) -> str:
        """`pattern % values`, for plain directives of at most two digits' width."""
        self.pay(8 * room(pattern))
        if "%" in _PERCENT.sub("", pattern):
            raise SandboxError("it formats text in a way that is not supported")
        self.weigh(values, times=_ESCAPED * (1 + pattern.count("%")))
        filled: str = str(pattern) % values
        return filled

    def format(self, pattern: str, /, *args: Any, **kwargs: Any) -> str:
        """`pattern.format(...)`, for bare fields: no attributes, conversions or format specifications."""
        self.pay(8 * room(pattern))
        pieces: list[str] = []
        numbers = iter(range(len(args)))
        for literal, field, spec, conversion in Formatter().parse(str(pattern)):
            pieces.append(literal)
            if field is None:
                continue
            if spec or conversion or not (field == "" or field.isdecimal() or field.isidentifier()):
                raise SandboxError("it formats text in a way that is not supported")
            value = kwargs[field] if field.isidentifier() else args[int(field) if field else next(numbers, len(args))]
            pieces.append(self.output(value))
        return self.concat(*pieces)

    def compare(self, left: Any, *operations: Any) -> bool:
        """A chain of comparisons: `left`, then the name of each operator and its right side."""
        for op, right in zip(operations[::2], operations[1::2], strict=True):
            if op in ("in", "notin"):
                holds = self.contains(right, left) == (op == "in")
            else:
                self._pay_comparison(left, right)
                holds = bool(_COMPARE[op](left, right))
            if not holds:
                return False
            left = right
        return True

    def _pay_comparison(self, left: Any, right: Any) -> None:
        if isinstance(left, str) and isinstance(right, str):
            self.pay(room(left if len(left) < len(right) else right))
        elif isinstance(left, (list, tuple, dict)) and isinstance(right, (list, tuple, dict)):
            self.weigh(left, right)

    def contains(self, container: Any, value: Any) -> bool:
        """`value in container`."""
        if isinstance(container, str):
            if isinstance(value, str):
                self.pay(_search_price(container, value))
            return value in container
        if isinstance(container, dict):
            return self.key(value) in container
        if not isinstance(container, (list, tuple, range)):
            container = self.listed(container)
        if isinstance(value, (list, tuple, dict)):
            self.weigh(container)
        else:
            self.step(1 + len(container) // 4, len(container) * (len(value) if isinstance(value, str) else 0))
        return value in container

    def method(self, value: Any, name: str) -> Callable[..., Any] | None:
        """The method of text, a list or a dict that a template may call; None where none has that name."""
        methods: dict[str, Callable[..., Any]] = {}
        if isinstance(value, str):
            if name in _STR_METHODS:
                return partial(self._call_str, value, name)
            methods = {"join": partial(self.join, value), "format": partial(self.format, value)}
        elif isinstance(value, dict):
            # Lists in place of views: a view compares by hashing, and the items of one are tuples.
            methods = {
                "get": lambda key, default=None: value.get(self.key(key), default),
                "keys": lambda: self.listed(value),
                "values": lambda: self.listed(value.values()),
                "items": lambda: self.listed(value.items()),
                "copy": lambda: dict(self.copied(value)),
            }
        elif isinstance(value, (list, tuple, range)):
            methods = {"index": partial(self._call_list, value.index), "count": partial(self._call_list, value.count)}
        return methods.get(name)

    def _call_list(self, method: Any, item: Any) -> Any:
        self.step(1 + len(method.__self__) // 4)
        self.weigh(method.__self__, item)
        return method(item)

    def _call_str(self, text: str, name: str, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        words = [word for value in values for word in (value if isinstance(value, tuple) else (value,))]
        if not all(word is None or isinstance(word, (str, int)) for word in words):
            raise TypeError(f"str.{name}() takes text and numbers only")
        strings = [word for word in words if isinstance(word, str)]
        escaped = _ESCAPED if hasattr(text, "__html__") else 1
        # Case is slow to change, and makes three characters of some: "ﬃ" becomes "FFI".
        self.pay((6 if name in _CASING else 1) * escaped * room(text, *strings))
        if strings and (name in _SEARCHING or name in _STRIPPING):
            self.pay(_search_price(text, strings[0], backwards=name[0] == "r" or name in _STRIPPING))
        if name == "replace" and len(strings) == 2:
            self.pay(4 * escaped * text.count(strings[0]) * len(strings[1]))
        elif name in ("split", "rsplit"):
            limits = [word + 1 for word in words if isinstance(word, int) and word >= 0]
            self.pay(ITEM_BYTES * min([text.count(strings[0]) + 1 if strings else len(text), *limits]))
        elif name == "splitlines":
            self.pay(ITEM_BYTES * (1 + sum(map(text.count, _LINE_ENDS))))
        return getattr(text, name)(*args, **kwargs)

    def join(self, separator: str, values: Iterable[Any]) -> str:
        """`separator.join(values)`, with each value as text."""
        texts = [self.text(value) for value in self.each(values)]
        escaped = _ESCAPED if hasattr(separator, "__html__") else 1
        self.pay(escaped * (room(separator, *texts) + 4 * len(separator) * len(texts)))
        return separator.join(texts)

    def number(self, convert: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
        """A number that `convert` makes of text or of another number."""
        if isinstance(value, str) and len(value) > _MAX_DIGITS:
            raise SandboxError("it reads a number of too many digits")
        self.pay(8 * len(value) if isinstance(value, str) else 0)
        return _check_int(convert(value, *args, **kwargs))

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """The `tojson` filter as transformers has it: no escapes for HTML, other scripts kept, json's options."""
        for space in (indent, *(separators or ())[:3]):
            if (len(space) if isinstance(space, str) else space or 0) > _MAX_JSON_SPACE:
                raise SandboxError("it writes JSON with too much space")
        self.weigh(value, times=6)  # an escape has six characters
        if indent is not None:
            self.weigh(value, times=_depth(value))  # each item has a line of its own, indented by its depth
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_bits(bits: int) -> None:
    if bits > _MAX_INT_BITS:
        raise SandboxError("it computes a number of too many digits")


def _check_int(value: Any) -> Any:
    if isinstance(value, int):
        _check_bits(value.bit_length())
    return value


def _depth(value: Any) -> int:
    """How deep lists and dicts nest; the caller has weighed the value, which bounds the walk."""
    depth, level = 0, [value]
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise SandboxError("it nests data too deep")
        parents = [item for item in level if isinstance(item, (list, tuple, dict))]
        level = [child for item in parents for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _search_price(text: str, needle: str, *, backwards: bool = False) -> int:
    """What looking for one text in another may read at worst, in bytes.

    CPython compares the needle at every position of a short text, and of any text when it searches backwards. In a long
    one it changes to a linear algorithm for needles of a hundred characters and more.
    """
    compared = len(needle) if backwards or len(text) < 2500 else min(len(needle), 100)
    return room(text) + len(text) * compared // 8
