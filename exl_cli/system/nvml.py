"""The NVIDIA driver's own interface, where there is one."""

from __future__ import annotations

from typing import Any


def open_driver() -> Any:
    """The `pynvml` module, initialised (`nvmlShutdown` ends that); None where there is no driver to ask."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, or a container without it
        return None
    return pynvml
