"""Smoke test of a compiled extension: load it and run a kernel, in a child process since it may crash or hang."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from exl_cli.engines.exllamav2.extension import hints
from exl_cli.engines.exllamav2.extension.compiled import MODULE, Torch, uncovered
from exl_cli.errors import EngineError
from exl_cli.system import questions

_SCALE, _SECONDS = 30.0, 300.0


class Tested(NamedTuple):
    """Names of the GPUs it ran on, and their architectures in TORCH_CUDA_ARCH_LIST's notation."""

    gpus: Sequence[str]
    archs: Sequence[str]


def run(library: Path, archs: Sequence[str], torch: Torch, log: IO[str]) -> Tested:
    """Test a library in a child process, on the GPUs that `archs` cover, with a time limit of five minutes.

    Raises:
        EngineError: it crashes, hangs, does not load, or computes wrong results.
    """
    answer = questions.ask(__name__, "examine", _SECONDS, {"library": str(library), "archs": list(archs)})
    log.write(answer.output)
    if answer.value is not None:
        return Tested(**answer.value)
    if answer.kind == "hang":
        raise EngineError("the compiled extension hangs on loading")
    if answer.kind == "crash":
        raise EngineError(f"the compiled extension crashes on loading{answer.problem.removeprefix('crashed')}")
    if known := hints.explain(answer.problem, torch):
        raise EngineError(known.what, known.fix)
    raise EngineError(f"the compiled extension fails to load: {answer.problem}")


def examine(library: str, archs: Sequence[str] = (), compute: bool = True) -> dict[str, Any]:
    """Entry point in the child: load the library and run a kernel; returns the fields of `Tested`."""
    import torch

    module, gpus = load(Path(library)), []
    try:
        gpus = compute_with(module, archs) if compute else []
    except Exception as error:
        if not is_out_of_memory(error):
            raise  # a full GPU says nothing about the extension
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in gpus})
    names = [torch.cuda.get_device_name(index) for index in gpus]
    return {"gpus": names, "archs": [f"{major}.{minor}" for major, minor in capabilities]}


def load(library: Path) -> ModuleType:
    """Load a library as module `exllamav2_ext`; ImportError if that fails."""
    import torch  # noqa: F401 - the extension links against its libraries

    spec = importlib.util.spec_from_file_location(MODULE, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute_with(module: Any, archs: Sequence[str] = ()) -> list[int]:
    """Run a kernel on each GPU that `archs` cover (by default all), compare with torch, and return the GPUs' indices.

    The reference is computed on the CPU, because torch's GPU kernels would take time to load.

    Raises:
        RuntimeError: the kernel does not run, or its results are wrong.
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
        # Without code for this GPU the kernel does not run, and the input stays unchanged.
        if not torch.allclose(result.cpu().float(), expected, rtol=0.01, atol=0.05):
            raise RuntimeError(f"no kernel image is available for {torch.cuda.get_device_name(index)}, or it is broken")
        tried.append(index)
    return tried


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU was out of memory, for a tensor or for the CUDA context."""
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error: out of memory" in str(error)


if __name__ == "__main__":
    questions.answer(globals())
