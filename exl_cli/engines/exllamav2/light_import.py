"""Imports what exl uses of exllamav2, and not what only the rest of it needs.

Where files open slowly the whole import takes longer than loading a model does: 7.8 s on one machine, of which its own
code is a tenth of a second. What is left out, in seconds of a fast machine (1.1 for all of it):

- `torch.nn.attention.bias`, 0.95 s: it brings in torch's compiler, and sympy with that. `attn.py` wants it for an
  attention that exl replaces (`attention.py`), and asks EXLLAMA_NO_SDPA before it looks;
- `torch.utils.cpp_extension`, 0.12 s: it brings in setuptools. `ext.py` would compile exllamav2's extension with it,
  and gets that handed ready;
- the package's `__init__`, 0.04 s: generators, tokenizers and vision, with Pillow.

None of it is taken from anybody: whoever asks for it later in the same process gets it then.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_PACKAGE = "exllamav2"
# It imports all of the others that load a model and run it.
_MODEL = "exllamav2.model"
_COMPILING = "torch.utils.cpp_extension"
_NO_SDPA = "EXLLAMA_NO_SDPA"

_running_init = threading.RLock()


def is_done() -> bool:
    """Whether it is there, whoever imported it."""
    return _MODEL in sys.modules


def import_model() -> None:
    """Import exllamav2's model and what that needs, with the extension ready in `sys.modules`.

    Raises:
        Exception: whatever comes out of exllamav2's modules.
    """
    before = sys.modules.get(_PACKAGE)
    with _variable(_NO_SDPA), _later(_COMPILING):
        try:
            if before is None:
                _add_without_init(_PACKAGE)
            importlib.import_module(_MODEL)
        except BaseException:
            # A package that failed is not left behind, as with any import.
            if before is None:
                sys.modules.pop(_PACKAGE, None)
            raise


@contextlib.contextmanager
def _variable(name: str) -> Iterator[None]:
    """The environment variable is set while this lasts."""
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextlib.contextmanager
def _later(name: str) -> Iterator[None]:
    """While this lasts, imports of a module get a stand-in, whose functions import the real one when called."""
    if name in sys.modules:
        yield
        return
    stand_in: Any = ModuleType(name)

    def function(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(name), attribute)(*args, **kwargs)

        return call

    stand_in.__getattr__ = function
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        # Somebody else may have put the real one there meanwhile.
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _add_without_init(name: str) -> None:
    """Put a package into `sys.modules` whose `__init__` runs when something of it is asked for that is no submodule."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        importlib.import_module(name)  # which says what is wrong with it
        return
    package: Any = importlib.util.module_from_spec(spec)
    loader = spec.loader

    def attribute(wanted: str) -> Any:
        if wanted.startswith("__") and wanted not in ("__all__", "__version__"):
            raise AttributeError(f"module {name!r} has no attribute {wanted!r}")
        # `from package import submodule` asks here first.
        if importlib.util.find_spec(f"{name}.{wanted}") is not None:
            return importlib.import_module(f"{name}.{wanted}")
        with _running_init:
            if package.__dict__.get("__getattr__") is attribute:
                # While it runs, it must not come here again for what it has not defined yet.
                del package.__getattr__
                try:
                    loader.exec_module(package)
                except BaseException:
                    package.__getattr__ = attribute
                    raise
        return getattr(package, wanted)

    package.__getattr__ = attribute
    sys.modules[name] = package
