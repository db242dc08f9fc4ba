"""Forward passes as CUDA graphs: one launch instead of several hundred.

A shape of pass is run normally twice and replayed from its third use on. The first run compiles kernels; a short answer
never pays for a capture. The capture follows the second run while the GPU is still busy with it, so it costs no time,
and per-thread setup that cannot be captured, such as cuBLAS allocating its workspace, has been done by then. All graphs
share one memory pool, as only one runs at a time. Shapes are rounded up, so few graphs are needed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

from exl_cli.engines.exllamav2.cuda_errors import cause
from exl_cli.engines.exllamav2.kernels import quantized_linear
from exl_cli.errors import EngineError

# A graph is for at most this many keys per sequence, or twice as many and so on.
_LEAST_KEYS = 1024
_log = logging.getLogger(__name__)


class Graphs:
    """Runs forward passes, and replays those that it has captured.

    Attributes:
        usable: whether to capture; False once a capture has failed.
        why_not: why it failed; empty otherwise.
    """

    def __init__(self, usable: bool) -> None:
        self.usable = usable
        self.why_not = ""
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._due: tuple[Hashable, Callable[[], None]] | None = None

    def replay(self, key: Hashable) -> bool:
        """Launch the graph for a key on the current stream; returns whether there is one."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def run(self, key: Hashable, work: Callable[[], None], prepare: Callable[[], None]) -> None:
        """Run work for which there is no graph on the current stream. On its second run, `capture` will capture it.

        Args:
            key: equal for work that differs in the contents of its inputs only.
            work: enqueues kernels; it may only access memory at fixed addresses.
            prepare: called before the run that precedes a capture.
        """
        again = self.usable and key in self._seen
        if again:
            prepare()
        work()
        self._seen.add(key)
        if again:
            self._due = (key, work)

    @property
    def is_due(self) -> bool:
        """Whether `capture` will capture something."""
        return self._due is not None

    def capture(self) -> None:
        """Capture what `run` did last if that was its second run. The current stream may be busy."""
        if self._due is None:
            return
        (key, work), self._due = self._due, None
        try:
            with torch.inference_mode():
                graph = captured(work, self._pool)
        except (RuntimeError, EngineError) as error:
            # Some module does something that cannot be captured; it works without a graph.
            self.usable = False
            self.why_not = cause(error)
            _log.info("passes are not captured: %s", self.why_not)
        else:
            self._graphs[key], self._pool = graph, graph.pool()

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._pool = self._due = None


def padded_shape(rows: int, tokens: int) -> tuple[int, int]:
    """Round rows of a pass and tokens per row up where that takes no longer."""
    batch, count = (1 << (n - 1).bit_length() for n in (rows, tokens))
    if rows <= batch * 3 // 4 and batch > quantized_linear.MOST_ROWS:
        batch = batch * 3 // 4
    most = max(quantized_linear.MOST_ROWS, quantized_linear.most_rows(rows * tokens))
    if batch * count <= most:
        return batch, count
    return (batch, tokens) if batch * tokens <= most else (rows, tokens)


def padded_blocks(blocks: int) -> int:
    """Round up the number of blocks in a pass over prompts, by at most a quarter."""
    step = 1 << max(blocks.bit_length() - 3, 0)
    return -(-blocks // step) * step


def key_bound(keys: int, most: int) -> int:
    """Round up the number of keys of the longest sequence of a pass, to `most` at most."""
    bound = _LEAST_KEYS
    while bound < keys:
        bound *= 2
    return min(bound, most)


def captured(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Capture work on the current stream.

    Args:
        work: has run in this thread before.
        pool: memory pool of another graph to share; None for a new one.

    Raises:
        RuntimeError, EngineError: the work cannot be captured, or raised this itself; torch remains usable.
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
    """Make torch usable after a failed capture.

    Works around a defect of torch 2.11 (`CUDAGraph::capture_end`): if the driver reports that a capture has failed,
    what `capture_begin` did is not undone. The random generators refuse to work on the GPU, and the allocator keeps
    allocating from the graph's pool and never releases what is freed.
    """
    try:
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        # Raises if `capture_end` got that far itself.
        with contextlib.suppress(RuntimeError, AttributeError):
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
    finally:
        torch.cuda.synchronize()
