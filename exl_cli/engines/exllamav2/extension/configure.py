"""Has exllamav2 write its own build file, and stops it before it compiles.

`exllamav2.ext` knows its sources and flags; `torch.utils.cpp_extension.load` turns them into a `build.ninja` and then
calls ninja through its `_run_ninja_build`. With that one function replaced the build file is exactly what exllamav2's
own import would use, so that the import takes the result for its own. For processes that do nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from exl_cli.engines.exllamav2.extension import environment
from exl_cli.engines.exllamav2.extension.compiled import MODULE


@dataclass(frozen=True)
class Configured:
    """What is to be built.

    Attributes:
        folder: where; `build.ninja` is in it.
        archs: the architectures, as TORCH_CUDA_ARCH_LIST has them.
        targets: the files that ninja makes, the library last.
    """

    folder: Path
    archs: tuple[str, ...]
    targets: tuple[str, ...]


class _Written(BaseException):
    """Leaves exllamav2's import where it would compile. No Exception, so that nothing on the way swallows it."""


def configure(archs: str | None) -> Configured:
    """Write the build file.

    Args:
        archs: for TORCH_CUDA_ARCH_LIST; None for what exllamav2 takes: the GPUs that are here.

    Raises:
        RuntimeError: there is no GPU here and `archs` is None, or this torch works in another way.
    """
    if archs:
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    # As if no prebuilt extension were there, which would be taken instead.
    sys.modules[MODULE] = None  # type: ignore[assignment]
    import torch
    from torch.utils import cpp_extension

    if not archs and not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.device_count():
        raise RuntimeError("there is no GPU here to compile for: say which with --arch, as --arch 8.6")
    if not hasattr(cpp_extension, "_run_ninja_build"):
        raise RuntimeError(f"torch {torch.__version__} compiles in a way that exl does not know")

    def stop(build_directory: str, *args: object, **kwargs: object) -> NoReturn:
        raise _Written(build_directory)

    cpp_extension._run_ninja_build = stop
    # The package without its __init__, which imports everything that needs the extension.
    spec = importlib.util.find_spec(environment.EXLLAMAV2)
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("exllamav2 is not installed")
    package = types.ModuleType(environment.EXLLAMAV2)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[environment.EXLLAMAV2] = package
    try:
        importlib.import_module(f"{environment.EXLLAMAV2}.ext")
    except _Written as written:
        folder = Path(str(written))
        return Configured(folder, _archs(), targets(folder))
    finally:
        for name in [MODULE, *(name for name in sys.modules if name.partition(".")[0] == environment.EXLLAMAV2)]:
            sys.modules.pop(name, None)
    raise RuntimeError("another process has compiled it meanwhile: run the command again")


def _archs() -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))))


def targets(folder: Path) -> tuple[str, ...]:
    """The files that a build.ninja makes, in its order."""
    text = (folder / "build.ninja").read_text(encoding="utf-8")
    return tuple(re.findall(r"^build ([^:\s]+):", text, re.MULTILINE))
