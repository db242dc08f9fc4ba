"""`exl batch`: a file of prompts to a file of answers."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.cli.inputs import ensure
from exl_cli.cli.options import (
    Download,
    ModelsDir,
    Quiet,
    SamplingFlags,
    State,
    loading_option,
    output_option,
    with_loading,
    with_sampling,
)
from exl_cli.errors import ExitCode, UsageError, brief, os_errors, param
from exl_cli.models import folders
from exl_cli.models import prompt as prompt_texts
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build
from exl_cli.system.files import is_there
from exl_cli.system.interrupts import cancel_on_interrupt
from exl_cli.system.units import counted
from exl_cli.ui.console import Console

_prompts = partial(typer.Option, rich_help_panel="Prompts")
_work = partial(typer.Option, rich_help_panel="Job")
_many = partial(typer.Option, rich_help_panel="Many GPUs and machines (pip install 'exl-cli\\[ray]')")
_scoring = partial(typer.Option, rich_help_panel="Scores")


@with_sampling
@with_loading
def batch(
    ctx: typer.Context,
    loading: LoadOptions,
    sampling: SamplingFlags,
    prompts: Annotated[
        list[str], typer.Argument(metavar="INPUT", help="JSON Lines, plain text, CSV or Parquet; - is stdin.")
    ],
    output: Annotated[
        str,
        output_option(
            "--output", "-o", metavar="PATH", help="Output file, or a folder for several inputs; - is stdout."
        ),
    ],
    model: Annotated[
        str | None,
        loading_option(
            "--model", "-m", metavar="MODEL", help="Model, as for exl run.", autocompletion=folders.complete_model
        ),
    ] = None,
    system: Annotated[
        str | None, _prompts("--system", "-s", metavar="TEXT", help="System message for plain prompts.")
    ] = None,
    template: Annotated[
        str | None,
        _prompts(
            "--template", metavar="TEXT", help="Build each prompt from the line's fields, e.g. 'Translate: {text}'."
        ),
    ] = None,
    raw: Annotated[bool, _prompts("--raw", help="Send plain prompts as they are, without a chat template.")] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            metavar="N",
            min=1,
            help="Maximum number of new tokens, unless a line sets its own. \\[default: 512]",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop at this string; repeatable.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="N", min=0, help="Random seed; each line's seed is derived from it and the line's id."
        ),
    ] = 0,
    eval_field: Annotated[
        str | None,
        _scoring("--eval", metavar="FIELD", help="Score the responses against this field or column of the input."),
    ] = None,
    eval_by: Annotated[
        list[str] | None,
        _scoring(
            "--eval-by",
            metavar="METRIC",
            help="exact, regex (the field is a pattern) or json (equal values); repeatable. \\[default: exact]",
        ),
    ] = None,
    flat: Annotated[
        bool, output_option("--flat", help="Write only the text, finish reason and token counts of each response.")
    ] = False,
    ordered: Annotated[bool, output_option("--ordered", help="Write responses in input order.")] = False,
    retry_errors: Annotated[bool, _work("--retry-errors", help="Retry lines that failed in earlier runs.")] = False,
    mix: Annotated[
        bool, _work("--mix", help="Append even if the file has responses from another model or other settings.")
    ] = False,
    strict: Annotated[bool, _work("--strict", help="Stop at the first line that fails.")] = False,
    shard: Annotated[
        str | None,
        _work(
            "--shard",
            metavar="I/N",
            help="Process only shard I of N, counting from 0; both go into the output's file name.",
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        loading_option(
            "--sequences",
            metavar="N",
            min=1,
            help="Full-length sequences to make room for in the KV cache. \\[default: up to 256]",
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        _many("--gpus", metavar="all|N", help="Run one engine on each GPU of this machine, or on N of them."),
    ] = None,
    ray: Annotated[
        str | None,
        _many(
            "--ray", metavar="ADDRESS", help="Run engines on a Ray cluster; auto is the one this machine belongs to."
        ),
    ] = None,
    models_dir: ModelsDir = None,
    download: Download = False,
    quiet: Quiet = False,
) -> None:
    """Process a file of prompts; the same command resumes an interrupted job."""
    state: State = ctx.obj
    console = Console(quiet=quiet)
    prompt_texts.check_text(("--system", system), ("--template", template), ("--stop", stop))
    index, shards = _shard(shard)
    if ordered and retry_errors:
        raise UsageError(f"{param('ordered')} cannot be combined with {param('retry_errors')}", "drop one of them")
    if eval_by and eval_field is None:
        raise UsageError(f"{param('eval_by')} needs {param('eval')}", f"name the field with {param('eval')}")
    if eval_field is not None and "-" in (*prompts, output):
        raise UsageError(
            f"{param('eval')} reads the input and the output a second time", "use files, not stdin or stdout"
        )
    engine_count = _engine_count(gpus)
    if uses_ray := gpus is not None or ray is not None:
        _check_ray(param("gpus") if ray is None else param("ray"), [*prompts, output], ordered=ordered)
    build(sampling.given, sampling.preset)  # refuse what is wrong before a model is looked for
    info = ensure(model, models_dir, allow=download, console=console)
    loading = loader.with_draft(loading, models_dir)

    from exl_cli.batch.manifest import manifest
    from exl_cli.batch.models import ModelNames
    from exl_cli.batch.output import AnswerFile, Sink, StreamSink
    from exl_cli.batch.passes import OneEngine, answer_input, load_engine, prepare
    from exl_cli.batch.prompts import Settings
    from exl_cli.batch.rows import Source, check_path, open_source
    from exl_cli.batch.scores import METRICS, score
    from exl_cli.batch.windows import Options
    from exl_cli.ui.batch import BatchProgress, elsewhere, show_scores, summary

    metrics = [*dict.fromkeys(eval_by or ["exact"])]
    if unknown := next((metric for metric in metrics if metric not in METRICS), None):
        raise UsageError(f"{param('eval_by')} {unknown!r} is not a metric", f"metrics: {', '.join(METRICS)}")
    inputs = [check_path(name) for name in prompts]
    with os_errors(f"cannot write {brief(output)}", f"choose another {param('output')}"):
        outputs = _outputs(inputs, check_path(output), index, shards, is_folder=output.endswith("/"))
    settings = Settings(sampling.given, sampling.preset, max_new_tokens, seed, tuple(stop or ()), system, raw, template)

    def load(model: ModelInfo, tokenizer: Tokenizer) -> EngineThread:
        view.end()
        with console.loading(f"{model.name} ({model.format_name})") as observer:
            return load_engine(model, tokenizer, loading, sequences, state.load, observer)

    engines: OneEngine | RayEngines
    if uses_ray:
        from exl_cli.batch.cluster import RayEngines, Where

        engines = RayEngines(Where(ray, engine_count), settings, loading, sequences, state.load)
        preparer, _ = prepare(info, settings, loading)
    else:
        engines = OneEngine(load, settings, loading)
        preparer = engines.preparer(info)
    if not (preparer.has_chat_template or raw):
        console.note(f"{info.name} has no chat template; prompts are sent as they are")
    opened: dict[Path, Source] = {}
    for name in outputs:  # what is wrong with any of them shows before the first is begun
        source = open_source(name)
        if source.columns is not None:
            preparer.check_columns(source.columns)
            if eval_field is not None and eval_field not in source.columns:
                raise UsageError(f"{name} has no column {eval_field!r}", f"name another with {param('eval')}")
        if len(outputs) == 1:
            opened[name] = source  # a pipe cannot be opened again
        else:
            source.close()
    made = manifest(info, settings, cache=loading.cache, shard=f"{index}/{shards}", flat=flat, ordered=ordered)
    options = Options(flat, ordered, strict, index, shards)
    failed = 0
    try:
        for name, path in outputs.items():
            source = opened.get(name) or open_source(name)
            sink: Sink
            if path is None:
                sink = StreamSink()
            else:
                sink = AnswerFile(path, made, mix=mix, retry_errors=retry_errors)
                if sink.damaged:
                    console.note(f"{path}: {sink.damaged:,} damaged lines removed; their prompts run again")
            names = ModelNames(info, model, models_dir)
            try:
                with BatchProgress(console) as view, cancel_on_interrupt(engines.stop):
                    progress = answer_input(name, source, sink, names, engines, view, options)
            finally:
                sink.close()
            console.note(summary(progress, "standard output" if path is None else str(path)))
            if names.missing:
                console.note(elsewhere(names.missing, info.name))
            if engines.is_stopped:
                if path is not None:
                    console.note("stopped: run the same command to resume")
                raise typer.Exit(ExitCode.INTERRUPTED)
            if eval_field is not None and path is not None:
                show_scores(console, score(open_source(name), path, eval_field, metrics))
            failed += sink.failed + progress.failed
    finally:
        if not isinstance(engines, OneEngine):
            engines.close()
        elif engines.engine is not None:
            state.close(engines.engine)
    if ignored := engines.ignored - {eval_field}:
        console.note(f"ignored fields: {', '.join(sorted(ignored)[:20])}")
    if failed:
        again = "" if output == "-" else f"; {param('retry_errors')} retries them"
        console.note(f"{counted(failed, 'line')} failed; the output has the errors{again}")
        raise typer.Exit(ExitCode.LINES_FAILED)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"{param('shard')} must be I/N with I from 0 to N-1, got {text!r}", "write it as 0/8")
    return int(match[1]), int(match[2])


def _engine_count(text: str | None) -> int | None:
    """Of `--gpus`; None for as many as there are."""
    if text is None or text == "all":
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise UsageError(f"{param('gpus')} must be all or a positive number, got {text!r}", "write it as all")
    return int(text)


def _check_ray(option: str, paths: list[str], *, ordered: bool) -> None:
    """Refuse what many engines cannot do."""
    if ordered:
        raise UsageError(f"{option} cannot be combined with {param('ordered')}", "drop one of them")
    if wrong := next((path for path in paths if path == "-" or Path(path).is_fifo()), None):
        raise UsageError(f"{option} needs files, and {wrong} is a pipe", "use files, not stdin or stdout")


def _outputs(prompts: list[Path], output: Path, shard: int, shards: int, *, is_folder: bool) -> dict[Path, Path | None]:
    """Where the answers to each input go: None for standard output."""
    if str(output) == "-":
        if len(prompts) > 1:
            raise UsageError(
                "several inputs need a folder for the output", f"pass an existing folder to {param('output')}"
            )
        return {prompts[0]: None}
    if is_folder or output.is_dir() or len(prompts) > 1:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is not a folder", f"choose another {param('output')}")
        if any(str(path) == "-" for path in prompts):
            raise UsageError("standard input has no file name to use in a folder", f"pass a file to {param('output')}")
        paths = {path: output / _output_name(path) for path in prompts}
    else:
        paths = {prompts[0]: output}
    if shards > 1:
        paths = {k: path.with_name(f"{path.stem}.{shard}-of-{shards}{path.suffix}") for k, path in paths.items()}
    if len(set(paths.values())) < len(prompts):
        raise UsageError("two inputs have the same name", "rename one, or run them separately")
    for path in paths.values():
        if path.exists() and not path.is_file():
            raise UsageError(
                f"{path} is not a regular file", f"choose another {param('output')}, or - for standard output"
            )
        if path.exists() and any(
            str(input_) != "-" and path.samefile(input_) for input_ in prompts if is_there(input_)
        ):
            raise UsageError(f"{path} is an input", f"choose another {param('output')}")
    return dict(paths)


def _output_name(prompts: Path) -> str:
    return f"{prompts.name.removesuffix('.gz').rpartition('.')[0] or prompts.name}.jsonl"
