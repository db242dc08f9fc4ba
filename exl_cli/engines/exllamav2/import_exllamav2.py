"""Import exllamav2 with a working compiled extension. The only place that imports it.

A plain `import exllamav2` may compile silently for minutes, wait forever for the lock of a dead build, or fail with a
linker's message. We find the extension, check it against this machine, compile it visibly if needed
(`extension.build`), smoke-test it on the GPU, and put it into `sys.modules` before exllamav2 looks for it. Failures
become one line with the next step.
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
    """Import exllamav2 with an extension that fits this machine. Idempotent.

    Args:
        observer: shows the progress of a build. Without one nothing is compiled; the error says how to do it.

    Raises:
        EngineError: it cannot be imported on this machine.
        OutOfMemoryError: not enough GPU memory for a CUDA context.
    """
    with _lock:
        if compiled.EXLLAMAV2 in sys.modules:
            return
        # exllamav2 prints to stdout, which is reserved for the model's text.
        with contextlib.redirect_stdout(sys.stderr), startup.collector_paused():
            try:
                sys.modules[compiled.MODULE] = _extension(observer)
                _import_lightly()
            except Exception as error:  # the import can raise anything
                raise _explained(error, "cannot import exllamav2") from error


def _extension(observer: build.Observer | None) -> ModuleType:
    """Load a suitable extension, compiling one if needed."""
    # Reuse it if an earlier import failed after loading it: pybind11 types can be registered only once.
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
        except Exception as error:  # loading runs the dynamic linker and static initializers
            failure = hints.explain(str(error), torch_)
            if smoke_test.is_out_of_memory(error) or (failure and not failure.rebuild):
                raise _explained(error, "") from error
            what = failure.what if failure else f"it fails to load: {hints.last_line(str(error))}"
            why = why or f"{what} ({candidate.path})"
    if observer is None:
        what = why or "exllamav2's extension is not compiled yet"
        raise EngineError(what, f"run exl build to compile it for this machine, {_OR_CPU}")
    if why:
        observer.note(f"{why}; compiling a new one for this machine")
    else:
        observer.note("exllamav2's CUDA extension is not compiled yet; compiling it now (once per machine)")
    try:
        result = build.build(observer, gpus=gpus)
    except EngineError as error:
        raise EngineError(error.message, _or_cpu(error.hint)) from error
    try:
        return _load(result.path)
    except Exception as error:
        raise _explained(error, "exllamav2's compiled extension fails to load") from error


def _load(library: Path) -> ModuleType:
    module = smoke_test.load(library)
    smoke_test.compute_with(module)
    return module


def _import_lightly() -> None:
    """Import exllamav2, with the extension in `sys.modules`, without heavy modules that exl does not use.

    They take most of the import's time: 7.8 s on a machine with slow storage, 1.1 s on a fast one. Skipped, with times
    on the fast machine:

    - `torch.nn.attention.bias`, 0.95 s, which imports torch's compiler and sympy. `attn.py` uses it for attention that
      exl replaces (`attention/causal.py`), and checks EXLLAMA_NO_SDPA first;
    - `torch.utils.cpp_extension`, 0.12 s, which imports setuptools. `ext.py` would compile the extension with it;
    - flash-attn and xformers, if installed: a broken one would fail the import.

    Other code in this process can still import the real modules.
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
    if isinstance(error, ExlError):
        return error
    if smoke_test.is_out_of_memory(error):
        return OutOfMemoryError(
            "the GPU is full: not enough memory for a CUDA context",
            f"see what uses it with nvidia-smi, choose another GPU with CUDA_VISIBLE_DEVICES, {_OR_CPU}",
        )
    text = str(error) or type(error).__name__
    failure = hints.explain(text, compiled.torch_here())
    if failure is None or failure.rebuild:
        # The extension passed its smoke test, so a linker error now concerns another library.
        return EngineError(f"{what}: {hints.last_line(text)}", _or_cpu(hints.step("exl doctor")))
    return EngineError(failure.what, _or_cpu(hints.step(failure.fix)))


def _or_cpu(hint: str) -> str:
    return f"{hint}, {_OR_CPU}" if hint else _OR_CPU.removeprefix("or ")
