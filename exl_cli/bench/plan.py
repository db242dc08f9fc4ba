"""What a benchmark measures: its settings, the grid of tests, the order of their repetitions, their prompts.

The tests are llama-bench's, under its names: `pp512` evaluates a prompt of 512 tokens, `tg128` generates 128, `tg128 @
d4096` does so after 4,096 tokens that are not timed, `pp512+tg128` is a whole answer. `tg128 x4` is four requests at a
time.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from exl_cli.errors import UsageError, param
from exl_cli.models.load_options import CacheType, LoadOptions
from exl_cli.models.memory import CACHE_TYPES
from exl_cli.sampling import Sampling


@dataclass(frozen=True)
class Case:
    """One test of the grid."""

    n_prompt: int  # prompt tokens whose evaluation is timed
    n_gen: int  # timed forward passes of one new token for each request
    n_depth: int = 0  # tokens in the KV cache before the timed part
    n_parallel: int = 1  # requests at a time

    @property
    def llama_name(self) -> str:
        """As llama-bench writes it, which has no parallel requests."""
        parts = {"pp": self.n_prompt, "tg": self.n_gen}
        name = "+".join(f"{part}{count}" for part, count in parts.items() if count)
        return name + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def name(self) -> str:
        """That, and the number of parallel requests where it is not 1."""
        return self.llama_name + (f" x{self.n_parallel}" if self.n_parallel > 1 else "")

    @property
    def kind(self) -> str:
        """ "prompt", "generation" or "answer" (both)."""
        return "prompt" if not self.n_gen else "answer" if self.n_prompt else "generation"

    @property
    def tokens(self) -> int:
        """Timed tokens, of all requests together."""
        return self.n_parallel * (self.n_prompt + self.n_gen)

    @property
    def prompt_ids(self) -> int:
        """Tokens of each request's prompt.

        An engine evaluates all of a prompt but its last token as prompt, so `pp512` needs one more. A generation
        starts from at least one token.
        """
        if self.kind == "answer":
            return self.n_prompt
        return self.n_prompt + 1 if self.n_prompt else max(self.n_depth, 1)

    @property
    def new_tokens(self) -> int:
        """Tokens that each request generates. Of `tg128` the first comes before the timed part, so it needs 129."""
        return self.n_gen if self.kind == "answer" else self.n_gen + 1

    @property
    def context(self) -> int:
        return self.prompt_ids + self.new_tokens


@dataclass(frozen=True)
class Settings:
    """What the user asked for. 0 prompt or new tokens leaves those tests out."""

    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    batches: tuple[int, ...] = (1,)
    repetitions: int = 5
    seed: int = 0  # of the prompts, the order and the sampler


@dataclass(frozen=True)
class Job:
    """What one process measures: a model with a type of KV cache."""

    model: str | None  # this and the next as `loader.resolve` takes them
    models_dir: Path | None
    loading: LoadOptions
    settings: Settings  # this and the next are the same in all jobs of a benchmark
    sampling: Sampling
    perplexity: Path | None = None  # a text to evaluate
    # When the process was started, on the system's monotonic clock. None in a process that did other things before,
    # whose first generation says nothing.
    spawned: float | None = None


def parse_counts(text: str, name: str, least: int) -> tuple[int, ...]:
    """ "512,2048" to (512, 2048), duplicates left out; UsageError, naming the parameter, for less than `least`."""
    try:
        values = tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        values = (-1,)
    if not all(least <= value <= 10_000_000 for value in values):
        problem = f"{param(name)} must be a list of whole numbers, {least} or more, got {text!r}"
        raise UsageError(problem, f"write it as {param(name)} 1,2")
    return values


def loadings(loading: LoadOptions, caches: str | None) -> list[LoadOptions]:
    """The load options with each of the listed cache types in turn; as they are for None. UsageError for no type."""
    names = dict.fromkeys(part.strip() for part in (loading.cache if caches is None else caches).split(","))
    for name in names:
        if name not in CACHE_TYPES:
            raise UsageError(f"no cache type named {name!r}", f"cache types: {', '.join(CACHE_TYPES)}")
    return [dataclasses.replace(loading, cache=cast(CacheType, name)) for name in names]


def grid(settings: Settings) -> list[Case]:
    """All tests of the settings: prompts, generations at every depth and batch size, and a whole answer.

    UsageError if nothing is left to measure.
    """
    prompts = [n for n in settings.prompt_tokens if n]
    news = [n for n in settings.new_tokens if n]
    tests = [Case(n, 0) for n in prompts]
    tests += [Case(0, n, depth, batch) for batch in settings.batches for depth in settings.depths for n in news]
    if prompts and news:
        tests.append(Case(prompts[0], news[0]))
    if not tests:
        hint = f"set {param('prompt_tokens')} or {param('new_tokens')} to a number above 0"
        raise UsageError("nothing to measure", hint)
    return tests


def fitting(tests: Sequence[Case], context: int, name: str) -> tuple[list[Case], list[str]]:
    """The tests that fit into a model's context, and a sentence for each that does not; UsageError if none fits."""
    skipped = [
        f"skipping {test.name} for {name}: it needs {test.context:,} tokens of context, but there are {context:,}"
        for test in tests
        if test.context > context
    ]
    if len(skipped) == len(tests):
        least = min(tests, key=lambda test: test.context)
        problem = f"no test fits the context of {name}: {least.name} needs {least.context:,} tokens"
        hint = f"lower {param('prompt_tokens')} and {param('new_tokens')}"
        raise UsageError(f"{problem}, but there are {context:,}", hint)
    return [test for test in tests if test.context <= context], skipped


def batchable(tests: Sequence[Case], max_batch: int, engine: str) -> tuple[list[Case], list[str]]:
    """The tests whose requests an engine computes in one pass, and a sentence where some are not.

    UsageError if generation was asked for, and at no batch size that the engine has.
    """
    kept = [test for test in tests if test.n_parallel <= max_batch]
    if len(kept) == len(tests):
        return kept, []
    sizes = sorted({test.n_parallel for test in tests if test.n_parallel > max_batch})
    most = "one request at a time" if max_batch == 1 else f"at most {max_batch} requests at a time"
    batches = f"{param('batch')} {','.join(map(str, sizes))}"
    if not any(test.kind == "generation" for test in kept):
        problem = f"the {engine} engine computes {most}, so it cannot run {batches}"
        raise UsageError(problem, f"use {param('batch')} {max_batch}")
    return kept, [f"skipping {batches}: the {engine} engine computes {most}"]


def schedule(tests: Sequence[Case], settings: Settings) -> Iterator[tuple[int, Case]]:
    """Which test comes when, with the number of its repetition, from 0.

    Each repetition goes through all tests in another random order: whatever changes during a run (heat, other
    programs) falls on all tests alike and shows in their deviations.
    """
    order = random.Random(settings.seed)
    for repetition in range(settings.repetitions):
        yield from ((repetition, test) for test in order.sample(tests, len(tests)))


class Prompts:
    """Random prompts from a list of token ids, no two with the same first token: no prefix of one is in the cache."""

    def __init__(self, ids: Sequence[int], seed: int) -> None:
        self._ids, self._random = list(ids), random.Random(seed)
        self._first: list[int] = []

    def draw(self, length: int) -> list[int]:
        self._first = self._first or self._random.sample(self._ids, len(self._ids))
        return [self._first.pop(), *self._random.choices(self._ids, k=length - 1)]
