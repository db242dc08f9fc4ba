"""What is measured: one repetition of one test, the kernels of a generation, the perplexity of a text.

A repetition goes through an engine's stream, as any user of it would see it. What is timed, by the kind of test:

- a prompt: what the engine reports as the evaluation of the prompt, up to the moment the device has finished;
- a generation: from the arrival of the first new token to the arrival of the last: every timed token is one forward
  pass with its sampling and its decoding to text; with several requests, the time in which all generate;
- a whole answer: from the call to the arrival of the last token.

Choosing and tokenizing the prompt is in none of them.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench.plan import Case
from exl_cli.bench.result import Perplexity, Sample, deviation, mean
from exl_cli.engines.base import Chunk, Request, Summary
from exl_cli.errors import EngineError, PromptError, param
from exl_cli.models.prompt import decode, read_input
from exl_cli.models.tokenizer import Tokenizer

Energy = Callable[[], "float | None"]

# Steps whose kernels are traced.
_TRACED = 64

WINDOW = 1024
# Few enough rows for the kernels that generation uses, and whole blocks of a quantized cache.
STEP = 8


@dataclass(frozen=True)
class _Mark:
    """A moment with what had been used up to it: processor time and energy."""

    at: int
    cpu: float
    joules: float | None


def measure(
    engine: EngineThread,
    test: Case,
    requests: Sequence[Request],
    energy: Energy = lambda: None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Sample:
    """Run a test once.

    Args:
        requests: one for each of the test's parallel requests, with `test.prompt_ids` and `test.new_tokens` tokens.
        energy: joules that the GPUs have taken since some moment.
        clock: in nanoseconds; read in the engine's thread when it delivers.

    Raises:
        EngineError: the engine stopped early, or did not compute the requests at the same time.
    """
    arrivals, summaries, start, begin, end = _run(engine, requests, energy, clock)
    scale = 1.0
    if test.kind == "prompt":
        begin, end = start, begin
        ns = round(max(summary.prompt_seconds for summary in summaries) * 1e9)
    elif test.kind == "answer":
        begin = start
        ns = end.at - start.at
    else:
        ns = round(test.tokens / _pace(arrivals, begin.at, end.at))
        scale = ns / (end.at - begin.at)
    if ns <= 0:
        raise EngineError(
            f"the engine reported no time for {test.name}", "please report this; its numbers cannot be trusted"
        )
    steps = (after - before for times in arrivals for before, after in itertools.pairwise(times))
    return Sample(
        ns=ns,
        ttft_ns=max(times[0] for times in arrivals) - start.at,
        itl_ns=() if test.kind == "prompt" else tuple(steps),
        reused_tokens=sum(summary.reused_tokens for summary in summaries),
        joules=None if begin.joules is None or end.joules is None else (end.joules - begin.joules) * scale,
        cpu_share=round(1e9 * (end.cpu - begin.cpu) / (end.at - begin.at), 3) if end.at > begin.at else 0.0,
        drafted_tokens=sum(summary.drafted_tokens for summary in summaries),
        accepted_tokens=sum(summary.accepted_tokens for summary in summaries),
    )


def _run(
    engine: EngineThread, requests: Sequence[Request], energy: Energy, clock: Callable[[], int]
) -> tuple[list[list[int]], list[Summary], _Mark, _Mark, _Mark]:
    """Run all requests at once, and note when their tokens arrive, in the order in which the engine delivers them.

    Returns:
        When each request's tokens came, their summaries, and three moments: the call, and the begin and end of the time
        in which all requests generate, from the last one's first token to the first one's last.
    """
    inbox: queue.SimpleQueue[tuple[int, int, Chunk | BaseException]] = queue.SimpleQueue()

    def deliver_to(index: int) -> Callable[[Chunk | BaseException], None]:
        # The time is taken in the engine's thread: this one may have to wait for its turn.
        return lambda item: inbox.put((index, clock(), item))

    arrivals: list[list[int]] = [[] for _ in requests]
    summaries: list[Summary] = []
    joules, cpu = energy(), time.process_time()
    begin = end = start = _Mark(clock(), cpu, joules)
    ids = [engine.submit(request, deliver_to(index)) for index, request in enumerate(requests)]
    try:
        while len(summaries) < len(requests):
            index, now, chunk = inbox.get()
            if isinstance(chunk, BaseException):
                raise chunk
            times, most = arrivals[index], requests[index].max_new_tokens
            if chunk.token_ids:
                times += [now] * len(chunk.token_ids)
                if begin is start and all(arrivals):
                    begin = _Mark(now, time.process_time(), energy())
                if end is start and len(times) >= most:
                    end = _Mark(now, time.process_time(), energy())
            if chunk.summary is not None:
                summaries.append(chunk.summary)
                if len(times) < most:
                    problem = f"the engine stopped after {len(times)} of {most} tokens"
                    raise EngineError(problem, "please report this; nothing should end a benchmark's generation early")
    except BaseException:
        for id_ in ids:
            engine.cancel(id_)
        raise
    return arrivals, summaries, start, begin, end


def _pace(arrivals: Sequence[Sequence[int]], begin: int, end: int) -> float:
    """Tokens per nanosecond of all requests, while all of them generate.

    A pass delivers its tokens one after the other, so `begin` and `end` lie among the deliveries of a pass. Therefore
    each request is taken from its own token nearest to `begin` to the one nearest to `end`: whole passes.
    """
    pace = 0.0
    for times in arrivals:
        first, last = (min(times, key=lambda time: abs(time - moment)) for moment in (begin, end))
        if last <= first:
            problem = "the engine ran the requests one after another, not concurrently"
            raise EngineError(problem, f"use {param('batch')} 1")
        pace += (bisect.bisect_right(times, last) - bisect.bisect_right(times, first)) / (last - first)
    return pace


def trace_kernels(engine: EngineThread, request: Request) -> tuple[float, float] | None:
    """Nanoseconds that the GPU computes in a step of a generation, and kernels that it is sent; None if unknown.

    That is what a traced generation of some more tokens than another takes longer.
    """
    from exl_cli.engines.probe import KernelClock

    steps = min(_TRACED, request.max_new_tokens - 1)
    if steps < 1:
        return None
    traced = []
    for tokens in (1, 1, 1 + steps):  # from the second on they find the prompt's keys and values
        clock = KernelClock()
        clock.start()
        for _ in engine.stream(dataclasses.replace(request, max_new_tokens=tokens)):
            pass
        traced.append(clock.stop())
    _, before, after = traced
    if before is None or after is None or after[1] <= before[1]:
        return None
    return 1e9 * (after[0] - before[0]) / steps, (after[1] - before[1]) / steps


def read_text(file: Path) -> tuple[str, str]:
    """A text and the SHA-256 of its file; DiskError if it cannot be read, PromptError if it is not UTF-8."""
    data = read_input(file, f"check {param('perplexity')}")
    return decode(data, str(file)), hashlib.sha256(data).hexdigest()


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """First token, end and count of tokens to predict of each window over a text of so many tokens."""
    predicted = 1  # nothing comes before the first token
    for begin in itertools.count(0, stride):
        if predicted >= length:
            return
        end = min(begin + window, length)
        yield begin, end, end - predicted
        predicted = end


def perplexity(
    engine: EngineThread, tokenizer: Tokenizer, file: Path, progress: Callable[[int, int], None]
) -> Perplexity:
    """Evaluate a text: the quality beside the speed.

    A window slides over the text by half its length; of each window only the tokens that no earlier window has
    predicted count, so that each (but those of the first window) is predicted from at least half a window of context.
    This is the strided evaluation of transformers' documentation ("Perplexity of fixed-length models"). `progress` is
    called with (tokens predicted, tokens in all).

    Raises:
        PromptError: the file cannot be read or has fewer than two tokens.
    """
    from exl_cli.engines.scoring import log_likelihoods

    text, digest = read_text(file)
    ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=True)
    if len(ids) < 2:
        raise PromptError(f"{file} has only {len(ids)} tokens", "perplexity needs at least two")
    window = min(WINDOW, engine.context_length)
    stride = max(window // 2, 1)
    step = STEP if engine.has_cached_scoring else 0
    losses: list[float] = []
    for begin, end, count in windows(len(ids), window, stride):
        losses += [-value for value in log_likelihoods(engine, ids[begin:end], count, STEP)]
        progress(len(losses), len(ids) - 1)
    error = deviation(losses) / len(losses) ** 0.5
    return Perplexity(str(file), digest, len(losses), window, stride, step, mean(losses), error)
