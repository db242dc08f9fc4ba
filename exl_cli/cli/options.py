"""Flags that several commands share, and decorators that add groups of them to a command."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Engine
from exl_cli.models import folders
from exl_cli.models.load_options import CacheType, EngineChoice, LoadOptions, Speculation, parse_gpu_split
from exl_cli.sampling import FIELDS, PRESETS, Sampling

_sampling_option = partial(typer.Option, rich_help_panel="Sampling")
loading_option = partial(typer.Option, rich_help_panel="Model")
output_option = partial(typer.Option, rich_help_panel="Output")

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Model folder, downloaded owner/name[:revision], or fable-7m, the built-in model. \\[default: fable-7m]",
        autocompletion=folders.complete_model,
    ),
]
ModelsDir = Annotated[
    Path | None,
    loading_option(
        "--models-dir", metavar="FOLDER", readable=False, envvar="EXL_MODELS_DIR", help="Folder of downloaded models."
    ),
]
Download = Annotated[bool, loading_option("--download", help="Download the model if it is missing, without asking.")]
Quiet = Annotated[bool, output_option("--quiet", "-q", help="Print only errors on stderr.")]
Json = Annotated[bool, output_option("--json", help="Print JSON instead of text.")]
Verbose = Annotated[bool, output_option("--verbose", "-v", help="Also print sampler settings, stop strings and seed.")]


# Engines left to the end of the process. Without a reference an engine would close itself.
_kept: list[EngineThread] = []


@dataclasses.dataclass
class State:
    """Typer's context object: what the commands of one call share.

    Attributes:
        debug: show tracebacks.
        load: how a model is loaded; a program that embeds the app may bring another engine.
        owns_process: this process runs the command and nothing else, so its settings may be changed.
    """

    debug: bool = False
    load: Callable[..., Engine] = loader.load
    owns_process: bool = False

    def close(self, engine: EngineThread) -> None:
        """Close an engine, or leave that to the end of the process, which is faster."""
        if self.owns_process:
            _kept.append(engine)
        else:
            engine.close()


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """The sampling flags as given.

    Attributes:
        given: `Sampling` field names to values, those not given left out.
        preset: the name of a preset, or None.
    """

    given: dict[str, Any]
    preset: str | None


def with_sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for each field of `Sampling`, and `--preset`; the command gets them as `sampling: SamplingFlags`."""
    types = get_type_hints(Sampling)
    parameters = [
        _parameter(
            "preset",
            str | None,
            _sampling_option("--preset", metavar="NAME", help=f"Start from a preset: {', '.join(PRESETS)}."),
        )
    ]
    for field in dataclasses.fields(Sampling):
        info, kind = FIELDS[field.name], types[field.name]
        option = _sampling_option(
            *filter(None, (info.flag, info.alias)),
            metavar=None if kind is bool else f"<{info.range}>",
            help=info.help if kind is bool else f"{info.help} [dim]\\[default: {field.default}][/dim]",
            show_default=False,
        )
        parameters.append(_parameter(field.name, kind | None, option))

    def collect(values: dict[str, Any]) -> SamplingFlags:
        preset = values.pop("preset")
        return SamplingFlags({name: value for name, value in values.items() if value is not None}, preset)

    return _with_group(command, "sampling", parameters, collect)


def with_loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that say how a model is loaded; the command gets them as `loading: LoadOptions`."""

    def flag(name: str, type_: Any, default: Any, help: str, **more: Any) -> inspect.Parameter:
        option = loading_option("--" + name.replace("_", "-"), help=help, **more)
        return _parameter(name, type_, option, default)

    tokens = "Context length to allocate, in tokens. \\[default: 4096, or more if the request needs it]"
    guesses = "Speculative decoding; ngram drafts tokens by prompt lookup."
    smaller = "Speculative decoding with a smaller model of the same vocabulary."
    parameters = [
        flag(
            "engine",
            EngineChoice,
            "auto",
            "auto is exllamav2 if there is a GPU and the model is supported, otherwise cpu.",
        ),
        flag("max_seq_len", int | None, None, tokens, metavar="N"),
        flag("cache", CacheType, "fp16", "KV cache type on the GPU."),
        flag("gpu_split", str, "auto", "auto, or GiB of weights per GPU, e.g. 20,24.", metavar="auto|GIB,…"),
        flag("low_mem", bool, False, "Process prompts in smaller chunks to save GPU memory."),
        flag("speculate", Speculation, "off", guesses),
        flag("draft", str | None, None, smaller, metavar="MODEL", autocompletion=folders.complete_model),
    ]

    def collect(values: dict[str, Any]) -> LoadOptions:
        return LoadOptions(**{**values, "gpu_split": parse_gpu_split(values["gpu_split"])})

    return _with_group(command, "loading", parameters, collect)


def _parameter(name: str, type_: Any, option: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[type_, option])


def _with_group(
    command: Callable[..., Any],
    name: str,
    parameters: list[inspect.Parameter],
    collect: Callable[[dict[str, Any]], Any],
) -> Callable[..., Any]:
    """Replace the command's parameter `name` with several, from which `collect` builds its value."""

    @wraps(command)
    def wrapper(**kwargs: Any) -> Any:
        values = {parameter.name: kwargs.pop(parameter.name) for parameter in parameters}
        return command(**kwargs, **{name: collect(values)})

    signature = inspect.signature(command, eval_str=True)
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != name]
    wrapper.__signature__ = signature.replace(parameters=kept + parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in kept + parameters}
    del wrapper.__wrapped__  # typer would read the types of the original
    return wrapper
