"""What exllamav2 and torch raise, as errors that a person can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from exl_cli.errors import DamagedModelError, EngineError, OutOfMemoryError, UsageError
from exl_cli.models import memory
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions


@contextlib.contextmanager
def translated(
    info: ModelInfo | None = None, context_length: int = 0, options: LoadOptions | None = None
) -> Iterator[None]:
    """Turn what exllamav2 raises into errors that say the next step.

    Args:
        info, context_length, options: what is being loaded; without them, it is loaded already.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory(info, context_length) from error
    except (RuntimeError, AssertionError, ValueError, KeyError, TypeError) as error:
        text = str(error).strip(" #\n") or type(error).__name__
        if "Insufficient VRAM" in text or "out of memory" in text:
            raise _out_of_memory(info, context_length) from error
        if "Insufficient space in device allocation" in text:
            split = ",".join(f"{gib:g}" for gib in options.gpu_split or ()) if options else ""
            raise UsageError(
                f"the model does not fit --gpu-split {split} (GiB per GPU)",
                "raise the numbers, or use --gpu-split auto",
            ) from error
        if info is not None and not isinstance(error, RuntimeError):
            raise DamagedModelError(
                f"exllamav2 cannot load {info.path}: {text.splitlines()[0]}", "see --debug"
            ) from error
        raise EngineError(f"exllamav2 failed: {text.splitlines()[0]}", "run again with --debug to see where") from error


def cause(error: BaseException) -> str:
    """The line of an exception that says what went wrong.

    What compilers and linkers raise ends with it; after a CUDA error, torch goes on with advice for developers.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("CUDA ")), lines[-1] if lines else type(error).__name__)


def free_bytes() -> list[int]:
    """Bytes free on each GPU."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def _out_of_memory(info: ModelInfo | None, context_length: int) -> OutOfMemoryError:
    held = torch.cuda.memory_reserved()
    have = f"{(sum(free_bytes()) + held) / memory.GIB:.1f} GiB of GPU memory are free"
    if info is None:
        return OutOfMemoryError(
            f"the GPU ran out of memory; {have}", "use --cache q4, a smaller --max-seq-len or --low-mem"
        )
    need = info.size_bytes / memory.GIB
    return OutOfMemoryError(
        f"{info.name} needs {need:.1f} GiB for its weights and more for a context of {context_length:,} tokens; {have}",
        "use --cache q4, a smaller --max-seq-len or --low-mem, or free the GPU (nvidia-smi shows who uses it)",
    )
