"""The compiling process: imports `exllamav2.ext`, which calls `torch.utils.cpp_extension.load` on its sources.

Started by `build` in its own session, with all settings in the environment. Exits at EOF on stdin, when `build` dies.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any

from exl_cli.engines.exllamav2.extension.compiled import EXLLAMAV2, MODULE


def _end_with_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)  # ninja stops its compilers


def _import_extension() -> None:
    from torch.utils import cpp_extension

    load: Any = cpp_extension.load
    cpp_extension.load = lambda **options: load(**{**options, "verbose": True})
    # Do not load the library here; the smoke test does, in another process.
    cpp_extension._import_module_from_library = lambda *_: None
    # Hide a prebuilt extension, which exllamav2 would use instead of compiling.
    sys.modules[MODULE] = None  # type: ignore[assignment]
    # Skip the package's __init__, which needs the extension.
    spec = importlib.util.find_spec(EXLLAMAV2)
    sys.modules[EXLLAMAV2] = package = types.ModuleType(EXLLAMAV2)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or []) if spec else []
    importlib.import_module(f"{EXLLAMAV2}.ext")


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = 1
    try:
        _import_extension()
        code = 0
    except Exception:  # whatever torch, setuptools or exllamav2 raise
        traceback.print_exc()
    sys.stdout.flush()
    # exllamav2's progress thread would keep the process alive.
    os._exit(code)
