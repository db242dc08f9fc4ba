"""The only import of exllamav2.

Left to itself that import compiles for minutes without a word, waits endlessly for the lock of a build that died, or
ends in a linker's message. Here its extension is looked for, checked against this machine, compiled in the open where
necessary (`extension.build`) and tried on the GPU; then exllamav2 gets it ready-made. Whatever still goes wrong becomes
one line with the step that mends it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from types import ModuleType

import torch

from exl_cli.engines.exllamav2 import light_import, startup
from exl_cli.engines.exllamav2.extension import build, compiled, environment, failures, smoke_test
from exl_cli.engines.exllamav2.extension.failures import Failure
from exl_cli.errors import EngineError, ExlError, OutOfMemoryError, param

_ELSE = f"or use {param('engine')} cpu"
_turns = threading.Lock()


def import_exllamav2(observer: build.Observer | None = None) -> None:
    """Import exllamav2's model, with an extension that fits this machine. Later calls do nothing.

    Args:
        observer: shows a build. Without one nothing is compiled, since that takes minutes: the error says what to do.

    Raises:
        EngineError: it cannot be imported here; the message says why and the hint how to mend that.
        OutOfMemoryError: the GPU has no room even for CUDA itself.
    """
    with _turns:
        if light_import.is_done():
            return
        # exllamav2 prints to stdout, which belongs to the model's text.
        with contextlib.redirect_stdout(sys.stderr):
            try:
                sys.modules[compiled.MODULE] = _extension(observer)
                with startup.collector_paused():
                    light_import.import_model()
            except Exception as error:  # it imports much: anything can come out
                raise _told(error, "exllamav2 cannot be imported") from error


def _extension(observer: build.Observer | None) -> ModuleType:
    """The extension, loaded and tried on the GPUs."""
    # Loaded before, for an import that failed later on: its types can be registered only once.
    if (loaded := sys.modules.get(compiled.MODULE)) is not None:
        return loaded
    torch_ = build.torch_for_cuda()
    gpus = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    why = ""
    for candidate in (compiled.installed(torch_, gpus), *compiled.built(torch_, gpus)):
        if candidate.path is None:
            continue
        if candidate.problem:
            why = why or f"{candidate.path} was {candidate.problem}"
            continue
        try:
            return _load(candidate.path)
        except Exception as error:  # loading it runs a linker and its own start-up code
            if smoke_test.is_out_of_memory(error):
                raise _no_room() from error
            failure = failures.explain(str(error), torch_)
            if failure is not None and not failure.rebuild:
                raise EngineError(failure.what, f"{failure.fix}, {_ELSE}") from error
            what = failure.what if failure else f"it does not load: {failures.last_line(str(error))}"
            why = why or f"{what} ({candidate.path})"
    if observer is None:
        raise EngineError(
            why or "exllamav2's extension is not compiled yet", f"exl build compiles it for this machine, {_ELSE}"
        )
    if why:
        observer.note(f"{why}: another is needed for this machine")
    else:
        observer.note("exllamav2's CUDA extension is not compiled yet: that is done now, once")
    try:
        result = build.build(observer, gpus=gpus)
    except EngineError as error:
        raise EngineError(error.message, f"{error.hint}, {_ELSE}" if error.hint else _ELSE[3:]) from error
    try:
        return _load(result.path)
    except Exception as error:
        raise _told(error, "exllamav2's compiled extension does not load") from error


def _load(library: Path) -> ModuleType:
    module = smoke_test.load(library)
    smoke_test.compute(module)
    return module


def _no_room() -> OutOfMemoryError:
    return OutOfMemoryError(
        "the GPU is full: it has no room even for CUDA itself",
        f"nvidia-smi shows who uses it; CUDA_VISIBLE_DEVICES chooses another GPU, {_ELSE}",
    )


def _told(error: Exception, what: str) -> ExlError:
    """What an exception means, in one line."""
    if isinstance(error, ExlError):
        return error
    if smoke_test.is_out_of_memory(error):
        return _no_room()
    text = str(error) or type(error).__name__
    failure = failures.explain(text, environment.torch_here())
    if failure is None or failure.rebuild:
        # The extension was found good before: a linker's complaint now is about something else's.
        failure = Failure(f"{what}: {failures.last_line(text)}", "exl doctor")
    return EngineError(failure.what, f"{failure.fix}, {_ELSE}" if failure.fix else _ELSE[3:])
