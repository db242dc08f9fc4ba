"""From what a user asked for to what is done: the jobs of a benchmark, checked before anything is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from exl_cli import loader
from exl_cli.bench import plan, runner
from exl_cli.bench.files import expanded
from exl_cli.bench.job import Job
from exl_cli.bench.perplexity import read
from exl_cli.bench.plan import QUICK, Settings
from exl_cli.bench.result import Result
from exl_cli.engines.base import Engine
from exl_cli.errors import ExlError, UsageError
from exl_cli.models.load_options import CacheType, LoadOptions
from exl_cli.models.memory import CACHE_TYPES
from exl_cli.sampling import Sampling
from exl_cli.system.version import installed_version


def saved_result(names: Sequence[str]) -> Path | None:
    """The saved result among what stands in the place of models; None where there is none.

    Raises:
        UsageError: it does not stand alone.
    """
    found = [name for name in names if name.endswith(".json") and not expanded(Path(name)).is_dir()]
    if found and len(names) > 1:
        raise UsageError(
            f"{found[0]} is a saved result and stands alone", "compare two with --compare OLD.json NEW.json"
        )
    return Path(found[0]) if found else None


def settings(
    quick: bool, prompt_tokens: str | None, new_tokens: str | None, depth: str, batch: str, repetitions: int, seed: int
) -> Settings:
    """The settings behind the flags.

    Raises:
        UsageError: a list that is none.
    """
    default = QUICK if quick else Settings()
    prompts = None if prompt_tokens is None else plan.parse_counts(prompt_tokens, "--prompt-tokens", 0)
    news = None if new_tokens is None else plan.parse_counts(new_tokens, "--new-tokens", 0)
    return Settings(
        prompt_tokens=default.prompt_tokens if prompts is None else prompts,
        new_tokens=default.new_tokens if news is None else news,
        depths=plan.parse_counts(depth, "--depth", 0),
        batches=plan.parse_counts(batch, "--batch", 1),
        repetitions=repetitions,
        seed=seed,
    )


def loadings(loading: LoadOptions, caches: str | None) -> list[LoadOptions]:
    """The load options with each cache type in turn.

    Raises:
        UsageError: no such type.
    """
    if caches is None:
        return [loading]
    known: dict[str, CacheType] = {kind: kind for kind in CACHE_TYPES}
    chosen = []
    for name in dict.fromkeys(part.strip() for part in caches.split(",")):
        if name not in known:
            raise UsageError(f"no cache type named {name!r}", f"cache types: {', '.join(known)}")
        chosen.append(dataclasses.replace(loading, cache=known[name]))
    return chosen


def jobs(
    models: Sequence[str | None],
    models_dir: Path | None,
    loadings: Sequence[LoadOptions],
    settings: Settings,
    sampling: Sampling,
    perplexity: Path | None,
) -> list[Job]:
    """One for each model and cache type. Whatever can be wrong with one of them is found here.

    Raises:
        ExlError: a model that is not here or cannot be read, a context that holds no test, a text that is none.
    """
    tests = plan.grid(settings)
    if perplexity is not None:
        read(perplexity)
    for model in models:
        info = loader.resolve(model, models_dir)
        plan.fitting(tests, loadings[0].max_seq_len or info.context_length, info.name)
    loadings = [loader.with_draft(loading, models_dir) for loading in loadings]
    folder = None if models_dir is None else str(models_dir)
    text = None if perplexity is None else str(perplexity)
    return [Job(model, folder, loading, settings, sampling, text) for model in models for loading in loadings]


def measure(
    jobs: Sequence[Job], load: Callable[..., Engine], observer: runner.Observer, *, debug: bool
) -> tuple[Result, ExlError | None]:
    """Do the jobs; see `runner.run`."""
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    result = Result(installed_version(), jobs[0].settings, jobs[0].sampling.to_dict(), started)
    return result, runner.run(jobs, load, result, observer, debug=debug)
