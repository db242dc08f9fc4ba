"""What one rendering of a template may spend, and the plainest operations: text, lists, keys."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

# A step of the dearest operations takes a tenth of a microsecond. On 200 messages of 100 kB each, the hungriest of 128
# published text templates uses a quarter of the steps and a third of the bytes.
_STEPS = 10_000_000
_STEPS_PER_MESSAGE = 20_000
_STEPS_PER_PAIR = 60
_BYTES = 128 << 20
_BYTES_PER_INPUT_BYTE = 32
_OUTPUT = 1 << 20  # more would only keep the tokenizer busy
_OUTPUT_PER_INPUT_BYTE = 8
_ITEM_STEPS = 20
ITEM_BYTES = 88  # a list slot and a small string


class SandboxError(Exception):
    """A template asked for something that the sandbox does not give."""


def room(*texts: str) -> int:
    """Bytes that texts take once joined: the widest character in them makes all as wide, one, two or four bytes."""
    return 64 + sum(map(len, texts)) * max(map(_width, texts), default=1)


def _width(text: str) -> int:
    if text.isascii():
        return 1
    size, length = sys.getsizeof(text), len(text)
    return 1 if size < 2 * length else 2 if size < 3 * length else 4  # a short text may seem wider than it is


def tree_size(value: Any, max_nodes: float = math.inf, max_size: float = math.inf) -> tuple[int, int]:
    """The nodes and bytes of a value written out in full: a list that holds another one twice counts it twice.

    Args:
        value: text, a number, a list or a dict; anything else counts as a word.
        max_nodes: where to stop, so that the walk itself costs no more than this.
        max_size: the same for bytes.

    Raises:
        SandboxError: there is more than that.
    """
    nodes, size = 1, 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            size += room(item)
        elif isinstance(item, dict):
            nodes += 2 * len(item)
            pending += item
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            nodes += len(item)
            pending += item
        else:
            size += 64 + (item.bit_length() // 2 if isinstance(item, int) else 0)
        if nodes > max_nodes or size > max_size:
            raise SandboxError("it handles too much data")
    return nodes, size + 32 * nodes


class Meter:
    """The allowance of one rendering: steps of template code, and bytes read or made.

    A spent meter stays spent: every later charge raises again, so that swallowing one error gains nothing.

    Args:
        input_size: bytes of everything that the template is given.
        messages: turns in the conversation.
    """

    def __init__(self, input_size: int = 0, messages: int = 0) -> None:
        self._steps = _STEPS + _STEPS_PER_MESSAGE * messages + _STEPS_PER_PAIR * messages**2
        self._bytes = _BYTES + _BYTES_PER_INPUT_BYTE * input_size
        self._output = _OUTPUT + _OUTPUT_PER_INPUT_BYTE * input_size

    def step(self, count: int, size: int = 0) -> bool:
        """Charge the steps of a loop body or macro, and the fixed text in it. True, so that it can stand in a test."""
        self._steps -= count
        if self._steps < 0:
            raise SandboxError("it takes too many steps")
        return self.pay(size)

    def pay(self, size: int) -> bool:
        """Charge bytes that are about to be read or made. True, so that it can stand in a test."""
        self._bytes -= size
        if self._bytes < 0:
            raise SandboxError("it needs too much memory")
        return True

    def finish(self, text: str) -> str:
        """The whole text of the rendering, if it is not too long and the template hid no refused charge."""
        self.pay(0)
        if len(text) > self._output:
            raise SandboxError("it writes too much text")
        return text

    def weigh(self, *values: Any, times: int = 1) -> None:
        """Charge for values read or written out in full, `times` over."""
        for value in values:
            try:
                nodes, size = tree_size(value, self._steps, self._bytes // times)
            except SandboxError:
                self._bytes = -1
                raise
            self.step(nodes * (1 + times // 2), times * size)

    def text(self, value: Any) -> str:
        """`str(value)`, which is how a template sees any value as text."""
        if isinstance(value, str):
            return value
        if isinstance(value, (list, tuple, dict)):
            self.weigh(value, times=6)  # repr writes a character that cannot be printed as six to ten
        return str(value)

    def output(self, value: Any) -> str:
        """The text of `{{ value }}`."""
        text = self.text(value)
        self.pay(room(text))
        return text

    def concat(self, *values: Any) -> str:
        """`value ~ value`."""
        texts = [self.text(value) for value in values]
        self.pay(room(*texts))
        return "".join(texts)

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The items of whatever can be iterated, each charged as it comes."""
        for value in values:
            self.step(_ITEM_STEPS, ITEM_BYTES)
            yield value

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """The items in a new list."""
        return list(self.each(values))

    def copied(self, values: Any) -> Any:
        """The same values, once a copy of them is paid for."""
        self.pay(room(values) if isinstance(values, str) else 64 + 8 * len(values))
        return values

    @staticmethod
    def key(value: Any) -> Any:
        """The value, when it may be a key: hashing nested tuples can take for ever, so no tuple is one."""
        if isinstance(value, tuple):
            raise SandboxError("it uses a tuple as a key")
        return value
