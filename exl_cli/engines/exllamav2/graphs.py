"""Passes as CUDA graphs: one launch instead of several hundred.

A pass that is repeated is captured at its second use, after one ordinary run in which kernels were compiled and
libraries set up: so a short answer does not pay for a graph. All graphs share one memory pool, as only one runs at a
time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

from exl_cli.errors import EngineError

_log = logging.getLogger(__name__)


class Graphs:
    """Runs passes, by graphs where they can be had.

    Args:
        usable: whether to capture at all; as an attribute, False from the first capture on that failed.
    """

    def __init__(self, usable: bool) -> None:
        self.usable = usable
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def replay(self, key: Hashable) -> bool:
        """Start the graph of this work on the current stream, if there is one; whether there was."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def run(self, key: Hashable, work: Callable[[], None], prepare: Callable[[], None]) -> None:
        """Do the work on the current stream, and make a graph of it if it is time.

        Args:
            key: equal for work that is the same but for what lies in its inputs.
            work: what to do; it may only read and write memory that stays where it is.
            prepare: called before a capture.
        """
        if self.usable and key in self._seen:
            prepare()
            graph = self._capture(work)
            if graph is not None:
                self._graphs[key] = graph
        self._seen.add(key)
        if not self.replay(key):
            work()

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        except (RuntimeError, EngineError) as error:
            # Some module does what no graph can hold. It ran well without; so will the next.
            self.usable = False
            _log.info("passes are not captured: %s", str(error).strip().splitlines()[0])
            torch.cuda.synchronize()
            return None
        self._pool = graph.pool()
        return graph

    def clear(self) -> None:
        """Give the graphs' memory back."""
        self._graphs.clear()
        self._pool = None
