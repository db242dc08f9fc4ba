"""`exl bench`: how fast a model is, how close to what the hardware allows, and what has changed since last time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from exl_cli import sampling as samplings
from exl_cli.cli.options import OUTPUT_PANEL, ModelsDir, Quiet, SamplingFlags, State, with_loading, with_sampling
from exl_cli.errors import ExitCode, UsageError
from exl_cli.models import folders
from exl_cli.models.load_options import LoadOptions
from exl_cli.ui.console import Console

_TESTS = "What to measure"
_COMPARING = "Comparing"

Output = Literal["table", "md", "csv", "json", "jsonl"]


@with_sampling
@with_loading
def bench(
    ctx: typer.Context,
    loading: LoadOptions,
    sampling: SamplingFlags,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Models as in exl run, fable-7m when none is named; or one saved result (.json), to look at it.",
            show_default=False,
            autocompletion=folders.complete_model,
        ),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option("--prompt-tokens", "-p", help="Prompt lengths, as 512,2048 \\[512].", rich_help_panel=_TESTS),
    ] = None,
    new_tokens: Annotated[
        str | None,
        typer.Option("--new-tokens", "-n", help="Generation lengths, as 128 \\[128].", rich_help_panel=_TESTS),
    ] = None,
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Context before a generation, as 0,4096.", rich_help_panel=_TESTS)
    ] = "0",
    batch: Annotated[str, typer.Option("--batch", help="Requests at a time, as 1,4,16.", rich_help_panel=_TESTS)] = "1",
    caches: Annotated[
        str | None,
        typer.Option("--caches", help="KV cache types to go through, as fp16,q4 \\[--cache].", rich_help_panel=_TESTS),
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", min=1, max=1000, help="Of each test.", rich_help_panel=_TESTS)
    ] = 5,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Where no length is given: 128 prompt, 32 new tokens.", rich_help_panel=_TESTS),
    ] = False,
    perplexity: Annotated[
        Path | None,
        typer.Option("--perplexity", metavar="FILE", help="Also the perplexity of a text.", rich_help_panel=_TESTS),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of prompts, order and sampler.", rich_help_panel=_TESTS)
    ] = 0,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="OLD.json", help="What differs from a saved result.", rich_help_panel=_COMPARING
        ),
    ] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(
            "--fail-under",
            min=0.01,
            max=10.0,
            help="Exit 11 where a test falls under this share of --compare's, as 0.95.",
            rich_help_panel=_COMPARING,
        ),
    ] = None,
    output: Annotated[
        Output, typer.Option("--output", "-o", help="What to print.", rich_help_panel=OUTPUT_PANEL)
    ] = "table",
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Also write the result, as JSON.", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Also write an HTML report.", rich_help_panel=OUTPUT_PANEL),
    ] = None,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
) -> None:
    """Measure models: prompts, generation, first use, memory, distance from the hardware's limit."""
    # Its parts are imported only now: `exl --help` need not wait for them.
    from exl_cli.bench import charts, outputs, plan, runner
    from exl_cli.bench.compare import compare as compared
    from exl_cli.ui import bench
    from exl_cli.ui.console import flags

    state: State = ctx.obj
    console = Console(quiet=quiet)
    if fail_under is not None and compare is None:
        raise UsageError("--fail-under has nothing to measure against", "give a saved result with --compare")
    before = None if compare is None else outputs.load(compare)
    for path, name in ((save, "save"), (report, "report")):
        if path is not None:
            outputs.require_writable(path, name)
    if report is not None:
        charts.require_matplotlib()
    failure = None
    saved = outputs.saved_result(models or [])
    if saved is not None:
        result = outputs.load(saved)
    else:
        settings = plan.settings(quick, prompt_tokens, new_tokens, depth, batch, repetitions, seed)
        chosen = samplings.build(sampling.given, sampling.preset, {})
        loadings = plan.loadings(loading, caches)
        jobs = runner.jobs(models or [None], models_dir, loadings, settings, chosen, perplexity)
        with bench.Measuring(console) as observer:
            result, failure = runner.run(jobs, state.load, observer, debug=state.debug)
        if not result.runs:
            # Nothing was measured: there is nothing to print, and no good file to replace by an empty one.
            if failure is not None:
                raise failure
            bench.doubts(console, result)
            raise typer.Exit(ExitCode.INTERRUPTED)
    comparison = None if before is None else compared(before, result)
    try:
        if output != "table":
            console.text(outputs.render(result, output, flags))
        elif comparison is None:
            bench.tables(console, result)
        if comparison is not None:
            bench.comparison(console, comparison, on_stdout=output == "table")
        bench.doubts(console, result)
    finally:
        # Last, so that what was measured is shown even if the disk is full; and even if no one reads it any more.
        unsaved = outputs.keep(result, save, report, flags)
        for error in unsaved:
            console.error(error)
    if failure is not None:
        raise failure
    if unsaved:
        raise typer.Exit(unsaved[0].exit_code)
    if saved is None and result.partial:
        raise typer.Exit(ExitCode.INTERRUPTED)
    if comparison is not None and fail_under is not None and bench.fails(console, comparison, fail_under):
        raise typer.Exit(ExitCode.BENCH_SLOWER)
