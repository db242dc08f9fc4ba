"""Forward passes as CUDA graphs: one launch instead of several hundred.

A pass that is repeated is captured at its second use, after one ordinary run in which kernels were compiled: so a
short answer does not pay for a graph. The second use is an ordinary run as well, and the capture comes while the GPU is
busy with it: nobody waits for one, and what a library sets up for each thread, as cuBLAS does by an allocation that
no capture survives, is there. All graphs share one memory pool, as only one runs at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

from exl_cli.engines.exllamav2.cuda_errors import cause
from exl_cli.errors import EngineError

_log = logging.getLogger(__name__)


class Graphs:
    """Runs forward passes, by graphs where they can be captured.

    Attributes:
        usable: whether to capture; False from the first capture on that failed.
        why_not: what that one failed with.
    """

    def __init__(self, usable: bool) -> None:
        self.usable = usable
        self.why_not = ""
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._due: tuple[Hashable, Callable[[], None]] | None = None

    def replay(self, key: Hashable) -> bool:
        """Start the graph of this work on the current stream, if there is one; whether there was."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def run(self, key: Hashable, work: Callable[[], None], prepare: Callable[[], None]) -> None:
        """Do the work on the current stream, as there is no graph of it; `capture` makes one if it is time.

        Args:
            key: equal for work that is the same but for what lies in its inputs.
            work: what to do; it may only read and write memory that stays where it is.
            prepare: called before the work that is to be captured.
        """
        again = self.usable and key in self._seen
        if again:
            prepare()
        work()
        self._seen.add(key)
        if again:
            self._due = (key, work)

    def capture(self) -> None:
        """Make the graph of what `run` did last, if it is time: on the current stream, whatever that is busy with."""
        if self._due is None:
            return
        (key, work), self._due = self._due, None
        try:
            with torch.inference_mode():
                graph = captured(work, self._pool)
        except (RuntimeError, EngineError) as error:
            # Some module does what no graph can hold. It runs well without.
            self.usable = False
            self.why_not = cause(error)
            _log.info("passes are not captured: %s", self.why_not)
        else:
            self._graphs[key], self._pool = graph, graph.pool()

    def clear(self) -> None:
        """Give the graphs' memory back."""
        self._graphs.clear()
        self._pool = self._due = None


def captured(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of what this work does on the current stream.

    Args:
        work: has run in this thread before.
        pool: another graph's, to allocate from; None for a new one.

    Raises:
        RuntimeError, EngineError: the work does what no graph can hold, or raises them; torch is as it was.
    """
    graph, pool = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
    try:
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            work()
        finally:
            if torch.cuda.is_current_stream_capturing():
                graph.capture_end()
    except (RuntimeError, EngineError):
        _end_failed_capture(pool)
        raise
    return graph


def _end_failed_capture(pool: Any) -> None:
    """Have torch draw random numbers and give memory back again.

    Stands for a defect of torch 2.11 (`CUDAGraph::capture_end`): where the driver says that a capture has failed,
    nothing that its beginning did is undone. The generators refuse to be used on a GPU, and the allocator goes on
    allocating from the graph's pool, and keeps what is freed.
    """
    try:
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        # Refused where the capture came as far as that.
        with contextlib.suppress(RuntimeError, AttributeError):
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
    finally:
        torch.cuda.synchronize()
