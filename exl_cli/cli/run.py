"""`exl run`: one prompt, one response."""

from __future__ import annotations

import dataclasses
import secrets
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from exl_cli import loader
from exl_cli import sampling as samplings
from exl_cli.api import records
from exl_cli.api.engine_thread import EngineThread
from exl_cli.cli import inputs
from exl_cli.cli.inputs import ensure
from exl_cli.cli.options import (
    Download,
    Json,
    Model,
    ModelsDir,
    Quiet,
    SamplingFlags,
    State,
    Verbose,
    with_loading,
    with_sampling,
)
from exl_cli.engines.base import Request, Summary
from exl_cli.engines.response import check_can_fit, check_fits
from exl_cli.errors import ExitCode
from exl_cli.models import prompt as prompts
from exl_cli.models.chat_template import load_chat_template
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system import readings
from exl_cli.system.interrupts import cancel_on_interrupt
from exl_cli.ui.console import Console

_prompt = partial(typer.Option, rich_help_panel="Prompt")


@with_sampling
@with_loading
def run(
    ctx: typer.Context,
    loading: LoadOptions,
    sampling: SamplingFlags,
    model: Model = None,
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Same as --prompt.")] = None,
    prompt: Annotated[str | None, _prompt("--prompt", "-p", metavar="TEXT", help="The prompt.")] = None,
    file: Annotated[
        Path | None,
        _prompt(
            "--file",
            "-f",
            metavar="FILE",
            help="Read the prompt from a file; - is stdin. The final newline is dropped and CRLF becomes LF, "
            "except with --raw.",
        ),
    ] = None,
    system: Annotated[str | None, _prompt("--system", "-s", metavar="TEXT", help="System message.")] = None,
    raw: Annotated[bool, _prompt("--raw", help="Send the prompt byte for byte, without a chat template.")] = False,
    variant: Annotated[
        str | None,
        _prompt("--chat-template", metavar="NAME", help="Chat template to use if the model has several."),
    ] = None,
    template: Annotated[
        str | None, _prompt("--template", metavar="TEXT", help="Prompt with {name} placeholders, filled in by --var.")
    ] = None,
    var: Annotated[
        list[str] | None,
        _prompt("--var", metavar="NAME=VALUE", help="Value for a placeholder, as name=value; repeatable."),
    ] = None,
    show_prompt: Annotated[
        bool, _prompt("--show-prompt", help="Print the final prompt and its token count, without running it.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Maximum number of tokens to generate.")
    ] = 512,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop at this string; repeatable.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue past the end-of-response token.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", min=0, help="Random seed; the same seed gives the same text. \\[default: random]"
        ),
    ] = None,
    models_dir: ModelsDir = None,
    download: Download = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Generate a response to a single prompt."""
    state: State = ctx.obj
    console = Console(quiet=quiet)
    prompts.check_text(("--system", system), ("--template", template), ("--var", var), ("--stop", stop))
    variables = prompts.parse_variables(var or [])
    try:
        info = ensure(model, models_dir, allow=download, console=console)
    except loader.UnfamiliarNameError as error:
        if any(given is not None for given in (prompt, text, file, template)):
            raise
        raise inputs.not_a_model(error, model or "", "if that is a prompt, pass it with -p") from error
    if loading.draft is not None:
        ensure(loading.draft, models_dir, allow=download, console=console)
        loading = loader.with_draft(loading, models_dir)
    settings = samplings.build(sampling.given, sampling.preset, info.generation_config)
    chat = None if raw or template is not None else load_chat_template(info.path, variant)
    if chat is not None:
        chat.start()
    tokenizer = Tokenizer(info.path)
    rendered = prompts.render_prompt(
        inputs.gather(prompt, text, file, console.note, exact=raw),
        system=system,
        raw=raw,
        template=template,
        variables=variables,
        chat=chat,
        as_text=tokenizer.as_text,
    )
    context = loading.max_seq_len or info.extended_length
    if not show_prompt:
        check_can_fit(tokenizer.least_tokens(rendered.text), context, info.extended_length)
    ids = tokenizer.encode(rendered.text, add_special_tokens=rendered.add_special_tokens)
    if typed := tokenizer.hidden(rendered.text):
        console.note(f"{', '.join(typed)} in the prompt is treated as text, not as a special token")
        rendered = dataclasses.replace(rendered, text=tokenizer.shown(rendered.text))
    if rendered.kind == "raw" and not raw:
        console.note("the model has no chat template; the prompt is sent as it is")
    if show_prompt and as_json:
        console.data(records.prompt(rendered, ids))
        return
    if show_prompt:
        console.text(rendered.text)
        console.end_text()
        console.note(f"{len(ids):,} tokens")
        return
    check_fits(len(ids), context, info.extended_length)
    request = Request(
        ids=ids,
        sampling=settings,
        max_new_tokens=max_new_tokens,
        seed=secrets.randbits(31) if seed is None else seed,
        stop_strings=tuple(stop or ()),
        stop_ids=frozenset() if ignore_eos else tokenizer.eos_ids,
    )
    if verbose:
        console.note(str(settings.brief()))
    start = time.perf_counter()
    console.leaves_on_interrupt = state.owns_process
    with console.loading(f"{info.name} ({info.format_name})") as progress:
        engine = EngineThread(state.load(info, tokenizer, loading, progress, needed=len(ids) + max_new_tokens))
    load_seconds = time.perf_counter() - start
    try:
        if verbose:
            console.note(f"stop_sequences {list(request.stop_strings)}")
            console.note(f"seed {request.seed}")
        response, summary = _stream(engine, request, console, live=not as_json)
        gpus, host = readings.read_gpus(engine.memory()), readings.read_host()
        if as_json:
            console.data(
                records.generation(
                    info, engine, request, rendered.variables, response, summary, load_seconds, gpus, host
                )
            )
        else:
            console.summary(summary)
            console.memory(gpus, host)
            console.cut_off(summary, engine.context_length, info.extended_length)
    finally:
        state.close(engine)
    if summary.finish_reason == "cancelled":
        raise typer.Exit(ExitCode.INTERRUPTED)


def _stream(engine: EngineThread, request: Request, console: Console, *, live: bool) -> tuple[str, Summary]:
    """Generate the response, showing each piece as it comes if `live`; return its text and summary."""
    pieces: list[str] = []
    summary: Summary | None = None
    stream = engine.stream(request)
    with cancel_on_interrupt(stream.cancel), console.streaming() as show:
        for chunk in stream:
            pieces.append(chunk.text)
            if live:
                show(chunk.text)
            summary = chunk.summary or summary
    if summary is None:
        raise RuntimeError("the engine ended without a summary")
    return "".join(pieces), summary
