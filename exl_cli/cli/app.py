"""The Typer app, and the only place where errors become messages and exit codes."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
import typer.core

from exl_cli.cli import standard_streams, usage
from exl_cli.cli.options import State
from exl_cli.errors import ExitCode, ExlError
from exl_cli.system.version import installed_version
from exl_cli.ui.console import Console, abandon_stdout


class _Command(typer.core.TyperCommand):
    """A command whose help shows arguments and switches without a type."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class _Group(typer.core.TyperGroup):
    """Imports a command when it is asked for; turns exceptions into a line on stderr and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in _COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _import_command(cmd_name)
        return self.commands.get(cmd_name)

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise usage.unknown_command(args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: Any = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        """Run the app. Errors before a command is reached also end in a line on stderr."""
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except usage.RawUsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # how newer Typers show the help of a bare `exl`
                typer.echo(str(error), err=True)
                sys.exit(ExitCode.USAGE)
            code = _say(usage.explain(error, None))
        except ExlError as error:
            code = _say(error)
        except (BrokenPipeError, SystemExit) as error:
            # Typer ends with 1 when the reader of its help went away.
            if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
                raise
            abandon_stdout()
            code = ExitCode.BROKEN_PIPE
        except typer.Abort:
            code = _say(ExlError("aborted: end of input"))
        if standalone_mode:
            sys.exit(code)
        return code

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        state: State = ctx.ensure_object(State)
        try:
            return super().invoke(ctx)
        except usage.RawUsageError as error:
            raise typer.Exit(_say(usage.explain(error, ctx.invoked_subcommand))) from error
        except ExlError as error:
            if state.debug:
                Console().traceback(error)
            raise typer.Exit(_say(error)) from error
        except BrokenPipeError as error:
            abandon_stdout()
            raise typer.Exit(ExitCode.BROKEN_PIPE) from error
        except (typer.Exit, typer.Abort, KeyboardInterrupt, EOFError):
            raise
        except Exception as error:
            if state.debug or type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise
            Console().error(error)
            raise typer.Exit(ExitCode.INTERNAL) from error


def _say(error: ExlError) -> int:
    """Show an error, and return its exit code."""
    Console().error(error)
    return error.exit_code


def _plain(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
        if param.param_type_name == "argument" and hasattr(param, "display_type_rich"):
            param.display_type_rich = _no_type  # Typer 0.29 adds "<str>" to the metavar
    return params


def _no_type(ctx: Any) -> None:
    """The type of an argument, in its help."""


app = typer.Typer(
    name="exl",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Get started: exl run -p "Once upon a time"\n\nEach command has examples in its help: exl run --help',
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"exl {installed_version()}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="EXL_DEBUG", help="Show a traceback when a command fails.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run GPTQ and EXL2 language models on an NVIDIA GPU or any CPU."""
    state = ctx.ensure_object(State)
    state.debug = debug
    if state.owns_process and not debug:
        standard_streams.silence_libraries()


# Commands in the order people meet them: the module, whose function has its name, and two examples for its help.
_COMMANDS = {
    "run": (
        "run",
        'exl run -p "Once upon a time"',
        'cat notes.txt | exl run MODEL -p "Summarize this." --temperature 0.3',
    ),
    "chat": (
        "chat",
        'exl chat MODEL --system "Answer in one sentence."',
        "exl chat --continue",
    ),
    "download": (
        "download",
        "exl download turboderp/Mistral-7B-instruct-exl2 --branches --vram 8",
        "exl download turboderp/Mistral-7B-instruct-exl2:4.0bpw",
    ),
    "list": (
        "list_models",
        "exl list",
        "exl list --models-dir ./models --json",
    ),
    "show": (
        "show",
        "exl show fable-7m",
        "exl show ./models/TheBloke_Mistral-7B-Instruct-v0.2-GPTQ",
    ),
    "rm": (
        "remove",
        "exl rm turboderp/Mistral-7B-instruct-exl2:4.0bpw",
        "exl rm TheBloke/Mistral-7B-Instruct-v0.2-GPTQ --yes",
    ),
    "serve": (
        "serve",
        "exl serve MODEL --max-seq-len 16384 --cache q8",
        "exl serve MODEL --host 0.0.0.0 --api-key-file keys.txt",
    ),
    "batch": (
        "batch",
        "exl batch prompts.jsonl -o responses.jsonl --model MODEL",
        'exl batch reviews.csv -o responses.jsonl --model MODEL --template "Translate: {text}"',
    ),
    "bench": (
        "bench",
        "exl bench MODEL --batch 1,8 --save before.json",
        "exl bench MODEL --batch 1,8 --compare before.json",
    ),
    "doctor": (
        "doctor",
        "exl doctor",
        "exl doctor fable-7m",
    ),
    "build": (
        "build",
        "exl build",
        "exl build --arch 8.6,9.0 --out wheels",
    ),
}


def _import_command(name: str) -> Any:
    """Typer's object for a command. To build all of them would take half of the time of a short command."""
    module, *examples = _COMMANDS[name]
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    function = getattr(importlib.import_module(f"exl_cli.cli.{module}"), module)
    alone.command(name, cls=_Command, epilog="\n\n".join(["Examples:", *examples]))(function)
    return typer.main.get_command(alone)


def main() -> int:
    """Run the `exl` command in a process that does nothing else, and return its exit code."""
    standard_streams.prepare()
    try:
        # Under `python -m` too, help, errors and completion are for `exl`.
        return app(prog_name="exl", obj=State(owns_process=True), standalone_mode=False) or 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else bool(stop.code)
