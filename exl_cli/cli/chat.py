"""`exl chat`: a conversation with a model."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Annotated, Any

import typer

from exl_cli import loader
from exl_cli.chat.conversation import Conversation, ReadLine
from exl_cli.chat.model import ChatModel, ModelLoader
from exl_cli.chat.session import Session, SessionStore, data_dir
from exl_cli.chat.settings import DEFAULT_NEW_TOKENS, Overflow, Settings, from_dict
from exl_cli.cli.inputs import not_a_model
from exl_cli.cli.options import Model as ModelArgument
from exl_cli.cli.options import ModelsDir, Quiet, SamplingFlags, State, with_loading, with_sampling
from exl_cli.errors import ModelNotFoundError, UsageError
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.prompt import check_text
from exl_cli.system.interrupts import handling
from exl_cli.ui.chat import ChatConsole, plain_reader

_option = partial(typer.Option, rich_help_panel="Conversation")


@with_sampling
@with_loading
def chat(
    ctx: typer.Context,
    loading: LoadOptions,
    sampling: SamplingFlags,
    model: ModelArgument = None,
    system: Annotated[str | None, _option("--system", "-s", metavar="TEXT", help="System message.")] = None,
    session: Annotated[
        str | None, _option("--session", metavar="NAME", help="Resume this session, or start a new one of this name.")
    ] = None,
    go_on: Annotated[bool, _option("--continue", "-c", help="Resume the last session.")] = False,
    no_save: Annotated[bool, _option("--no-save", help="Do not save the conversation.")] = False,
    on_overflow: Annotated[
        Overflow | None,
        _option(
            "--on-overflow",
            help="When the context is full: drop the oldest turns, or stop. \\[default: trim]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            metavar="N",
            min=1,
            help=f"Maximum number of tokens per response. \\[default: {DEFAULT_NEW_TOKENS}]",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop a response at this string; repeatable.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            help="Random seed; the same seed gives the same conversation. \\[default: random]",
        ),
    ] = None,
    markdown: Annotated[bool, _option("--markdown", help="Render responses as Markdown on a terminal.")] = False,
    hide_thinking: Annotated[bool, _option("--hide-thinking", help="Hide the model's reasoning.")] = False,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
) -> None:
    """Chat with a model; /help lists commands.

    Each line of input is a message or a command; \"\"\" starts and ends a message of several lines.

    Responses go to stdout, everything else to stderr. Sessions are saved in EXL_DATA_DIR or your user data folder.
    """
    state: State = ctx.obj
    check_text(("--system", system), ("--stop", stop))
    console = ChatConsole(quiet=quiet)
    store = SessionStore(data_dir() / "sessions")
    saved = _session(store, session, go_on=go_on)
    if system is not None:
        saved.system = system
    given = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
        "on_overflow": on_overflow,
        "thinking": False if hide_thinking else None,
        "markdown": markdown or None,
    }
    settings = _settings(saved, sampling, {name: value for name, value in given.items() if value is not None})
    models = ModelLoader(state.load, loader.with_draft(loading, models_dir), models_dir, console)
    opened = _find(models, model, saved)
    spelled = [] if saved.system is None else opened.check_system(saved)
    console.leaves_on_interrupt = state.owns_process  # there is nothing to lose yet
    models.load(opened)
    console.leaves_on_interrupt = False
    interactive = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    talk = Conversation(
        opened, saved, settings, models, console, store, saving=not no_save, interactive=interactive, debug=state.debug
    )
    try:
        talk.say_spelled("system message", spelled)
        if saved.turns:
            console.resumed(saved)
        elif interactive:
            console.note(
                "/help lists commands · Alt-Enter inserts a newline · Ctrl-C stops the response · Ctrl-D exits"
            )
        with handling(_leave, signal.SIGTERM, signal.SIGHUP):
            talk.run(_reader(talk, console, interactive=interactive, keep_history=not no_save))
    finally:
        state.close(talk.model.engine)
    if talk.exit_code:
        raise typer.Exit(talk.exit_code)


def _session(store: SessionStore, name: str | None, *, go_on: bool) -> Session:
    if name is not None and go_on:
        raise UsageError("--session cannot be combined with --continue", "drop one of them")
    if go_on:
        names = store.names()
        if not names:
            raise UsageError(f"no saved sessions in {store.folder}", "start one without --continue")
        return store.load(names[0])
    if name is None:
        return Session()
    return store.load(name) if store.exists(name) else Session(name=name)


def _find(models: ModelLoader, name: str | None, session: Session) -> ChatModel:
    """The model named on the command line, else the session's, else the built-in one."""
    try:
        return models.find(name or session.model or None)
    except ModelNotFoundError as error:
        if name is not None and isinstance(error, loader.UnfamiliarNameError):
            raise not_a_model(error, name, "if that is a message, start exl chat and type it there") from error
        if name is not None:
            raise
        hint = f"to use another model, run exl chat MODEL --session {session.name}"
        raise ModelNotFoundError(f"{error.message} (used by session {session.name})", hint) from error


def _settings(session: Session, flags: SamplingFlags, given: dict[str, Any]) -> Settings:
    """The session's settings, overridden by flags."""
    settings = from_dict(session.settings)
    if flags.preset is not None:
        settings = settings.with_preset(flags.preset)
    return replace(settings, given={**settings.given, **flags.given}, **given)


def _reader(talk: Conversation, console: ChatConsole, *, interactive: bool, keep_history: bool) -> ReadLine:
    interactive = interactive and sys.stderr.isatty()
    if not interactive or console.err.is_dumb_terminal:
        return plain_reader(prompts=interactive)
    from exl_cli.ui.terminal import terminal_reader

    return terminal_reader(talk, data_dir() / "chat_history" if keep_history else None)


def _leave(number: int, frame: FrameType | None) -> None:
    """Exit through every `finally` on SIGTERM or SIGHUP, to keep the part of an answer that is there."""
    raise SystemExit(128 + number)
