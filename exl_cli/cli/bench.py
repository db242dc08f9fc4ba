"""`exl bench`: measure models, and compare with earlier results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from exl_cli import sampling as samplings
from exl_cli.cli.options import ModelsDir, Quiet, SamplingFlags, State, output_option, with_loading, with_sampling
from exl_cli.errors import ExitCode, UsageError
from exl_cli.models import folders
from exl_cli.models.load_options import LoadOptions
from exl_cli.ui.console import Console

_tests = partial(typer.Option, rich_help_panel="Tests")
_comparing = partial(typer.Option, rich_help_panel="Comparing")

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
            help="Models, as for exl run; or a saved result (.json) to display. \\[default: fable-7m]",
            show_default=False,
            autocompletion=folders.complete_model,
        ),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        _tests("--prompt-tokens", "-p", metavar="N,…", help="Prompt lengths, e.g. 512,2048. \\[default: 512]"),
    ] = None,
    new_tokens: Annotated[
        str | None,
        _tests("--new-tokens", "-n", metavar="N,…", help="Generation lengths, e.g. 128,512. \\[default: 128]"),
    ] = None,
    depth: Annotated[
        str, _tests("--depth", "-d", metavar="N,…", help="Tokens of context before generation, e.g. 0,4096.")
    ] = "0",
    batch: Annotated[str, _tests("--batch", metavar="N,…", help="Concurrent requests, e.g. 1,4,16.")] = "1",
    caches: Annotated[
        str | None,
        _tests("--caches", metavar="TYPE,…", help="KV cache types to test, e.g. fp16,q4. \\[default: that of --cache]"),
    ] = None,
    repetitions: Annotated[
        int, _tests("--repetitions", "-r", metavar="N", min=1, max=1000, help="Repetitions of each test.")
    ] = 5,
    quick: Annotated[bool, _tests("--quick", help="Shorter tests: 128 prompt and 32 new tokens.")] = False,
    perplexity: Annotated[
        Path | None, _tests("--perplexity", metavar="FILE", help="Also compute the perplexity of this text file.")
    ] = None,
    seed: Annotated[int, _tests("--seed", metavar="N", min=0, help="Seed for prompts, test order and sampling.")] = 0,
    compare: Annotated[
        Path | None, _comparing("--compare", metavar="OLD.json", help="Compare with a saved result.")
    ] = None,
    fail_under: Annotated[
        float | None,
        _comparing(
            "--fail-under",
            metavar="RATIO",
            min=0.01,
            max=10.0,
            help="Exit with code 11 if a test drops below this fraction of --compare, e.g. 0.95.",
        ),
    ] = None,
    output: Annotated[Output, output_option("--output", "-o", help="Output format.")] = "table",
    save: Annotated[Path | None, output_option("--save", metavar="FILE", help="Also save the result as JSON.")] = None,
    report: Annotated[Path | None, output_option("--report", metavar="FILE", help="Also write an HTML report.")] = None,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
) -> None:
    """Measure how fast models run, and how close that is to the hardware's limit."""
    # Imported here to keep `exl --help` fast.
    from exl_cli.bench import outputs, plan, runner
    from exl_cli.bench.compare import compare as compared
    from exl_cli.bench.report import require_matplotlib
    from exl_cli.ui import bench
    from exl_cli.ui.console import flags

    state: State = ctx.obj
    console = Console(quiet=quiet)
    if fail_under is not None and compare is None:
        raise UsageError("--fail-under needs a result to compare with", "add --compare OLD.json")
    before = None if compare is None else outputs.load(compare)
    for path, name in ((save, "save"), (report, "report")):
        if path is not None:
            outputs.require_writable(path, name)
    if report is not None:
        require_matplotlib()
    failure = None
    saved = outputs.saved_result(models or [])
    if saved is not None:
        result = outputs.load(saved)
    else:
        prompts, news = ("128", "32") if quick else ("512", "128")
        settings = plan.Settings(
            plan.parse_counts(prompts if prompt_tokens is None else prompt_tokens, "prompt_tokens", 0),
            plan.parse_counts(news if new_tokens is None else new_tokens, "new_tokens", 0),
            plan.parse_counts(depth, "depth", 0),
            plan.parse_counts(batch, "batch", 1),
            repetitions,
            seed,
        )
        chosen = samplings.build(sampling.given, sampling.preset, {})
        loadings = plan.loadings(loading, caches)
        jobs = runner.jobs(models or [None], models_dir, loadings, settings, chosen, perplexity)
        with bench.Measuring(console) as observer:
            result, failure = runner.run(jobs, state.load, observer, debug=state.debug)
        if not result.runs:
            # Nothing was measured: print nothing, and do not overwrite a saved result with an empty one.
            if failure is not None:
                raise failure
            bench.doubts(console, result)
            raise typer.Exit(ExitCode.INTERRUPTED)
    comparison = None if before is None else compared(before, result)
    try:
        if output != "table":
            console.text(outputs.render(result, output, flags), is_json=output in ("json", "jsonl"))
        elif comparison is None:
            bench.tables(console, result)
        if comparison is not None:
            bench.comparison(console, comparison, on_stdout=output == "table")
        bench.doubts(console, result)
    finally:
        # Last, so that results are shown even if the disk is full; in `finally`, to save them even if stdout is closed.
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
