"""What a template meets while it runs: its names, and what it may look up and call."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from types import CodeType
from typing import Any

import jinja2.ext
from jinja2 import Template, Undefined, pass_context
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import SandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from exl_cli.models.sandbox.compiler import GenerationTag, parse
from exl_cli.models.sandbox.filters import FILTERS, TESTS
from exl_cli.models.sandbox.meter import SandboxError
from exl_cli.models.sandbox.operations import Operations

_LOOP_ATTRIBUTES = {
    *("depth", "depth0", "first", "index", "index0", "last"),
    *("length", "nextitem", "previtem", "revindex", "revindex0"),
}
_MAX_DATE_PATTERN = 200


class TemplateRefusedError(Exception):
    """The template called `raise_exception`: it does not take this conversation."""


class Native:
    """A function that a template may call, and look into no further."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __repr__(self) -> str:
        return "<function>"


class _SafeNamespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SandboxError(f"it sets the attribute {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # Jinja's writes out the values, which may be of any size
        return "<Namespace>"


class Sandbox(SandboxedEnvironment):
    """The Jinja environment of one rendering.

    Args:
        operations: what the template can do to values, and its allowance.
    """

    intercepted_binops = frozenset(SandboxedEnvironment.default_binop_table)

    def __init__(self, operations: Operations) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # optimizing would run parts of the template while it is compiled
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
        )
        self.operations = operations
        self.filters = dict(FILTERS)
        self.tests = dict(TESTS)
        self.globals = {
            "dict": Native(operations.mapping),
            "namespace": Native(self._namespace),
            "raise_exception": Native(self._refuse),
            "range": Native(safe_range),
            "strftime_now": Native(_strftime_now),
        }
        # With a context, or else Jinja writes constants out while it compiles.
        self.finalize = pass_context(lambda context, value: operations.output(value))
        # What the compiler's calls lead to.
        self.compare = Native(operations.compare)
        self.cut = Native(operations.cut)
        self.generation = Native(lambda caller: caller())
        self.key = Native(operations.key)
        self.listed = Native(operations.listed)
        self.mapping = Native(operations.mapping)
        self.tilde = Native(operations.concat)
        self.toll = Native(operations.step)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`: an allowed method, or else the item of that name."""
        if isinstance(obj, dict) and attribute in obj and not hasattr(dict, attribute):
            return obj[attribute]
        return self._attribute(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`: the item, or else an allowed method."""
        try:
            return obj[self.operations.key(argument)]
        except (TypeError, LookupError):
            if isinstance(argument, str):
                return self._attribute(obj, argument)
            return self.undefined(obj=obj, name=argument)

    def _attribute(self, obj: Any, name: str) -> Any:
        if isinstance(obj, Undefined):
            return obj[name]  # raises Jinja's own error, which says what is undefined
        if name.startswith("_"):
            raise SandboxError(f"it looks up {name!r} of a {type(obj).__name__}")
        method = self.operations.method(obj, name)
        if method is not None:
            return Native(method)
        if isinstance(obj, LoopContext) and name in _LOOP_ATTRIBUTES:
            return getattr(obj, name)
        if isinstance(obj, LoopContext) and name == "cycle":
            return Native(obj.cycle)
        if isinstance(obj, Namespace) and hasattr(obj, name):
            return getattr(obj, name)
        if hasattr(type(obj), name):
            raise SandboxError(f"it looks up {name!r} of a {type(obj).__name__}")
        return self.undefined(obj=obj, name=name)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`obj(...)`, for functions that exl gives and for macros."""
        if isinstance(obj, Native):
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return obj.run(*args, **kwargs)
        if isinstance(obj, (Macro, LoopContext, Undefined)):
            return context.call(obj, *args, **kwargs)
        raise SandboxError(f"it calls a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`."""
        return self.operations.arithmetic(operator, left, right)

    def _namespace(self, /, *args: Any, **kwargs: Any) -> Namespace:
        values = self.operations.mapping(*args, **kwargs)
        if any(isinstance(name, str) and name.startswith("_") for name in values):
            raise SandboxError("it sets an attribute that begins with an underscore")
        return _SafeNamespace(values)

    def _refuse(self, message: Any = "") -> None:
        raise TemplateRefusedError(self.operations.text(message))


def _strftime_now(pattern: str) -> str:
    # A directive may ask for any width, as %09999d does.
    if len(pattern) > _MAX_DATE_PATTERN or any(char.isdigit() for char in pattern):
        raise SandboxError("it asks for the date in a way that is not supported")
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=8)
def _compiled(source: str) -> CodeType:
    sandbox = Sandbox(Operations())
    return sandbox.compile(parse(sandbox, source))


def render(source: str, variables: dict[str, Any], operations: Operations) -> str:
    """Render a template.

    Args:
        source: the template.
        variables: plain data: text, numbers, lists and dicts.
        operations: the allowance of this rendering, not used before.

    Raises:
        TemplateRefusedError: the template called `raise_exception`.
        SandboxError: it asked for what is not given, or for too much.
        Exception: whatever else goes wrong in it, as Jinja or Python raises it.
    """
    sandbox = Sandbox(operations)
    return operations.finish(Template.from_code(sandbox, _compiled(source), dict(sandbox.globals)).render(variables))
