"""The model on the GPU as the scheduler sees it: see `ModelRunner`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from exl_cli.engines.exllamav2 import fused_forward, layers
from exl_cli.engines.exllamav2.attention.paged import Backend
from exl_cli.engines.exllamav2.embeddings import Embeddings
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.engines.exllamav2.graphs import Graphs
from exl_cli.engines.exllamav2.inputs import Inputs
from exl_cli.engines.exllamav2.kernels import quantized_linear
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.errors import EngineError

_LEAST_KEYS = 1024
# Through our own kernels so many small passes take less time than a large one, which unpacks all weights first.
_FEW_PASSES = 3
_log = logging.getLogger(__name__)


class GpuForward:
    """Passes of a loaded model.

    Args:
        model, cache: exllamav2's; the cache holds a page more than `pages`.
        pages: what the scheduler may use.
        page_size: positions in a page.
        backend: gives what computes attention, asked whether decoding is part of that; called when the kernels for
            everything else are there.

    Attributes:
        cache: exllamav2's.
        small: what computes passes of few tokens.
        why_not_fused: why that is not our own kernels; empty where it is.
        backend: what computes attention.
    """

    max_batch = quantized_linear.MOST_ROWS
    max_tokens = quantized_linear.MOST_ROWS

    def __init__(self, model: Any, cache: Any, pages: int, page_size: int, backend: Callable[[bool], Backend]) -> None:
        from exllamav2.device import set_device_streams

        self._set_streams = set_device_streams
        self._model, self.cache = model, cache
        self.pages, self.page_size = pages, page_size
        self.vocab_size = model.config.vocab_size
        self._device = torch.device("cuda", model.modules[1].device_idx)
        self._last = torch.device("cuda", model.modules[-1].device_idx)
        self._stream = model.get_device_context(self._device.index, scratch=False).stream
        # The longest sequence that the rotary tables know.
        self._most_keys = -(-model.config.max_seq_len // page_size) * page_size
        params = model.config.arch.lm
        dtype = torch.float if params.residual_stream_fp32 else torch.half
        self._inputs = Inputs(
            model.modules[0], model.config.hidden_size, dtype, self.max_batch, self.max_tokens,
            self._most_keys // page_size + 1, pages, self._device,
        )  # fmt: skip
        self._embeddings = Embeddings(model.modules[0], self._device)
        self._extend_rotary_tables()
        self._large = ModulesForward(model, cache, page_size)
        self.small, self.why_not_fused = self._choose()
        try:
            self.backend = backend(not self.small.attends)
        except BaseException:
            self.small.close()
            raise
        self._graphs = Graphs(self.backend.captures and self._device == self._last)
        self._logits = torch.empty((0, self.vocab_size), dtype=torch.float32)
        # Parts of it, by how many rows were asked for, of how many tokens, and how many were computed of each.
        self._parts: dict[tuple[int, int, int], torch.Tensor] = {}
        self._asked = (0, 0, 0)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending = False

    @property
    def captures(self) -> bool:
        """Whether small passes become CUDA graphs, as far as is known: a capture may still fail."""
        return self._graphs.usable

    @property
    def why_not_captured(self) -> str:
        """What a capture failed with; empty where none did."""
        return self._graphs.why_not

    def _extend_rotary_tables(self) -> None:
        """Give tokens that only fill up a pass, behind the end of a full context, rows to read: they mean nothing."""
        for index, found in enumerate(self._model.device_context):
            if found is not None:
                context = self._model.get_device_context(index, scratch=False)
                for tables in (context.sin, context.cos):
                    tables[:] = [
                        torch.nn.functional.pad(table, (0, 0, 0, self.max_tokens)) if table.dim() > 1 else table
                        for table in tables
                    ]

    def _choose(self) -> tuple[ModulesForward | fused_forward.FusedForward, str]:
        reason = layers.why_not(self._model)
        if not reason:
            inputs = self._inputs
            try:
                small = fused_forward.FusedForward(
                    self._model, self.cache, self.page_size, inputs.hidden, inputs.lengths, inputs.table
                )
                if not (reason := small.why_not(lambda: self._large.prepare(1))):
                    small.compile_ahead()
                    return small, ""
            except EngineError as error:
                reason = error.message
        _log.info("small passes through exllamav2's modules: %s", reason)
        return self._large, reason

    @torch.inference_mode()
    def prefill(self, row: ScheduledTokens) -> None:
        """See `ModelRunner.prefill`."""
        self._enter()
        most = self.max_tokens
        if len(row.ids) <= (most if self.why_not_fused else _FEW_PASSES * most):
            for first in range(0, len(row.ids), most):
                self._pass([ScheduledTokens(row.ids[first : first + most], row.start + first, row.block_table)])
            return
        self._await_inputs()
        table = torch.tensor([row.block_table[:]], dtype=torch.int32, device=self._device)
        ids, most = np.array(row.ids, dtype=np.int64), self._model.config.max_input_len
        for first in range(0, len(ids), most):
            states, start = self._embeddings.of(ids[first : first + most]), row.start + first
            lengths = torch.tensor([start], dtype=torch.int32, device=self._device)
            self._large.prefill(states, lengths, table, start + states.shape[1])

    @torch.inference_mode()
    def synchronize(self) -> None:
        """See `ModelRunner.synchronize`."""
        for device in {self._device, self._last}:
            torch.cuda.synchronize(device)
        self._pending = False

    def submit(self, rows: Sequence[ScheduledTokens]) -> None:
        """See `ModelRunner.submit`."""
        self._asked = (len(rows), *self._pass(rows))

    def collect(self) -> torch.Tensor:
        """See `ModelRunner.collect`."""
        self._done.synchronize()
        self._pending = False
        part = self._parts.get(self._asked)
        if part is None:
            rows, longest, tokens = self._asked
            part = self._logits[: rows * tokens].view(rows, tokens, -1)[:, :longest]
            self._parts[self._asked] = part
        return part

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        """See `ModelRunner.copy_page`."""
        self._enter()
        for tensor in _cache_tensors(self.cache):
            pages = tensor.view(-1, self.page_size, *tensor.shape[2:])
            pages[target].copy_(pages[source])

    def close(self) -> None:
        """Give the memory back; it cannot be used afterwards, closing twice is fine."""
        self._graphs.clear()
        if "small" in self.__dict__:
            self.small.close()
        for name in ("small", "_large", "_inputs", "_embeddings", "_logits", "_parts", "_model", "cache"):
            self.__dict__.pop(name, None)

    def _enter(self) -> None:
        # Streams belong to threads: in a new one, what is done first would run on another.
        self._set_streams()
        torch.cuda.set_stream(self._stream)

    def _await_inputs(self) -> None:
        """Wait until the pass before has read its inputs, which lie where the next one's shall."""
        if self._pending:
            self._done.synchronize()
            self._pending = False

    def _pass(self, rows: Sequence[ScheduledTokens]) -> tuple[int, int]:
        """Run rows as one small pass; returns the tokens of the longest row and how many it computes of each.

        The GPU is idle meanwhile. So where there is a graph, as in all passes but the first ones, nothing is asked of
        torch but to start it.
        """
        longest, last = max(len(row.ids) for row in rows), max(row.start for row in rows)
        batch, tokens = _shape(len(rows), longest, self.max_tokens)
        if last + tokens > self._model.config.max_seq_len:
            tokens = longest  # models that learned their positions have none behind the end
        self._await_inputs()
        self._inputs.fill(rows, batch, tokens)
        bound = _LEAST_KEYS
        while bound < last + tokens:
            bound *= 2
        bound = min(bound, self._most_keys + self.page_size)
        # A graph is of one GPU, and is started on the stream that is current in this thread.
        torch.cuda.set_stream(self._stream)
        if not self._graphs.replay((batch, tokens, bound)):
            self._run(batch, tokens, bound)
        self._done.record(self._stream)
        self._pending = True
        self._graphs.capture()
        return longest, tokens

    @torch.inference_mode()
    def _run(self, batch: int, tokens: int, bound: int) -> None:
        """A pass over what lies in its inputs, of which there is no graph yet."""
        self._enter()
        count = batch * tokens
        if len(self._logits) < count:
            # A graph writes where the one before did: they go with it.
            self._graphs.clear()
            self._parts.clear()
            size = 1 if count == 1 else self.max_tokens
            self._logits = torch.empty((size, self.vocab_size), dtype=torch.float32, pin_memory=True)
        logits = self._logits

        def work() -> None:
            inputs = self._inputs
            inputs.send(batch, tokens)
            out = self.small.run(inputs.hidden[:count], inputs.lengths[:batch], inputs.table[:batch], tokens, bound)
            softcap = self._model.config.final_logit_softcapping
            real = out[:, : self.vocab_size].float()
            if softcap:
                real = torch.tanh(real / softcap) * softcap
            logits[:count].copy_(real, non_blocking=True)

        self._graphs.run((batch, tokens, bound), work, lambda: self.small.prepare(count))
        if self._last != self._device:
            # The event that is recorded next is of the first GPU's stream.
            torch.cuda.synchronize(self._last)


def _shape(rows: int, tokens: int, most: int) -> tuple[int, int]:
    """Rows and tokens rounded up to powers of two, where that many can be computed: so that few graphs do for all."""
    batch, count = (1 << (n - 1).bit_length() for n in (rows, tokens))
    if batch * count <= most:
        return batch, count
    return (batch, tokens) if batch * tokens <= most else (rows, tokens)


def _cache_tensors(cache: Any) -> list[torch.Tensor]:
    lists = [cache.key_states, cache.value_states]
    if cache.has_scales:
        lists += [cache.key_scales, cache.value_scales]
    return [tensor for states in lists for tensor in states]
