"""What a benchmark measures: the grid of tests, the order of their repetitions and the prompts that they are given.

The tests are llama-bench's, under its names: `pp512` evaluates a prompt of 512 tokens, `tg128` generates 128, `tg128 @
d4096` does so after 4,096 tokens that are not timed, `pp512+tg128` is a whole answer. `tg128 x4` is four requests at a
time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exl_cli.errors import UsageError


@dataclass(frozen=True)
class Case:
    """One test of the grid.

    Attributes:
        n_prompt: prompt tokens whose evaluation is timed.
        n_gen: forward passes of one new token for each request that are timed.
        n_depth: tokens in the KV cache before the timed part.
        n_parallel: requests at a time.
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_parallel: int = 1

    @property
    def llama_name(self) -> str:
        """As llama-bench writes it, which has no parallel requests."""
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def name(self) -> str:
        """That, and the number of parallel requests where it is not 1."""
        return self.llama_name + (f" x{self.n_parallel}" if self.n_parallel > 1 else "")

    @property
    def kind(self) -> str:
        """ "prompt", "generation" or "answer" (both)."""
        if not self.n_gen:
            return "prompt"
        return "answer" if self.n_prompt else "generation"

    @property
    def tokens(self) -> int:
        """Tokens whose time is taken, of all requests together."""
        return self.n_parallel * (self.n_prompt + self.n_gen)

    @property
    def prompt_ids(self) -> int:
        """Tokens that each request's prompt has.

        An engine evaluates all of a prompt but its last token as prompt, so `pp512` needs one more. A generation
        starts from one token at least.
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
        """Tokens of context that each request needs."""
        return self.prompt_ids + self.new_tokens


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        prompt_tokens, new_tokens, depths, batches: the grid; 0 prompt or new tokens leaves those tests out.
        repetitions: of each test.
        seed: of the prompts, the order and the sampler.
    """

    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    batches: tuple[int, ...] = (1,)
    repetitions: int = 5
    seed: int = 0

    @classmethod
    def read(cls, value: dict[str, Any]) -> Settings:
        """From a dictionary of its fields, as JSON has it."""
        fields: dict[str, Any] = {
            name: tuple(entry) if isinstance(entry, list) else entry for name, entry in value.items()
        }
        return cls(**fields)


# What --quick takes where a flag is not given.
QUICK = Settings(prompt_tokens=(128,), new_tokens=(32,))


def parse_counts(text: str, flag: str, least: int) -> tuple[int, ...]:
    """ "512,2048" to (512, 2048), doubles left out.

    Raises:
        UsageError: anything that is not a whole number of at least `least`.
    """
    values: list[int] = []
    for part in text.split(","):
        try:
            value = int(part)
        except ValueError:
            value = -1
        if not least <= value <= 10_000_000:
            raise UsageError(
                f"{flag} {text!r} is not a list of whole numbers, {least} or more", f"write it as {flag} 1,2"
            )
        if value not in values:
            values.append(value)
    return tuple(values)


def grid(settings: Settings) -> list[Case]:
    """All tests of the settings: prompts, generations at every depth and batch size, and a whole answer.

    Raises:
        UsageError: nothing is left to measure.
    """
    prompts = [n for n in settings.prompt_tokens if n]
    news = [n for n in settings.new_tokens if n]
    tests = [Case(n, 0) for n in prompts]
    tests += [Case(0, n, depth, batch) for batch in settings.batches for depth in settings.depths for n in news]
    if prompts and news:
        tests.append(Case(prompts[0], news[0]))
    if not tests:
        raise UsageError("nothing is left to measure", "give --prompt-tokens or --new-tokens a number above 0")
    return tests


def answer(tests: Sequence[Case]) -> Case:
    """The request that a fresh process is given first: the whole answer, or the nearest thing that there is."""
    return next((test for test in tests if test.kind == "answer"), tests[0])


def fitting(tests: Sequence[Case], context: int, name: str) -> tuple[list[Case], list[str]]:
    """The tests that a model's context holds, and a sentence for each that it does not.

    Raises:
        UsageError: not one fits.
    """
    kept = [test for test in tests if test.context <= context]
    skipped = [
        f"{test.name} left out for {name}: it needs {test.context:,} tokens of context, there are {context:,}"
        for test in tests
        if test.context > context
    ]
    if not kept:
        smallest = min(tests, key=lambda test: test.context)
        raise UsageError(
            f"no test fits the context of {name}: {smallest.name} needs {smallest.context:,} tokens, "
            f"there are {context:,}",
            "ask for fewer --prompt-tokens and --new-tokens",
        )
    return kept, skipped


def batchable(tests: Sequence[Case], max_batch: int, engine: str) -> tuple[list[Case], list[str]]:
    """The tests whose requests an engine computes in one pass, and a sentence where some are not.

    Raises:
        UsageError: generation was asked for, and at no batch size that the engine has.
    """
    kept = [test for test in tests if test.n_parallel <= max_batch]
    if len(kept) == len(tests):
        return kept, []
    sizes = sorted({test.n_parallel for test in tests if test.n_parallel > max_batch})
    most = "one request at a time" if max_batch == 1 else f"at most {max_batch} requests at a time"
    what = f"--batch {','.join(map(str, sizes))}"
    if not any(test.kind == "generation" for test in kept):
        raise UsageError(f"the {engine} engine computes {most}, so it cannot run {what}", f"use --batch {max_batch}")
    return kept, [f"{what} left out: the {engine} engine computes {most}"]


def schedule(tests: Sequence[Case], settings: Settings) -> Iterator[tuple[int, int]]:
    """Which test comes when: pairs of the repetition, from 0, and the test's index.

    Every repetition goes through all tests in an order of its own, so that whatever changes while a run lasts (heat,
    other programs) falls on all tests alike and shows in their deviations.
    """
    order = random.Random(settings.seed)
    for repetition in range(settings.repetitions):
        yield from ((repetition, index) for index in order.sample(range(len(tests)), len(tests)))


class Prompts:
    """Random token prompts, no two of which begin with the same token, so that no prefix of one is in the cache.

    Args:
        ids: the token ids to draw from.
        seed: same seed, same prompts.
    """

    def __init__(self, ids: Sequence[int], seed: int) -> None:
        self._ids = list(ids)
        self._random = random.Random(seed)
        self._first: list[int] = []

    def draw(self, length: int) -> list[int]:
        """A prompt of so many tokens."""
        if not self._first:
            self._first = self._random.sample(self._ids, len(self._ids))
        return [self._first.pop(), *self._random.choices(self._ids, k=length - 1)]
