"""`exl serve`: models over HTTP, for the clients of OpenAI's, Anthropic's and TabbyAPI's servers."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from exl_cli import loader
from exl_cli.cli.options import ModelsDir, Quiet, State, loading_option, with_loading
from exl_cli.errors import UsageError, param
from exl_cli.models import folders
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.ui.console import flags
from exl_cli.ui.text import harmless

_network = partial(typer.Option, rich_help_panel="Network")
_serving = partial(typer.Option, rich_help_panel="Serving")

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@with_loading
def serve(
    ctx: typer.Context,
    loading: LoadOptions,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Models, as for exl run; requests that name none get the first. \\[default: fable-7m]",
            autocompletion=folders.complete_model,
        ),
    ] = None,
    host: Annotated[
        str, _network("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[
        int, _network("--port", metavar="PORT", min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8080,
    api_key_file: Annotated[
        Path | None,
        _network(
            "--api-key-file",
            metavar="FILE",
            help="File with one API key per line, as name: key; reloaded when it changes.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        _network(
            "--allow-host", metavar="HOST", help="Accept this host name from clients, e.g. a proxy's; repeatable."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        _network(
            "--cors-origin",
            metavar="ORIGIN",
            help="Accept requests from web pages of this origin, e.g. https://example.org; repeatable.",
        ),
    ] = None,
    served_name: Annotated[
        list[str] | None,
        _serving("--served-name", metavar="NAME", help="Another name for the first model, or NAME=MODEL; repeatable."),
    ] = None,
    any_name: Annotated[
        bool, _serving("--any-name", help="Use the first model for requests that name an unknown one.")
    ] = False,
    max_loaded: Annotated[
        int | None,
        _serving(
            "--max-loaded",
            metavar="N",
            min=1,
            help="Maximum number of models in memory. \\[default: as many as are named]",
        ),
    ] = None,
    idle_unload: Annotated[
        str | None,
        _serving("--idle-unload", metavar="TIME", help="Unload a model that has been idle this long, e.g. 15m."),
    ] = None,
    queue: Annotated[
        int,
        _serving(
            "--queue", metavar="N", min=0, help="Maximum number of queued generations; further requests get a 429."
        ),
    ] = 1024,
    grace: Annotated[
        str,
        _serving(
            "--grace", metavar="TIME", help="How long running requests may take to finish after SIGTERM or Ctrl-C."
        ),
    ] = "30s",
    cache_per_key: Annotated[
        bool, _serving("--cache-per-key", help="Reuse a prompt's KV cache only for requests with the same API key.")
    ] = False,
    log_prompts: Annotated[bool, _serving("--log-prompts", help="Write prompts to the log.")] = False,
    sequences: Annotated[
        int | None,
        loading_option(
            "--sequences",
            metavar="N",
            min=1,
            help="Full-length sequences to make room for in the KV cache. \\[default: up to 8]",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        _serving(
            "--replicas",
            metavar="N",
            min=1,
            help="Number of servers behind Ray Serve, each with its own GPU (needs exl-cli\\[ray]).",
        ),
    ] = None,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
) -> None:
    """Serve models over HTTP, with the APIs of OpenAI, Anthropic and TabbyAPI.

    Base URL for OpenAI clients: http://127.0.0.1:8080/v1. API reference: http://127.0.0.1:8080/docs.
    """
    cli: State = ctx.obj
    idle_seconds = None if idle_unload is None else _seconds("idle_unload", idle_unload)
    grace_seconds = _seconds("grace", grace)
    named = _named(models, models_dir)
    source = ctx.get_parameter_source("models_dir")
    # Named by the environment it says where models are; named here it says that they are to be served.
    folder = models_dir if source is not None and source.name == "COMMANDLINE" else None
    if loading.draft is not None and (len(named) > 1 or folder is not None):
        raise UsageError(
            f"{param('draft')} works with one model only", f"serve a single model, or drop {param('draft')}"
        )
    loading = loader.with_draft(loading, models_dir)
    aliases = _aliases(served_name or [], named)

    # What is wrong with these shows before the seconds that imports take.
    from exl_cli.server.keys import Keys

    log = _Log(quiet=quiet)
    keys = None if api_key_file is None else Keys(api_key_file, log.warn)
    if cache_per_key and keys is None:
        raise UsageError(f"{param('cache_per_key')} needs API keys", f"add {param('api_key_file')}")

    import asyncio

    from exl_cli.server import run
    from exl_cli.server.app import create_app
    from exl_cli.server.gate import Policy
    from exl_cli.server.pool import Catalog, ModelPool
    from exl_cli.server.state import ServerState, Settings

    listener = run.listen(host, port)
    if cli.owns_process:
        run.raise_file_limit()

    most = max_loaded or len(named)
    settings = Settings(queue=queue, prefix_cache_per_key=cache_per_key, log_prompts=log_prompts, debug=cli.debug)
    hosts = frozenset({name.lower() for name in (host, socket.gethostname(), *(allow_host or []))})
    origins = frozenset(cors_origin or [])

    async def main() -> None:
        catalog = Catalog(named, aliases, folder, any_name=any_name)
        pool = ModelPool(
            catalog, loading, log, cli.load, sequences=sequences, max_loaded=most, idle_seconds=idle_seconds
        )
        state = ServerState(pool, settings, note=log.note, warn=log.warn)
        app = create_app(state, Policy(keys, hosts, origins))
        try:
            await run.serve(
                app, state, listener, preload=[*named][:most], grace=grace_seconds, signals=cli.owns_process
            )
        finally:
            if not cli.owns_process:
                await pool.close()

    if replicas is not None:
        from exl_cli.server.replicas import Plan, import_ray, serve_replicas

        import_ray()  # before the log says that the server listens
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    if keys is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        log.warn(
            f"WARNING: no API key is required, so anyone who can reach {shown} can use these models; see --api-key-file"
        )
    log.note(
        f"listening on http://{shown}:{address[1]} (API reference at /docs), loading {', '.join([*named][:max_loaded])}"
    )
    if replicas is None:
        asyncio.run(main())
        return

    settings = dataclasses.replace(settings, queue=-(-queue // replicas))
    plan = Plan(
        {name: info.path.absolute() for name, info in named.items()},
        aliases,
        None if folder is None else folder.absolute(),
        any_name,
        loading,
        sequences,
        most,
        idle_seconds,
        settings,
        None if api_key_file is None else api_key_file.absolute(),
        hosts,
        origins,
        log,
        cli.load,
    )
    serve_replicas(plan, replicas, listener, grace_seconds, log.note)


class _Log:
    """Lines on stderr with the time, from any thread; a `loader.Observer`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def note(self, message: str) -> None:
        """A line that `--quiet` leaves out."""
        if not self._quiet:
            self.warn(message)

    def warn(self, message: str) -> None:
        """A line."""
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {harmless(flags(message), terminal=sys.stderr.isatty())}\n")
        sys.stderr.flush()

    def progress(self, done: int, total: int) -> None:
        """A log has no use for it."""


def _named(models: list[str] | None, models_dir: Path | None) -> dict[str, ModelInfo]:
    """The models by the names that requests use: as given, or the folder's name of a path."""
    named: dict[str, ModelInfo] = {}
    for model in models or [folders.BUILTIN]:
        info = loader.resolve(model, models_dir)
        name = _name(model)
        if name in named:
            raise UsageError(f"two models have the name {name}", "give each model once")
        named[name] = info
    return named


def _name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _aliases(served_names: list[str], named: dict[str, ModelInfo]) -> dict[str, str]:
    aliases = {}
    for text in served_names:
        name, equals, model = text.partition("=")
        if equals and _name(model) not in named:
            raise UsageError(
                f"{param('served_name')} {text}: {model!r} is not being served",
                "name one of the models on the command line",
            )
        if not name.strip() or name in named or name in aliases:
            raise UsageError(f"{param('served_name')} {text}: the name is empty or already taken", "choose another")
        aliases[name] = _name(model) if equals else next(iter(named))
    return aliases


def _seconds(name: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None:
        raise UsageError(f"{param(name)} must be a duration, got {text!r}", "write it as 90s, 15m or 2h")
    return float(match[1]) * _SECONDS[match[2]]
