"""Forward passes on the GPU: the `ModelRunner` that the scheduler drives."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from exl_cli.engines.exllamav2 import fused_forward, layers
from exl_cli.engines.exllamav2.attention.paged import Backend
from exl_cli.engines.exllamav2.build_model import experts_captured, rope_offsets, rope_switches
from exl_cli.engines.exllamav2.cuda_errors import wait
from exl_cli.engines.exllamav2.device_sampler import DeviceSampler
from exl_cli.engines.exllamav2.forward_pass import PENDING, Chosen, Draw, ScheduledTokens
from exl_cli.engines.exllamav2.graphs import Graphs
from exl_cli.engines.exllamav2.inputs import Embeddings, Inputs
from exl_cli.engines.exllamav2.kernels import quantized_linear
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.engines.exllamav2.support import too_old
from exl_cli.errors import DeviceError, EngineError
from exl_cli.models import memory

# A pass is launched for at most this many keys per sequence, or twice as many and so on: that takes few CUDA graphs.
_LEAST_KEYS = 1024
# Up to this many small passes through exl's kernels are faster than a large pass, which dequantizes all weights first.
_FEW_PASSES = 3
# A pass over prompts treats each block of this many tokens like a sequence, so it can take prompts of any number and
# length. All keys and values are stored before any block attends.
_BLOCK = 64
_log = logging.getLogger(__name__)


class _Pass(NamedTuple):
    """A pass in flight.

    Attributes:
        rows: number of sequences.
        longest: tokens of the longest row.
        tokens: tokens computed per row, padding included.
        drawn: rows that the device samples for.
        end: recorded after the pass and what follows it.
    """

    rows: int
    longest: int
    tokens: int
    drawn: list[int]
    end: torch.cuda.Event


class GpuForward:
    """A loaded model with its KV cache; a `ModelRunner`.

    Args:
        model, cache: exllamav2's; the cache has one spare page more than `pages`, for padding tokens.
        pages: pages that the scheduler may use.
        page_size: positions per page.
        backend: chooses the attention backend; called once the other kernels are ready.
        samples: whether tokens may be sampled on the device.

    Attributes:
        cache: exllamav2's.
        max_batch: see `ModelRunner`.
        small: computes small passes.
        why_not_fused: why exl's own kernels do not compute small passes; empty if they do.
        backend: computes attention.
        failed: the error after the GPU hung. It cannot be used any more; even freeing memory would wait for it.
    """

    max_tokens = quantized_linear.MOST_ROWS

    def __init__(
        self,
        model: Any,
        cache: Any,
        pages: int,
        page_size: int,
        backend: Callable[[], Backend],
        *,
        samples: bool = True,
    ) -> None:
        from exllamav2.device import set_device_streams

        self._set_streams = set_device_streams
        self._model, self.cache = model, cache
        self.pages, self.page_size = pages, page_size
        self.vocab_size = model.config.vocab_size
        self.rope_switches: Sequence[int] = rope_switches(model)
        self._rope_offsets = rope_offsets(model)
        self._device = torch.device("cuda", model.modules[1].device_idx)
        self._last = torch.device("cuda", model.modules[-1].device_idx)
        self._stream = model.get_device_context(self._device.index, scratch=False).stream
        # The longest sequence that the rotary tables know.
        self._most_keys = -(-model.config.max_seq_len // page_size) * page_size
        dtype = torch.float if model.config.arch.lm.residual_stream_fp32 else torch.half
        self._embeddings = Embeddings(model.modules[0], self._device)
        # One for passes of few tokens and one for many, as copying the block tables of 256 sequences takes a while.
        self._inputs, self._many_inputs = (
            Inputs(
                self._embeddings, model.config.hidden_size, dtype, most, most,
                self._most_keys // page_size + 1, pages, self._rope_offsets, self._device,
            )
            for most in (quantized_linear.MOST_ROWS, quantized_linear.MOST_SEQUENCES)
        )  # fmt: skip
        most = max(quantized_linear.MOST_SEQUENCES, model.config.max_input_len // _BLOCK * _BLOCK)
        self._most_prompt_tokens = min(quantized_linear.MOST_TOKENS, most)
        self._prompt_inputs = Inputs(
            self._embeddings, model.config.hidden_size, dtype, self._most_prompt_tokens // _BLOCK,
            self._most_prompt_tokens, self._most_keys // page_size + 1, pages, self._rope_offsets, self._device,
            with_states=False,
        )  # fmt: skip
        self._large = ModulesForward(model, cache, page_size)
        self.small, self.why_not_fused = self._choose()
        # exllamav2's kernels dequantize all weights first if there are more than a few rows.
        most = quantized_linear.MOST_ROWS if self.why_not_fused else quantized_linear.MOST_SEQUENCES
        # Each sequence takes at least one page.
        self.max_batch = min(most, memory.MOST_SEQUENCES, max(quantized_linear.MOST_ROWS, pages))
        self.backend = backend()
        # With a quantized cache, each block of a prompt would dequantize all keys before it.
        self._prefills_fused = not self.why_not_fused and self.backend.captures and not cache.has_scales
        self.prefill_block = _BLOCK if self._prefills_fused else 1
        self.small.compile_ahead()
        self._graphs = Graphs(self.backend.captures and self._device == self._last)
        self._experts_captured = experts_captured(model)
        # Logits on the device and the CPU's copy of them, by `_logits_rows`; graphs write to the former.
        self._scores: dict[int, torch.Tensor] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self.sampler: DeviceSampler | None = None
        if samples and self._device == self._last and not too_old(self._device):
            self.sampler = DeviceSampler(self._device, self.max_batch, self.vocab_size, self._most_keys)
            since = time.perf_counter()
            self._embeddings.share()
            _log.info(
                "the device reads embeddings itself: %s, %.3f s",
                self._embeddings.address != 0,
                time.perf_counter() - since,
            )
        self._ends = deque(torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
        self._passes: deque[_Pass] = deque()
        self.failed: DeviceError | None = None
        self._chosen: list[Chosen | None] = []
        # Views of `_logits`, by `_Pass.rows`, `longest` and `tokens`.
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}

    def rope_table(self, tokens: int) -> int:
        """The RoPE table of a sequence of `tokens` tokens; see `ScheduledTokens`."""
        return bisect_left(self.rope_switches, tokens)

    @property
    def captures(self) -> bool:
        """Whether small passes are captured in CUDA graphs, unless a capture has failed."""
        return self._graphs.usable

    @property
    def why_not_captured(self) -> str:
        """Why a capture failed; empty if none did."""
        return self._graphs.why_not

    def _choose(self) -> tuple[ModulesForward | fused_forward.FusedForward, str]:
        reason = layers.why_not(self._model)
        if not reason:
            try:
                small = fused_forward.FusedForward(
                    self._model, self.cache, self.page_size, self._inputs_of, self._large
                )
                reason = small.why_not()
            except EngineError as error:
                reason = error.message
            if not reason:
                return small, ""
        _log.info("small passes through exllamav2's modules: %s", reason)
        return self._large, reason

    @torch.inference_mode()
    def prefill(self, *rows: ScheduledTokens) -> None:
        """See `ModelRunner.prefill`. Several sequences take less time together than one after another."""
        self._enter()
        if len(rows) == 1 and len(rows[0].ids) <= self.max_tokens:
            self._pass(rows)
            self._record()
            return
        sizes = [-(-len(row.ids) // _BLOCK) * _BLOCK for row in rows]
        tokens, small = min(sum(sizes), self._most_prompt_tokens), self.small
        # The RoPE tables must cover padding tokens, too.
        fits = all(row.start + size <= self._most_keys for row, size in zip(rows, sizes, strict=True))
        fused = self._prefills_fused and fits
        if fused and isinstance(small, fused_forward.FusedForward) and small.prefills(tokens):
            self._prefill_fused(small, rows)
            return
        for row in rows:
            self._prefill_modules(row)

    def _prefill_fused(self, small: fused_forward.FusedForward, rows: Sequence[ScheduledTokens]) -> None:
        blocks = [
            ScheduledTokens(row.ids[at : at + _BLOCK], row.start + at, row.block_table, row.rope_table)
            for row in rows
            for at in range(0, len(row.ids), _BLOCK)
        ]
        most = self._most_prompt_tokens // _BLOCK
        for first in range(0, len(blocks), most):
            # Blocks that attend to the most keys come first, so that none of those runs alone at the end.
            some = blocks[first : first + most][::-1]
            batch = _padded(len(some)) if len(some) < most else most
            bound = self._bound(max(block.start for block in some) + _BLOCK)
            inputs = self._inputs_of(batch * _BLOCK)
            inputs.fill(some, batch, _BLOCK)
            inputs.send(batch, _BLOCK)
            if not self._graphs.replay(("prompts", batch, bound)):
                self._prefill_blocks(small, inputs, batch, bound)
            self._record()

    def _prefill_blocks(self, small: fused_forward.FusedForward, inputs: Inputs, batch: int, bound: int) -> None:
        """Run a pass over prompts on the contents of `inputs`, for which there is no graph yet."""

        def work() -> None:
            small.prefill(inputs.lengths[:batch], _BLOCK, bound)

        if self._experts_captured < batch * _BLOCK:
            work()
        else:
            self._graphs.run(("prompts", batch, bound), work, lambda: None)

    def _prefill_modules(self, row: ScheduledTokens) -> None:
        most = self.max_tokens
        if len(row.ids) <= (most if self.why_not_fused else _FEW_PASSES * most):
            for first in range(0, len(row.ids), most):
                ids = row.ids[first : first + most]
                self._pass([ScheduledTokens(ids, row.start + first, row.block_table, row.rope_table)])
                self._record()
            return
        block_table = torch.tensor([row.block_table[:]], dtype=torch.int32, device=self._device)
        offsets = None
        if self.rope_switches:
            offset = self._rope_offsets[row.rope_table]
            offsets = torch.tensor([offset], dtype=torch.int32, device=self._device)
        tokens, most = np.array(row.ids, dtype=np.int64), self._model.config.max_input_len
        for first in range(0, len(tokens), most):
            states, start = self._embeddings.of(tokens[first : first + most]), row.start + first
            lengths = torch.tensor([start], dtype=torch.int32, device=self._device)
            self._large.prefill(states, lengths, block_table, start + states.shape[1], offsets)

    @torch.inference_mode()
    def synchronize(self) -> None:
        self._enter()
        for device in {self._device, self._last}:
            with torch.cuda.device(device):
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            self._wait(event)
        self._passes.clear()
        if self.sampler is not None:
            self.sampler.reset()

    def submit(self, rows: Sequence[ScheduledTokens], draws: Sequence[Draw | None] = ()) -> None:
        pending: tuple[int, ...] = ()
        if rows[0].ids[0] == PENDING:
            pending = tuple(draw.seat.row.next for draw in draws if draw is not None)
        longest, tokens = self._pass(rows, pending)
        drawn = self._follow(len(rows), tokens, draws)
        self._record()
        self._ends.rotate()
        self._ends[0].record(self._stream)
        self._passes.append(_Pass(len(rows), longest, tokens, drawn, self._ends[0]))

    @torch.inference_mode()
    def collect(self) -> torch.Tensor:
        asked = self._passes.popleft()
        self._wait(asked.end)
        self._chosen = []
        if self.sampler is not None and asked.drawn:
            self._chosen = [None] * asked.rows
            for index, chosen in zip(asked.drawn, self.sampler.collect(), strict=True):
                self._chosen[index] = chosen
                if chosen is None and not self._passes:
                    count = asked.rows * asked.tokens
                    self._logits_of(count)[index].copy_(self._scores_of(count)[index])
        key = (asked.rows, asked.longest, asked.tokens)
        view = self._views.get(key)
        if view is None:
            logits = self._logits_of(asked.rows * asked.tokens)[: asked.rows * asked.tokens]
            view = logits.view(asked.rows, asked.tokens, -1)[:, : asked.longest]
            self._views[key] = view
        return view

    @property
    def pends(self) -> bool:
        return self.sampler is not None and self._embeddings.address != 0

    def chosen(self) -> Sequence[Chosen | None]:
        return self._chosen

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        self._enter()
        for tensor in _cache_tensors(self.cache):
            pages = tensor.view(-1, self.page_size, *tensor.shape[2:])
            pages[target].copy_(pages[source])

    def close(self) -> None:
        """Free the memory. The model cannot be used afterwards; closing it again does nothing."""
        self._graphs.clear()
        if small := self.__dict__.pop("small", None):
            small.close()
        self.sampler = None
        if embeddings := self.__dict__.get("_embeddings"):
            embeddings.close()
        for name in (
            "_large",
            "_inputs",
            "_many_inputs",
            "_prompt_inputs",
            "_embeddings",
            "_logits",
            "_scores",
            "_views",
            "_model",
            "cache",
        ):
            self.__dict__.pop(name, None)

    def _wait(self, event: torch.cuda.Event) -> None:
        """Wait for an event; see `cuda_errors.wait`. After a timeout, fail at once instead of waiting again."""
        if self.failed:
            raise self.failed
        try:
            wait(event)
        except DeviceError as error:
            self.failed = error
            raise

    def _bound(self, keys: int) -> int:
        """Round up the number of keys of the longest sequence to the bound that a graph is captured for."""
        bound = _LEAST_KEYS
        while bound < keys:
            bound *= 2
        most: int = self._most_keys + self.page_size
        return min(bound, most)

    def _inputs_of(self, tokens: int) -> Inputs:
        """The input buffers of a pass of this many tokens."""
        if tokens <= quantized_linear.MOST_ROWS:
            return self._inputs
        return self._many_inputs if tokens <= quantized_linear.MOST_SEQUENCES else self._prompt_inputs

    def _logits_rows(self, tokens: int) -> int:
        """Rows of the logits buffers for a pass of this many tokens: one set serves few tokens, one many."""
        few = quantized_linear.MOST_ROWS
        return few if tokens <= few else quantized_linear.most_rows(self.max_batch)

    def _scores_of(self, tokens: int) -> torch.Tensor:
        """The device buffer for the logits of a pass of this many tokens."""
        most = self._logits_rows(tokens)
        if most not in self._scores:
            self._scores[most] = torch.empty((most, self.vocab_size), dtype=torch.float32, device=self._last)
        return self._scores[most]

    def _logits_of(self, tokens: int) -> torch.Tensor:
        """The page-locked buffer that they are copied to."""
        most = 1 if tokens == 1 else self._logits_rows(tokens)
        if most not in self._logits:
            self._logits[most] = torch.empty((most, self.vocab_size), dtype=torch.float32, pin_memory=True)
        return self._logits[most]

    def _enter(self) -> None:
        # The current stream is per thread, so set it in every thread that gets here.
        self._set_streams()
        torch.cuda.set_stream(self._stream)

    def _pass(self, rows: Sequence[ScheduledTokens], pending: Sequence[int] = ()) -> tuple[int, int]:
        """Start one small pass; returns the tokens of the longest row, and the tokens computed per row with padding.

        The GPU may be idle until the pass starts, so the common path, replaying a graph, makes as few calls of torch as
        possible. The caller calls `_record` afterwards. For `pending` see `Inputs.fill`.
        """
        longest, last = max(len(row.ids) for row in rows), max(row.start for row in rows)
        batch, tokens = _shape(len(rows), longest)
        if last + tokens > self._model.config.max_seq_len:
            tokens = longest  # learned position embeddings end with the context, so padding must not exceed it
        # There are graphs only for models on one GPU. They are launched on this thread's current stream.
        torch.cuda.set_stream(self._stream)
        inputs = self._inputs_of(batch * tokens)
        inputs.fill(rows, batch, tokens, pending)
        inputs.send(batch, tokens)
        bound = self._bound(last + tokens)
        if not self._graphs.replay((batch, tokens, bound)):
            self._run(batch, tokens, bound)
        return longest, tokens

    def _record(self) -> None:
        """Mark the end of a small pass, and capture it if it is time."""
        if self._last != self._device:
            # The events of `_ends` are recorded on the first GPU's stream, which does not wait for the last one.
            torch.cuda.synchronize(self._last)
        self._graphs.capture()

    @torch.inference_mode()
    def _run(self, batch: int, tokens: int, bound: int) -> None:
        """Run a small pass on what is in `_inputs`, for which there is no graph yet."""
        self._enter()
        count = batch * tokens
        scores, inputs = self._scores_of(count)[:count], self._inputs_of(count)

        def work() -> None:
            out = self.small.run(
                inputs.hidden[:count], inputs.lengths[:batch], inputs.block_table[:batch], tokens, bound,
                inputs.rope_offsets[:batch] if self.rope_switches else None,
            )  # fmt: skip
            scores.copy_(out[:, : self.vocab_size])
            if softcap := self._model.config.final_logit_softcapping:
                scores.div_(softcap).tanh_().mul_(softcap)

        if self._experts_captured < count:
            work()
        else:
            self._graphs.run((batch, tokens, bound), work, lambda: self.small.prepare(count))

    @torch.inference_mode()
    def _follow(self, rows: int, tokens: int, draws: Sequence[Draw | None]) -> list[int]:
        """Sample on the device for rows with a draw, and copy the other rows' logits to the CPU.

        Returns:
            The rows sampled for.
        """
        count = rows * tokens
        scores, logits = self._scores_of(count), self._logits_of(count)
        drawn: list[int] = []
        if self.sampler is not None and tokens == 1:
            drawn = [index for index, draw in enumerate(draws) if draw is not None]
        if self.sampler is None or not drawn:
            logits[:count].copy_(scores[:count], non_blocking=True)
            return []
        for index in {*range(rows)}.difference(drawn):
            logits[index].copy_(scores[index], non_blocking=True)
        self.sampler.launch(scores, drawn, [draw for draw in draws if draw is not None])
        return drawn


def _shape(rows: int, tokens: int) -> tuple[int, int]:
    """Round rows and tokens up where that takes no longer, so that fewer CUDA graphs are needed."""
    batch, count = (1 << (n - 1).bit_length() for n in (rows, tokens))
    if rows <= batch * 3 // 4 and batch > quantized_linear.MOST_ROWS:
        batch = batch * 3 // 4
    most = max(quantized_linear.MOST_ROWS, quantized_linear.most_rows(rows * tokens))
    if batch * count <= most:
        return batch, count
    return (batch, tokens) if batch * tokens <= most else (rows, tokens)


def _padded(blocks: int) -> int:
    """Round up the number of blocks in a pass over prompts by at most a quarter, so that fewer graphs are needed."""
    step = 1 << max(blocks.bit_length() - 3, 0)
    return -(-blocks // step) * step


def _cache_tensors(cache: Any) -> list[torch.Tensor]:
    lists = [cache.key_states, cache.value_states]
    if cache.has_scales:
        lists += [cache.key_scales, cache.value_scales]
    return [tensor for states in lists for tensor in states]
