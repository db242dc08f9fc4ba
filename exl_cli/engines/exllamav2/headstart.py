"""Shortens the time until a model answers: what takes long and does not need Python runs while Python imports.

All of it is a matter of speed alone: where something is not possible, nothing happens.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from exl_cli.engines.exllamav2.extension import environment
from exl_cli.system.machine import available_memory

_CHUNK = 8 << 20
_DRIVER = "libcuda.so.1"


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python's garbage collector rests while this lasts; for imports, which make much and drop little.

    It would look through all of torch's objects again and again: an eighth of the time that torch's import takes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Collections while this lasts look at new objects only: 0.1 s less for each, with torch's imported."""
    if gc.get_freeze_count():  # somebody else's
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def wake_gpu() -> None:
    """Have the driver initialize the first GPU in a thread, before torch is there to ask for it: some 0.4 s.

    Does nothing once torch is imported, nor for a torch without CUDA.
    """
    if "torch" in sys.modules:
        return
    torch = environment.torch_here()
    if torch is None or torch.cuda is None:
        return
    # As torch does before it initializes CUDA; read then.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    threading.Thread(target=_retain_context, name="wake GPU", daemon=True).start()


def _retain_context() -> None:
    import ctypes

    # What fails here fails again for torch, which says why.
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL(_DRIVER)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            # The context that CUDA's runtime, and with it torch, uses.
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


@contextlib.contextmanager
def files_being_read(paths: Iterable[Path]) -> Iterator[None]:
    """While this lasts, files are read into the page cache, in a thread, as far as they are not there yet.

    Nothing is read where they would take more than half of the memory that is available, as they might then drive each
    other out, or where the file system does not tell what is there.
    """
    stopped = threading.Event()
    files = sorted(set(paths))
    if hasattr(os, "RWF_NOWAIT") and 0 < 2 * _size(files) < (available_memory() or 0):
        threading.Thread(target=_read, args=(files, stopped), name="read files", daemon=True).start()
    try:
        yield
    finally:
        stopped.set()


def _size(files: Iterable[Path]) -> int:
    try:
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _read(files: list[Path], stopped: threading.Event) -> None:
    buffer, probe = bytearray(_CHUNK), bytearray(1)
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                size = path.stat().st_size
                for start in range(0, size, _CHUNK):
                    if stopped.is_set():
                        return
                    last = min(start + _CHUNK, size) - 1
                    try:
                        os.preadv(file.fileno(), [probe], last, os.RWF_NOWAIT)
                    except BlockingIOError:
                        os.preadv(file.fileno(), [buffer], start)
