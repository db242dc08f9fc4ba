"""Loads an extension and computes something with it: `run` in a separate process, where it may crash.

As a program, with LIBRARY and ARCHS, it prints a line of JSON, or a traceback and ends with another code than 0. GPUs
that ARCHS, where given, leave out are not tried.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from exl_cli.engines.exllamav2.extension import failures
from exl_cli.engines.exllamav2.extension.compiled import MODULE, parse_archs, uncovered
from exl_cli.engines.exllamav2.extension.environment import Torch
from exl_cli.errors import EngineError
from exl_cli.system import processes

_SCALE = 30.0
_SECONDS = 300.0


def run(library: Path, archs: tuple[str, ...], torch: Torch, log: IO[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Load and compute in another process, for five minutes at most.

    Returns:
        The names of the GPUs that computed, and their architectures as TORCH_CUDA_ARCH_LIST has them.

    Raises:
        EngineError: it crashes, hangs, does not load or computes something else.
    """
    try:
        done = subprocess.run(  # noqa: S603
            processes.command("exl_cli.engines.exllamav2.extension.smoke_test", str(library), *archs),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError("the compiled extension hangs when it is loaded") from error
    log.write(done.stdout + done.stderr)
    if done.returncode < 0:
        name = processes.signal_name(-done.returncode)
        raise EngineError(f"the compiled extension crashes when it is loaded ({name})")
    if done.returncode:
        said = failures.last_line(done.stderr)
        if known := failures.explain(said, torch):
            raise EngineError(known.what, known.fix)
        raise EngineError(f"the compiled extension does not load: {said}")
    facts = json.loads(failures.last_line(done.stdout))
    return tuple(facts["gpus"]), tuple(facts["archs"])


def load(library: Path) -> ModuleType:
    """The module in that file, under the name that exllamav2 imports.

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


def compute(module: Any, archs: tuple[str, ...] = ()) -> list[int]:
    """Run one of its kernels on each GPU, or each that `archs` cover, and compare with torch; those GPUs.

    Torch computes on the CPU: on a GPU each of its own kernels would have to be loaded first.

    Raises:
        RuntimeError: it cannot be run there, or computes something else.
    """
    import torch

    given = torch.linspace(-100, 100, 512, dtype=torch.half)
    expected = torch.tanh(given.float() / _SCALE) * _SCALE
    tried = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if archs and uncovered(archs, [torch.cuda.get_device_capability(index)]):
            continue
        result = given.to(f"cuda:{index}")
        module.softcap_(result, _SCALE)
        torch.cuda.synchronize(index)
        # A kernel for which there is no code is not run at all and leaves its input as it was.
        if not torch.allclose(result.cpu().float(), expected, rtol=0.01, atol=0.05):
            raise RuntimeError(f"no kernel image is available for {torch.cuda.get_device_name(index)}, or it is broken")
        tried.append(index)
    return tried


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU had no room, be it for a tensor or for CUDA itself."""
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


def main() -> None:
    """The process."""
    import torch

    module = load(Path(sys.argv[1]))
    try:
        gpus = compute(module, parse_archs(" ".join(sys.argv[2:])))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        gpus = []  # others fill the GPU: nothing against the extension
    archs = sorted({torch.cuda.get_device_capability(index) for index in gpus})
    names = [torch.cuda.get_device_name(index) for index in gpus]
    sys.stdout.write(json.dumps({"gpus": names, "archs": [f"{major}.{minor}" for major, minor in archs]}) + "\n")


if __name__ == "__main__":
    main()
