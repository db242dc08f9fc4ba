"""exl: run GPTQ and EXL2 language models on your own GPU, or on any CPU.

From Python: `from exl_cli import download, load, Sampling`; see `exl_cli.api`. With LangChain: `exl_cli.langchain`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exl_cli.api.model import Model, load
    from exl_cli.api.streams import AsyncStream, Generation, Stream
    from exl_cli.errors import ExlError
    from exl_cli.sampling import Sampling

    __version__: str

__all__ = [
    "AsyncStream",
    "ExlError",
    "Generation",
    "Model",
    "Sampling",
    "Stream",
    "__version__",
    "download",
    "load",
]

# Imported on first use, so that `import exl_cli`, and with it `exl --help`, stays light.
_HOMES = {
    "AsyncStream": "api.streams",
    "ExlError": "errors",
    "Generation": "api.streams",
    "Model": "api.model",
    "Sampling": "sampling",
    "Stream": "api.streams",
    "load": "api.model",
}


def download(
    model_name: str,
    models_dir: str | Path = "./models/",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Download a model unless it is there. "owner/name" is in `models_dir/owner_name`, as in LangChain's notebook.

    Says on stdout when the model is there already, and then touches no network; shows on stderr how a download goes.

    Args:
        model_name: "owner/name" or "owner/name:revision".
        models_dir: where downloaded models are; made if need be.
        revision: a branch, tag or commit, as the quantizations of EXL2 repositories; anything but main has a folder of
            its own, `owner_name@revision`.
        token: for gated models; None for the one that huggingface_hub is logged in with.

    Returns:
        The model's folder, to be given to `load`.

    Raises:
        UsageError: not the name of a repository.
        DownloadError, DiskError: see `hub.download`.
    """
    from exl_cli.api import download as api
    from exl_cli.ui.console import Console
    from exl_cli.ui.progress import transfers

    return api.download(model_name, models_dir, revision, token, transfers(Console()))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from exl_cli.system.version import installed_version

        return installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
