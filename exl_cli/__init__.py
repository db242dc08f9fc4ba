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

# Imported on first use: `import exl_cli` and `exl --help` must stay light.
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
    """Download a model from the Hugging Face Hub into `models_dir/owner_name`, unless it is already there.

    If it is, says so on stdout without touching the network. Progress goes to stderr.

    Args:
        model_name: "owner/name" or "owner/name:revision".
        models_dir: parent folder of downloaded models; created if missing.
        revision: a branch, tag or commit; EXL2 repositories keep one quantization per branch. Anything but main goes
            into `owner_name@revision`.
        token: Hub token for gated models; None for the one stored by `hf auth login`.

    Returns:
        The model's folder, to pass to `load`.

    Raises:
        UsageError: `model_name` is not a repository name.
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
