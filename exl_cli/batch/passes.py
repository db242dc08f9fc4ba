"""From an input to its output: a pass over the rows for each model that they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.batch.job import Job, Progress, View
from exl_cli.batch.manifest import model_hash
from exl_cli.batch.models import ModelNames
from exl_cli.batch.output import Sink
from exl_cli.batch.prompts import BatchModel, Preparer, Settings
from exl_cli.batch.rows import Row, Source, open_source
from exl_cli.batch.windows import Options, Pending
from exl_cli.engines.base import Engine
from exl_cli.errors import ExlError, OutOfMemoryError, UsageError, param
from exl_cli.models.chat_template import load_format
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

# Full-length sequences to allocate KV cache for by default: the largest of these that fits.
_SEQUENCES = (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2)


class Engines(Protocol):
    """One or more engines that answer rows.

    Attributes:
        is_stopped: whether `stop` was called.
    """

    is_stopped: bool

    def answer(
        self, rows: Pending, model: ModelInfo, sink: Sink, view: View, options: Options, progress: Progress
    ) -> None:
        """Answer rows with a model; see `Job.run`."""
        ...

    def stop(self) -> None:
        """Stop, and start nothing more; see `Job.stop`."""
        ...


def prepare(model: ModelInfo, settings: Settings, loading: LoadOptions) -> tuple[Preparer, Tokenizer]:
    """Make a model's `Preparer` and tokenizer.

    Raises:
        UsageError, PromptError: settings that make no sense for it.
        DamagedModelError: its files cannot be read.
    """
    tokenizer = Tokenizer(model.path)
    context = loader.context_to_allocate(model, loading)
    return Preparer(BatchModel(model.name, model, tokenizer, load_format(model.path), context), settings), tokenizer


def load_engine(
    model: ModelInfo,
    tokenizer: Tokenizer,
    loading: LoadOptions,
    sequences: int | None,
    load: Callable[..., Engine],
    observer: loader.Observer,
) -> EngineThread:
    """Load a model with room in the KV cache for many sequences.

    Args:
        model, tokenizer, loading, load, observer: see `loader.load`.
        sequences: full-length sequences to make room for; None for as many as fit.

    Raises:
        ExlError: see `loader.load`.
    """
    count = sequences or loader.fitting_sequences(model, loading, _SEQUENCES)
    while True:
        try:
            return EngineThread(load(model, tokenizer, dataclasses.replace(loading, sequences=count), observer))
        except OutOfMemoryError:
            if sequences or count == 1:
                raise
            count //= 2


class OneEngine:
    """An engine in this process, which runs one model at a time.

    Args:
        load: loads a model.
        settings: defaults for what rows do not set.
        loading: how models are loaded.

    Attributes:
        engine: the engine loaded last; the caller closes it.
        is_stopped: see `Engines`.
    """

    def __init__(
        self, load: Callable[[ModelInfo, Tokenizer], EngineThread], settings: Settings, loading: LoadOptions
    ) -> None:
        self.engine: EngineThread | None = None
        self.is_stopped = False
        self._load, self._settings, self._loading = load, settings, loading
        self._model: ModelInfo | None = None
        self._prepared: dict[Path, tuple[Preparer, Tokenizer]] = {}
        self._job: Job | None = None

    @property
    def ignored(self) -> set[str]:
        """Names of fields in rows that were ignored as unknown."""
        return {name for preparer, _ in self._prepared.values() for name in preparer.ignored}

    def preparer(self, model: ModelInfo) -> Preparer:
        """The preparer for a model; see `prepare`."""
        if model.path not in self._prepared:
            self._prepared[model.path] = prepare(model, self._settings, self._loading)
        return self._prepared[model.path][0]

    def answer(
        self, rows: Pending, model: ModelInfo, sink: Sink, view: View, options: Options, progress: Progress
    ) -> None:
        """See `Engines.answer`."""
        preparer = self.preparer(model)
        self._job = Job(rows, preparer, sink, lambda: self._engine_for(model), view, options, progress)
        if not self.is_stopped:
            self._job.run()

    def stop(self) -> None:
        """See `Engines.stop`. May be called from a signal handler."""
        self.is_stopped = True
        if self._job is not None:
            self._job.stop()

    def _engine_for(self, model: ModelInfo) -> EngineThread:
        if self.engine is not None and self._model is not None and self._model.path == model.path:
            return self.engine
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        self.engine, self._model = self._load(model, self._prepared[model.path][1]), model
        return self.engine


def answer_input(
    path: Path, source: Source, sink: Sink, names: ModelNames, engines: Engines, view: View, options: Options
) -> Progress:
    """Answer all rows of an input, each with the model that it names.

    Args:
        path: the input.
        source: the input, opened.
        sink: takes the answers.
        names: decides which model answers a row.
        engines: compute the answers.
        view: shows notes and progress.
        options: the job's options.

    Raises:
        ExlError: see `Job.run`.
    """
    progress = Progress()
    why = _why_one_model(path, options)
    for model in names.models:  # grows during the first pass
        is_first = model is names.models[0]
        names.missing.clear()  # each pass sees every row
        if not is_first:
            source = open_source(path)
            sink.add_model(model.name, model_hash(model))

        def select(row: Row, model: ModelInfo = model, is_first: bool = is_first) -> Row | None:
            try:
                own = names.of(row)
            except ExlError as error:
                return dataclasses.replace(row, error=error) if is_first else None
            if own is model:
                return row
            if not is_first:
                return None
            return dataclasses.replace(row, error=UsageError(f"it names {own.name}, but {why}")) if why else None

        engines.answer(Pending(source, sink.answered, options, select), model, sink, view, options, progress)
        if why or engines.is_stopped:
            break
    return progress


def _why_one_model(path: Path, options: Options) -> str | None:
    """Why only one model can answer this input; None if several can."""
    if options.ordered:
        return f"{param('ordered')} supports a single model only"
    if not path.is_file():
        return "an input that is not a file supports a single model only"
    return None
