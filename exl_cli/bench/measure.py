"""One repetition of one test, through an engine's stream, as any user of it would see it.

What is timed, by the kind of test:

- a prompt: what the engine reports as the evaluation of the prompt, up to the moment the device has finished;
- a generation: from the arrival of the first new token to the arrival of the last: every timed token is one forward
  pass with its sampling and its decoding to text; with several requests, the time in which all generate;
- a whole answer: from the call to the arrival of the last token.

Choosing and tokenizing the prompt is in none of them.
"""

from __future__ import annotations

import bisect
import itertools
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench.plan import Case
from exl_cli.bench.result import Sample
from exl_cli.engines.base import Chunk, Request, Summary
from exl_cli.errors import EngineError, param

Energy = Callable[[], "float | None"]

# Tokens whose kernels are traced.
_TRACED = 16


@dataclass(frozen=True)
class _Mark:
    """A moment with what had been used up to it: processor time and energy."""

    at: int
    cpu: float
    joules: float | None


@dataclass
class _Trace:
    """When the tokens of one request came."""

    arrivals: list[int] = field(default_factory=list)
    summary: Summary | None = None


def measure(engine: EngineThread, test: Case, requests: Sequence[Request], energy: Energy = lambda: None) -> Sample:
    """Run a test once.

    Args:
        engine: a loaded model.
        test: what is run.
        requests: one for each of the test's parallel requests, with `test.prompt_ids` and `test.new_tokens` tokens.
        energy: joules that the GPUs have taken since some moment.

    Raises:
        EngineError: the engine stopped early, or did not compute the requests at the same time.
    """
    traces, start, begin, end = _run(engine, requests, energy)
    summaries = [trace.summary for trace in traces if trace.summary is not None]
    if test.kind == "prompt":
        begin, end = start, begin
        ns = round(max(summary.prompt_seconds for summary in summaries) * 1e9)
    elif test.kind == "answer":
        begin = start
        ns = end.at - start.at
    else:
        ns = round((end.at - begin.at) * test.tokens / _inside(traces, begin.at, end.at))
    if ns <= 0:
        raise EngineError(f"the engine gave no time for {test.name}", "report it: its numbers cannot be trusted")
    steps = (after - before for trace in traces for before, after in itertools.pairwise(trace.arrivals))
    return Sample(
        ns=ns,
        ttft_ns=max(trace.arrivals[0] for trace in traces) - start.at,
        itl_ns=() if test.kind == "prompt" else tuple(steps),
        reused_tokens=sum(summary.reused_tokens for summary in summaries),
        joules=None if begin.joules is None or end.joules is None else end.joules - begin.joules,
        cpu_share=1e9 * (end.cpu - begin.cpu) / (end.at - begin.at) if end.at > begin.at else 0.0,
        drafted_tokens=sum(summary.drafted_tokens for summary in summaries),
        accepted_tokens=sum(summary.accepted_tokens for summary in summaries),
    )


def _run(engine: EngineThread, requests: Sequence[Request], energy: Energy) -> tuple[list[_Trace], _Mark, _Mark, _Mark]:
    """Run all requests at once, and note when their tokens arrive, in the order in which the engine delivers them.

    Returns:
        What came when, and three moments: the call, and the begin and end of the time in which all requests generate,
        from the last one's first token to the first one's last.
    """
    inbox: queue.SimpleQueue[tuple[int, int, Chunk | BaseException]] = queue.SimpleQueue()

    def deliver_to(index: int) -> Callable[[Chunk | BaseException], None]:
        # The time is taken in the engine's thread: this one may have to wait for its turn.
        return lambda item: inbox.put((index, time.perf_counter_ns(), item))

    traces = [_Trace() for _ in requests]
    begin = end = None
    joules, cpu = energy(), time.process_time()
    start = _Mark(time.perf_counter_ns(), cpu, joules)
    ids = [engine.submit(request, deliver_to(index)) for index, request in enumerate(requests)]
    try:
        while any(trace.summary is None for trace in traces):
            index, now, chunk = inbox.get()
            if isinstance(chunk, BaseException):
                raise chunk
            trace, most = traces[index], requests[index].max_new_tokens
            if chunk.token_ids:
                if begin is None and all(other.arrivals for other in traces if other is not trace):
                    begin = _Mark(now, time.process_time(), energy())
                trace.arrivals += [now] * len(chunk.token_ids)
                if end is None and len(trace.arrivals) >= most:
                    end = _Mark(now, time.process_time(), energy())
            trace.summary = chunk.summary
            if trace.summary is not None and len(trace.arrivals) < most:
                problem = f"the engine ended after {len(trace.arrivals)} of {most} tokens"
                raise EngineError(problem, "report it: nothing should end a benchmark's generation early")
    except BaseException:
        for id_ in ids:
            engine.cancel(id_)
        raise
    if begin is None or end is None:
        raise RuntimeError("a stream ended without its tokens")
    return traces, start, begin, end


def _inside(traces: Sequence[_Trace], begin: int, end: int) -> int:
    """New tokens that came after `begin`, up to `end`."""
    count = sum(
        bisect.bisect_right(trace.arrivals, end) - bisect.bisect_right(trace.arrivals, begin) for trace in traces
    )
    if count <= 0:
        problem = "the engine computed the requests one after the other, not at the same time"
        raise EngineError(problem, f"use {param('batch')} 1")
    return count


def trace_kernels(engine: EngineThread, request: Request) -> tuple[float, float] | None:
    """Nanoseconds that the GPU computes in a step of a generation, and kernels that it is sent; None if unknown."""
    from exl_cli.engines.probe import KernelClock

    clock, count = KernelClock(), 0
    chunks = engine.stream(request)
    for chunk in chunks:
        if not count and chunk.token_ids:
            clock.start()
        count += len(chunk.token_ids)
        if count > _TRACED:
            break
    traced = clock.stop()
    chunks.close()
    return None if traced is None else (1e9 * traced[0] / (count - 1), traced[1] / (count - 1))
