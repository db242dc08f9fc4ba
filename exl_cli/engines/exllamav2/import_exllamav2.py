"""The only import of exllamav2.

Left to itself that import compiles for minutes without a word, waits endlessly for the lock of a build that died, or
ends in a linker's message. Here its extension is looked for, checked against this machine, compiled in the open where
necessary (`extension.build`) and tried on the GPU; then exllamav2 gets it ready-made. Whatever still goes wrong becomes
one line with the step that mends it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from exl_cli.engines.exllamav2 import startup
from exl_cli.engines.exllamav2.extension import build, compiled, hints, smoke_test
from exl_cli.errors import EngineError, ExlError, OutOfMemoryError, param

_OR_CPU = f"or use {param('engine')} cpu"
_lock = threading.Lock()


def import_exllamav2(observer: build.Observer | None = None) -> None:
    """Import exllamav2's model, with an extension that fits this machine. Later calls do nothing.

    Args:
        observer: shows a build. Without one nothing is compiled, since that takes minutes: the error says what to do.

    Raises:
        EngineError: it cannot be imported here; the message says why and the hint how to mend that.
        OutOfMemoryError: the GPU has no room even for CUDA itself.
    """
    with _lock:
        if compiled.EXLLAMAV2 in sys.modules:
            return
        # exllamav2 prints to stdout, which belongs to the model's text.
        with contextlib.redirect_stdout(sys.stderr), startup.collector_paused():
            try:
                sys.modules[compiled.MODULE] = _extension(observer)
                _import_lightly()
            except Exception as error:  # it imports much: anything can come out
                raise _explained(error, "exllamav2 cannot be imported") from error


def _extension(observer: build.Observer | None) -> ModuleType:
    """The extension, loaded and tried on the GPUs."""
    # Loaded before, for an import that failed later on: its types can be registered only once.
    if (loaded := sys.modules.get(compiled.MODULE)) is not None:
        return loaded
    torch_ = build.torch_for_cuda()
    gpus = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    why = ""
    for candidate in compiled.extensions(torch_, gpus):
        if not candidate.usable:
            why = why or (candidate.problem and f"{candidate.path} was {candidate.problem}")
            continue
        try:
            return _load(candidate.path)
        except Exception as error:  # loading it runs a linker and its own start-up code
            failure = hints.explain(str(error), torch_)
            if smoke_test.is_out_of_memory(error) or (failure and not failure.rebuild):
                raise _explained(error, "") from error
            what = failure.what if failure else f"it does not load: {hints.last_line(str(error))}"
            why = why or f"{what} ({candidate.path})"
    if observer is None:
        what = why or "exllamav2's extension is not compiled yet"
        raise EngineError(what, f"exl build compiles it for this machine, {_OR_CPU}")
    if why:
        observer.note(f"{why}: another is needed for this machine")
    else:
        observer.note("exllamav2's CUDA extension is not compiled yet: that is done now, once")
    try:
        result = build.build(observer, gpus=gpus)
    except EngineError as error:
        raise EngineError(error.message, _or_cpu(error.hint)) from error
    try:
        return _load(result.path)
    except Exception as error:
        raise _explained(error, "exllamav2's compiled extension does not load") from error


def _load(library: Path) -> ModuleType:
    module = smoke_test.load(library)
    smoke_test.compute_with(module)
    return module


def _import_lightly() -> None:
    """Import exllamav2, with the extension ready in `sys.modules`, without what exl does not use.

    That takes most of the time: 7.8 s of the whole import on one machine, where files open slowly, 1.1 s on a fast one.
    Left out, with seconds of the fast one:

    - `torch.nn.attention.bias`, 0.95 s: it brings in torch's compiler, and sympy with that. `attn.py` wants it for an
      attention that exl replaces (`attention/causal.py`), and asks EXLLAMA_NO_SDPA before it looks;
    - `torch.utils.cpp_extension`, 0.12 s: it brings in setuptools. `ext.py` would compile the extension with it;
    - flash-attn and xformers, where they are installed: a broken one would end the import.

    Later imports of any of these in the same process get the real module.
    """
    names = ("EXLLAMA_NO_SDPA", "EXLLAMA_NO_FLASH_ATTN", "EXLLAMA_NO_XFORMERS")
    switches = [name for name in names if name not in os.environ]
    stand_in: Any = ModuleType("torch.utils.cpp_extension")
    stand_in.load = None
    os.environ.update(dict.fromkeys(switches, "1"))
    sys.modules.setdefault(stand_in.__name__, stand_in)
    try:
        importlib.import_module(compiled.EXLLAMAV2)
    finally:
        for name in switches:
            os.environ.pop(name, None)
        if sys.modules[stand_in.__name__] is stand_in:
            del sys.modules[stand_in.__name__]


def _explained(error: Exception, what: str) -> ExlError:
    """What an exception means, in one line."""
    if isinstance(error, ExlError):
        return error
    if smoke_test.is_out_of_memory(error):
        return OutOfMemoryError(
            "the GPU is full: it has no room even for CUDA itself",
            f"nvidia-smi shows who uses it; CUDA_VISIBLE_DEVICES chooses another GPU, {_OR_CPU}",
        )
    text = str(error) or type(error).__name__
    failure = hints.explain(text, compiled.torch_here())
    if failure is None or failure.rebuild:
        # The extension has passed its test: a linker's complaint now is about another library.
        return EngineError(f"{what}: {hints.last_line(text)}", _or_cpu("exl doctor"))
    return EngineError(failure.what, _or_cpu(failure.fix))


def _or_cpu(hint: str) -> str:
    return f"{hint}, {_OR_CPU}" if hint else _OR_CPU.removeprefix("or ")
