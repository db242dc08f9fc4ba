"""Startup optimizations. None affects results, and each does nothing where it does not apply."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from exl_cli.engines.exllamav2.extension.compiled import torch_here


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector during imports, where rescanning torch's objects takes 1/8 of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def wake_gpu() -> None:
    """Initialize the first GPU in a thread while torch is being imported; saves about 0.4 s.

    Does nothing if torch is already imported or built without CUDA.
    """
    if "torch" not in sys.modules and (torch := torch_here()) is not None and torch.cuda:
        # Read by the driver when it initializes; torch would set it too.
        os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
        threading.Thread(target=_retain_context, name="wake GPU", daemon=True).start()


def _retain_context() -> None:
    import ctypes

    # Ignore errors: torch will hit and report them too.
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            # torch uses the primary context.
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """Skip random initialization of torch modules on the meta device.

    exllamav2 creates its embeddings and linear layers there first. torch implements the meta device in Python and
    imports its compiler for it, which takes up to five seconds.
    """
    import torch

    classes: tuple[Any, ...] = (torch.nn.Embedding, torch.nn.Linear)
    originals = {cls: cls.__dict__["reset_parameters"] for cls in classes}
    for cls, draw in originals.items():
        cls.reset_parameters = lambda self, draw=draw: None if self.weight.is_meta else draw(self)
    try:
        yield
    finally:
        for cls, draw in originals.items():
            cls.reset_parameters = draw
