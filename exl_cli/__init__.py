"""exl: run GPTQ and EXL2 language models on your own GPU, or on any CPU.

From Python: `from exl_cli import download, load, Sampling`; see `exl_cli.api`. With LangChain: `exl_cli.langchain`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exl_cli.api.model import Model, download, load
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
    "download": "api.model",
    "load": "api.model",
}


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
