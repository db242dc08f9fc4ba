"""The Typer app and its one error boundary."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
import typer.core

import exl_cli
from exl_cli.commands import bench, build, chat, doctor, download, list_models, remove, run, show
from exl_cli.console import Console, abandon_stdout
from exl_cli.errors import ExitCode, ExlError
from exl_cli.state import State


class _Group(typer.core.TyperGroup):
    """Turns what a command raises into a line on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        state: State = ctx.ensure_object(State)
        try:
            return super().invoke(ctx)
        except ExlError as error:
            if state.debug:
                raise
            Console().error(error)
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError as error:
            abandon_stdout()
            raise typer.Exit(ExitCode.BROKEN_PIPE) from error
        except (typer.Exit, typer.Abort, KeyboardInterrupt, EOFError):
            raise
        except Exception as error:
            if state.debug or type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise
            Console().bug(error)
            raise typer.Exit(ExitCode.INTERNAL) from error


app = typer.Typer(
    name="exl",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"exl {exl_cli.__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", envvar="EXL_DEBUG", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run GPTQ and EXL2 language models on your own GPU, or on any CPU."""
    ctx.ensure_object(State).debug = debug


app.command("run")(run.run)
app.command("bench")(bench.bench)
app.command("chat")(chat.chat)
app.command("download")(download.download)
app.command("list")(list_models.list_models)
app.command("show")(show.show)
app.command("rm")(remove.remove)
app.command("doctor")(doctor.doctor)
app.command("build")(build.build)


def main() -> None:
    """The `exl` command."""
    # A terminal or pipe in another encoding than UTF-8 must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()
    finally:
        # Python waits for threads that are at something yet, a second at most; interrupted, it would show frames.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
