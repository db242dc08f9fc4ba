"""Imports exllamav2 without what exl does not use, which takes most of the time.

Where files open slowly the whole import takes longer than loading a model: 7.8 s on one machine, 1.1 s on a fast one.
Left out, with seconds of the fast one:

- `torch.nn.attention.bias`, 0.95 s: it brings in torch's compiler, and sympy with that. `attn.py` wants it for an
  attention that exl replaces (`attention/causal.py`), and asks EXLLAMA_NO_SDPA before it looks;
- `torch.utils.cpp_extension`, 0.12 s: it brings in setuptools. `ext.py` would compile exllamav2's extension with it,
  but finds that in `sys.modules`;
- flash-attn and xformers, where they are installed: a broken one would end the import.

Later imports of any of these in the same process get the real module.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, MutableMapping
from types import ModuleType
from typing import Any, TypeVar

_PACKAGE = "exllamav2"
_COMPILING = "torch.utils.cpp_extension"
_LEFT_OUT = ("EXLLAMA_NO_SDPA", "EXLLAMA_NO_FLASH_ATTN", "EXLLAMA_NO_XFORMERS")

Value = TypeVar("Value")


def is_done() -> bool:
    """Whether exllamav2 has been imported, here or elsewhere."""
    return _PACKAGE in sys.modules


def import_model() -> None:
    """Import exllamav2, with the extension ready in `sys.modules`.

    Raises:
        Exception: anything that its modules raise.
    """
    stand_in: Any = ModuleType(_COMPILING)
    stand_in.load = _load
    with contextlib.ExitStack() as stack:
        for variable in _LEFT_OUT:
            stack.enter_context(_default(os.environ, variable, "1"))
        stack.enter_context(_default(sys.modules, _COMPILING, stand_in))
        importlib.import_module(_PACKAGE)


def _load(*args: Any, **kwargs: Any) -> Any:
    """`torch.utils.cpp_extension.load`."""
    return importlib.import_module(_COMPILING).load(*args, **kwargs)


@contextlib.contextmanager
def _default(mapping: MutableMapping[str, Value], key: str, value: Value) -> Iterator[None]:
    """Give a mapping an entry that it lacks, for as long as this lasts."""
    if key in mapping:
        yield
        return
    mapping[key] = value
    try:
        yield
    finally:
        mapping.pop(key, None)
