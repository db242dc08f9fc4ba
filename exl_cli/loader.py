"""The model loader: resolve a name or path to a `ModelInfo`, then load it into an engine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from exl_cli import sampling
from exl_cli.engines.base import Engine
from exl_cli.engines.exllamav2 import startup
from exl_cli.engines.exllamav2.extension import build
from exl_cli.errors import (
    DamagedModelError,
    EngineError,
    ModelNotFoundError,
    UnsupportedModelError,
    UsageError,
    brief,
    did_you_mean,
    os_errors,
    param,
)
from exl_cli.models import memory, placement
from exl_cli.models.config import has_learned_positions
from exl_cli.models.folders import BUILTIN, BUILTIN_FOLDER, in_hub_cache, known_models, models_dir
from exl_cli.models.hub import names, store
from exl_cli.models.info import ModelInfo, inspect
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.files import expanded, is_folder, is_there
from exl_cli.system.interrupts import hold_interrupt

_MIN_ALLOCATION = 4096


class UnfamiliarNameError(ModelNotFoundError):
    """The model argument is a word or a sentence and resembles no model name: perhaps a prompt."""


class Observer(Protocol):
    """Receives notes and progress while a model loads."""

    def note(self, message: str) -> None:
        """Report a decision, such as the choice of engine and its reason."""
        ...

    def progress(self, done: int, total: int) -> None:
        """Report how many of the model's modules are loaded."""
        ...


def resolve(model: str | None, models: Path | None = None) -> ModelInfo:
    """Find a model on disk and inspect its files. No network, no torch.

    Args:
        model: None for the built-in model, a path, a built-in name, `owner/name[:revision]`, or the name of a folder
            in the models folder.
        models: the folder of downloaded models; see `models_dir`. A repository that is not there is looked up in
            huggingface_hub's cache.

    Raises:
        UsageError: the name is empty.
        ModelNotFoundError: no such model, or it is only partly downloaded.
        UnsupportedModelError, DamagedModelError: see `info.inspect`.
    """
    if model is not None and not model.strip():
        raise UsageError("the model name is empty", f"give a name or a folder, or {BUILTIN}")
    if model is None or model == BUILTIN:
        return inspect(BUILTIN_FOLDER, BUILTIN)
    path = expanded(Path(model))
    if is_folder(path):
        return _open(path, model)
    if is_there(path):
        raise ModelNotFoundError(f"{brief(model)} is a file", "give the folder with config.json and the weights")
    return resolve_name(model, models)


def resolve_name(model: str, models: Path | None = None) -> ModelInfo:
    """`resolve` for a name that is no path.

    Raises:
        ModelNotFoundError, UnsupportedModelError, DamagedModelError: see `resolve`.
    """
    if model == BUILTIN:
        return inspect(BUILTIN_FOLDER, BUILTIN)
    folder = models_dir(models)
    repository = names.parse(model)
    here = folder / (repository.folder if repository else model)
    # Two repositories can share a folder's name: a_b/c and a/b_c.
    if is_folder(here) and not (repository and store.holds_another(here, repository)):
        return _open(here, model)
    if repository and (snapshot := in_hub_cache(repository)):
        return inspect(snapshot, model)
    raise _not_found(model, folder)


def _open(path: Path, name: str) -> ModelInfo:
    with os_errors(f"cannot read {path}", "check its permissions", DamagedModelError):
        state = store.state(path)
    if state == "partial":
        unfinished = store.read_marker(path / store.STAGING)
        whole = f"exl download {unfinished.repository}" if unfinished else "downloading it again"
        raise ModelNotFoundError(f"{name} is only partly downloaded", f"resume with {whole}")
    return inspect(path, name)


def _not_found(model: str, folder: Path) -> ModelNotFoundError:
    model = brief(model)
    repository = names.parse(model)
    typed = repository.folder if repository else model
    near = did_you_mean(typed, known_models(folder), cutoff=0.8 if repository else 0.6)
    if repository:
        meant = f"{near} If not, " if near else ""
        return ModelNotFoundError(f"{model} is not in {folder}", f"{meant}download it with exl download {model}")
    if near:
        return ModelNotFoundError(f"no model named {model!r}", near)
    hint = f"give the folder of a model, or {BUILTIN} for the built-in one"
    if len(model.split()) > 1:
        return UnfamiliarNameError(f"no model named {model!r}", hint)
    kind = ModelNotFoundError if "/" in model else UnfamiliarNameError
    return kind(f"no model named {model!r} here or in {folder}", hint)


def with_draft(options: LoadOptions, models: Path | None = None) -> LoadOptions:
    """Replace the draft model's name in the options with its absolute path.

    Raises:
        ModelNotFoundError, UnsupportedModelError, DamagedModelError: see `resolve`.
    """
    if options.draft is None:
        return options
    return dataclasses.replace(options, draft=str(resolve(options.draft, models).path.resolve()))


def context_to_allocate(info: ModelInfo, options: LoadOptions, needed: int | None = None) -> int:
    """Context length to load a model with, in tokens.

    Args:
        info: the model.
        options: `max_seq_len` wins if set.
        needed: prompt plus response tokens, if known; the KV cache need not be larger.

    Raises:
        UsageError: `max_seq_len` is beyond the model's learned position embeddings.
    """
    if options.max_seq_len is not None:
        if options.max_seq_len > info.extended_length and has_learned_positions(info.config):
            raise UsageError(_beyond(info, options.max_seq_len), f"use at most {info.extended_length}")
        return options.max_seq_len
    # RoPE-scaled contexts reach 128k and more, and few prompts need such a cache: allocate what this one needs.
    return min(info.extended_length, max(needed or 0, min(info.context_length, _MIN_ALLOCATION)))


def _beyond(info: ModelInfo, max_seq_len: int) -> str:
    return (
        f"{param('max_seq_len')} {max_seq_len:,} exceeds the {info.extended_length:,} tokens that {info.name} supports"
    )


def gpus_for(info: ModelInfo, options: LoadOptions) -> list[memory.Gpu]:
    """The GPUs a model will run on; empty if it will run on the CPU."""
    from exl_cli.engines.exllamav2 import support

    on_cpu = options.engine == "cpu" or support.why_not(info, context_to_allocate(info, options))
    return [] if on_cpu else memory.gpus()


def gpus_per_engine(info: ModelInfo, options: LoadOptions) -> int:
    """How many GPUs like this machine's an engine takes for a model: as many as `gpu_split` names, or as it needs."""
    if options.gpu_split is not None:
        return len(options.gpu_split)
    room = [gpu.total - memory.CUDA_CONTEXT for gpu in gpus_for(info, options)]
    needed = memory_needed(info, options, options.sequences) if len(room) > 1 else None
    return max(1, len(placement.split(needed, room) or ())) if needed is not None else 1


def memory_needed(info: ModelInfo, options: LoadOptions, sequences: int) -> memory.Estimate | None:
    """Estimate GPU memory for a model and a KV cache of `sequences` full contexts; None if it cannot be estimated."""
    tokens = memory.round_up(context_to_allocate(info, options)) * sequences
    return memory.estimate(info, tokens, options.cache, low_mem=options.low_mem)


def fitting_sequences(info: ModelInfo, options: LoadOptions, counts: Iterable[int]) -> int:
    """The first of `counts` full-length sequences whose KV cache fits the free GPU memory; 1 if none does.

    It takes no more GPUs than the model needs for one.
    """
    free = [gpu.free - memory.CUDA_CONTEXT for gpu in gpus_for(info, options)]
    draft = resolve(options.draft) if options.draft is not None and free else None
    context = context_to_allocate(info, options)

    def gpus(count: int) -> int:
        left = free
        if draft is not None:
            taken = placement.beside(draft, context, options.cache, low_mem=options.low_mem, sequences=count)
            left = placement.less(free, taken)
        needed = memory_needed(info, options, count)
        return 0 if needed is None else len(placement.split(needed, left, options.gpu_split) or ())

    fewest = gpus(1) if free else 0
    return next((count for count in counts if 0 < gpus(count) <= fewest), 1) if fewest else 1


def load(
    info: ModelInfo, tokenizer: Tokenizer, options: LoadOptions, observer: Observer, needed: int | None = None
) -> Engine:
    """Choose an engine and load a model into it.

    Args:
        info: from `resolve`.
        tokenizer: the model's tokenizer.
        options: the load options. A draft model given by name is looked up in the default models folder; see
            `with_draft` for others.
        observer: receives the choice of engine and the progress.
        needed: prompt plus response tokens, if known; see `context_to_allocate`.

    Raises:
        EngineError: the requested engine cannot run on this machine.
        UnsupportedModelError: the requested engine cannot run this model.
        OutOfMemoryError, DamagedModelError, UsageError: see the engines.
    """
    context = context_to_allocate(info, options, needed)
    for note in info.notes:
        observer.note(note)
    if context > info.extended_length:
        observer.note(f"{_beyond(info, context)}: output beyond that may be garbage")
    for name, value in sampling.unusable(info.generation_config).items():
        observer.note(f"generation_config.json: ignoring {name} {brief(repr(value))}")
    # OpenMP reads this when torch is first imported. Spinning workers run ten times slower beside another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with hold_interrupt(), startup.collector_paused():
        chosen = _choose(info, context, options, observer.note)
        if chosen == "exllamav2":
            from exl_cli.engines.exllamav2 import engine as exllamav2
            from exl_cli.engines.exllamav2 import import_exllamav2
        else:
            from exl_cli.engines.cpu import engine
    if chosen == "exllamav2":
        draft = _draft(info, tokenizer, options)
        import_exllamav2.import_exllamav2(
            observer if isinstance(observer, build.Observer) else build.Notes(observer.note)
        )
        return exllamav2.load(info, tokenizer, context, options, observer.progress, draft)
    with startup.collector_paused():  # imports transformers
        return engine.load(info, tokenizer, context, observer.progress)


def _draft(info: ModelInfo, tokenizer: Tokenizer, options: LoadOptions) -> ModelInfo | None:
    if options.draft is None:
        return None
    from exl_cli.engines.exllamav2 import support

    draft = resolve(options.draft)
    if reason := support.why_not(draft):
        raise UnsupportedModelError(
            f"exllamav2 cannot run the draft model {draft.name}: {reason}", "choose another draft model"
        )
    if difference := tokenizer.difference(Tokenizer(draft.path)):
        raise UsageError(
            f"the draft model {draft.name} has a different vocabulary from {info.name}: {difference}",
            f"use a smaller model of the same family, or drop {param('draft')}",
        )
    return draft


def _choose(info: ModelInfo, context: int, options: LoadOptions, note: Callable[[str], None]) -> str:
    if options.engine == "cpu":
        _note_ignored(options, note)
        return "cpu"
    from exl_cli.engines.exllamav2 import support

    model = support.why_not(info, context)
    if not model:
        startup.wake_gpu()
    machine = support.why_not_here()
    if options.engine == "exllamav2":
        engine = param("engine")
        if machine:
            raise EngineError(
                f"{engine} exllamav2 does not work on this machine: {machine}",
                f"use {engine} cpu, or a machine with an NVIDIA GPU",
            )
        if model:
            raise UnsupportedModelError(f"{engine} exllamav2 cannot run {info.name}: {model}", f"use {engine} cpu")
        return "exllamav2"
    if machine or model:
        options.refuse_speculation(machine or model)
        note(f"running on the CPU: {machine or model}")
        _note_ignored(options, note)
        return "cpu"
    return "exllamav2"


def _note_ignored(options: LoadOptions, note: Callable[[str], None]) -> None:
    if ignored := options.for_the_gpu():
        note(f"{', '.join(ignored)}: ignored on the CPU")
