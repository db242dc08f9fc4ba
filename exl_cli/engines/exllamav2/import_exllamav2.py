"""The one door to exllamav2: it is imported here and nowhere before.

Left to itself that import compiles for minutes without a word, waits for ever on the lock of a build that died, or
ends in a linker's message. So its extension is found, checked against this machine, compiled in the open where it has
to be (`exl_cli.building`) and tried on the GPU first; then exllamav2 gets it handed ready. What goes wrong all the
same becomes one line with the step that mends it.
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
from exl_cli.engines.exllamav2.extension.compiled import Capability, Extension
from exl_cli.engines.exllamav2.extension.failures import Failure
from exl_cli.errors import EngineError, ExlError, OutOfMemoryError

_ELSE = "or use --engine cpu"
_turns = threading.Lock()


def import_exllamav2(observer: build.Observer | None = None) -> None:
    """Import exllamav2's model, with an extension that fits this machine. Later calls do nothing.

    Args:
        observer: is told of a build and how it is going, and of what is gone on without. Where there is none, nothing
            is compiled, since that takes minutes: the error says what to do.

    Raises:
        EngineError: it cannot be had here; the message says why and the hint how to mend that.
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
    # Loaded before, for an import that failed later on: once is all that its types can be registered.
    if (loaded := sys.modules.get(compiled.MODULE)) is not None:
        return loaded
    torch_ = build.torch_for_cuda()
    gpus = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    why = ""
    for found in _candidates(torch_, gpus):
        if found.path is None:
            continue
        if found.problem:
            why = why or f"{found.path} was {found.problem}"
            continue
        try:
            return _load(found.path)
        except Exception as error:  # loading it runs a linker and its own start-up code
            if smoke_test.is_out_of_memory(error):
                raise _no_room() from error
            failure = failures.explain(str(error), torch_)
            if failure is not None and not failure.rebuild:
                raise EngineError(failure.what, f"{failure.fix}, {_ELSE}") from error
            what = failure.what if failure else f"it does not load: {failures.last_line(str(error))}"
            why = why or f"{what} ({found.path})"
    if observer is None:
        raise EngineError(
            why or "exllamav2's extension is not compiled yet", f"exl build compiles it for this machine, {_ELSE}"
        )
    return _build(observer, why)


def _candidates(torch_: environment.Torch, gpus: list[Capability]) -> list[Extension]:
    folder = environment.build_folder(torch_)
    # One that exllamav2 compiled by itself lies in the same folder; ninja alone knows whether it is up to date, so it
    # goes through a build, which then has nothing or little to do.
    found = [compiled.installed(torch_, gpus), compiled.compiled(folder, torch_, gpus)]
    return [candidate for candidate in found if candidate.kind in ("installed", "compiled")]


def _build(observer: build.Observer, why: str) -> ModuleType:
    if why:
        observer.note(f"{why}: another is needed for this machine")
    else:
        observer.note("exllamav2's CUDA extension is not compiled yet: that is done now, once")
    try:
        result = build.build(build.Order(), observer)
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
