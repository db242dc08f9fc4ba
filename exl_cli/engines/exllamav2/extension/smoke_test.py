"""Loads an extension in a process of its own and computes something with it: what may crash, crashes here.

Run as a program, with LIBRARY and perhaps ARCHS, it ends with code 0 and a line of JSON, or with a traceback and
another code. With architectures given, GPUs that they leave out are not tried.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from exl_cli.engines.exllamav2.extension.compiled import MODULE, parse_archs, uncovered

_SCALE = 30.0


def load(library: Path) -> ModuleType:
    """The module in that file, under the name by which exllamav2 looks for it.

    Raises:
        ImportError: it does not fit; see `failures.explain`.
    """
    import torch  # noqa: F401 - its libraries must be loaded first

    spec = importlib.util.spec_from_file_location(MODULE, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is no extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute(module: Any, archs: tuple[str, ...] = ()) -> list[str]:
    """Run one of its kernels on each GPU, or each that `archs` cover, and compare with torch; the GPUs' names.

    Torch computes on the CPU: on a GPU each of its own kernels would have to be loaded first.

    Raises:
        RuntimeError: it cannot be run there, or computes something else.
    """
    import torch

    given = torch.linspace(-100, 100, 512, dtype=torch.half)
    expected = torch.tanh(given.float() / _SCALE) * _SCALE
    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if archs and uncovered(archs, [torch.cuda.get_device_capability(index)]):
            continue
        result = given.to(f"cuda:{index}")
        module.softcap_(result, _SCALE)
        torch.cuda.synchronize(index)
        # A kernel for which there is no code is not run at all and leaves its input as it was.
        if not torch.allclose(result.cpu().float(), expected, rtol=0.01, atol=0.05):
            raise RuntimeError(f"no kernel image is available for {torch.cuda.get_device_name(index)}, or it is broken")
        names.append(torch.cuda.get_device_name(index))
    return names


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU had no room, be it for a tensor or for CUDA itself."""
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


def main() -> None:
    """The process."""
    module = load(Path(sys.argv[1]))
    try:
        gpus = compute(module, parse_archs(" ".join(sys.argv[2:])))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        gpus = []  # others fill the GPU: nothing against the extension
    sys.stdout.write(json.dumps({"gpus": gpus}) + "\n")


if __name__ == "__main__":
    main()
