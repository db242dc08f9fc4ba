"""Flags that several commands share, and the decorator that adds whole groups of them to a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from exl_cli import loader
from exl_cli.engines.base import Engine
from exl_cli.models import folders
from exl_cli.models.load_options import CacheType, EngineChoice, LoadOptions, Speculation, parse_gpu_split
from exl_cli.sampling import FIELDS, PRESETS, Sampling

SAMPLING_PANEL = "Sampling"
LOADING_PANEL = "Loading the model"
OUTPUT_PANEL = "Output"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a downloaded owner/name[:revision], or fable-7m, the built-in model (the default).",
        autocompletion=folders.complete_model,
    ),
]
ModelsDir = Annotated[
    Path | None,
    typer.Option(
        "--models-dir", envvar="EXL_MODELS_DIR", help="Folder of downloaded models.", rich_help_panel=LOADING_PANEL
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but errors on stderr.", rich_help_panel=OUTPUT_PANEL)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of text.", rich_help_panel=OUTPUT_PANEL)
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also print settings, model and stop strings.", rich_help_panel=OUTPUT_PANEL),
]


@dataclasses.dataclass
class State:
    """Typer's context object: what the commands of one call share.

    Attributes:
        debug: show tracebacks.
        load: how a model is loaded; a program that embeds the app may have an engine of its own.
        owns_process: this process runs the command and nothing else, so its settings may be changed.
    """

    debug: bool = False
    load: Callable[..., Engine] = loader.load
    owns_process: bool = False


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
            typer.Option("--preset", help=f"Named settings: {', '.join(PRESETS)}.", rich_help_panel=SAMPLING_PANEL),
        )
    ]
    for field in dataclasses.fields(Sampling):
        info, kind = FIELDS[field.name], types[field.name]
        option = typer.Option(
            *filter(None, (info.flag, info.alias)),
            metavar=None if kind is bool else f"<{info.range}>",
            help=f"{info.help} [dim]\\[{field.default}][/dim]",
            rich_help_panel=SAMPLING_PANEL,
            show_default=False,
        )
        parameters.append(_parameter(field.name, kind | None, option))

    def collect(values: dict[str, Any]) -> SamplingFlags:
        preset = values.pop("preset")
        return SamplingFlags({name: value for name, value in values.items() if value is not None}, preset)

    return _with_group(command, "sampling", parameters, collect)


def with_loading(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that say how a model is loaded; the command gets them as `loading: LoadOptions`."""

    def option(*flags: str, help: str) -> Any:
        return typer.Option(*flags, help=help, rich_help_panel=LOADING_PANEL)

    parameters = [
        _parameter(
            "engine",
            EngineChoice,
            option("--engine", help="auto takes exllamav2 where a GPU and the model allow it."),
            "auto",
        ),
        _parameter(
            "max_seq_len",
            int | None,
            option("--max-seq-len", help="Context to allocate (tokens) \\[as needed, up to the model's]."),
        ),
        _parameter("cache", CacheType, option("--cache", help="Type of the KV cache on the GPU."), "fp16"),
        _parameter("gpu_split", str, option("--gpu-split", help="auto, or GiB of weights per GPU, as 20,24."), "auto"),
        _parameter(
            "low_mem", bool, option("--low-mem", help="Smaller prompt chunks: less scratch memory on the GPU."), False
        ),
        _parameter(
            "speculate",
            Speculation,
            option("--speculate", help="ngram: guess tokens from what was said before, verify several in one pass."),
            "off",
        ),
        _parameter(
            "draft",
            str | None,
            typer.Option(
                "--draft",
                metavar="MODEL",
                help="Let a smaller model of the same vocabulary guess them.",
                rich_help_panel=LOADING_PANEL,
                autocompletion=folders.complete_model,
            ),
        ),
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
    """Replace the command's parameter `name` by others, whose values `collect` turns into its value."""

    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> Any:
        values = {parameter.name: kwargs.pop(parameter.name) for parameter in parameters}
        return command(**kwargs, **{name: collect(values)})

    signature = inspect.signature(command, eval_str=True)
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != name]
    wrapper.__signature__ = signature.replace(parameters=kept + parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in kept + parameters}
    del wrapper.__wrapped__  # typer would read the types of the original
    return wrapper
