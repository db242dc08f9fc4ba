"""Forward passes on the GPU: the `ModelRunner` that the scheduler drives."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from exl_cli.engines.exllamav2.attention.paged import Backend
from exl_cli.engines.exllamav2.build_model import rope_switches
from exl_cli.engines.exllamav2.cuda_errors import wait
from exl_cli.engines.exllamav2.device_sampler import DeviceSampler, Seat
from exl_cli.engines.exllamav2.forward_pass import PENDING, Chosen, Draw, ScheduledTokens
from exl_cli.engines.exllamav2.graphs import key_bound, padded_blocks, padded_shape
from exl_cli.engines.exllamav2.inputs import PROMPT_BLOCK, InputBuffers
from exl_cli.engines.exllamav2.kernels import quantized_linear
from exl_cli.engines.exllamav2.logits import LogitsBuffers, soft_cap
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.engines.exllamav2.stages import Pipeline, Stage
from exl_cli.engines.exllamav2.support import too_old
from exl_cli.errors import DeviceError
from exl_cli.models import memory

# Up to this many small passes through exl's kernels are faster than a large pass, which dequantizes all weights first.
_FEW_PASSES = 3
# Fewest tokens in a pass over prompts through several stages; with fewer, products take longer per token.
_LEAST_PROMPT_TOKENS = 256
_log = logging.getLogger(__name__)


class _Part(NamedTuple):
    """Sequences that go through the stages together: all of a pass, or a share of them, to keep all stages busy.

    Attributes:
        first: number of the part's first row.
        rows: number of its rows.
        drawn: rows that the device samples for, counted from the part's first.
        end: recorded after the part, its sampling and the copies of its logits.
    """

    first: int
    rows: int
    drawn: list[int]
    end: torch.cuda.Event


class _Pass(NamedTuple):
    """A pass in flight.

    Attributes:
        rows: number of sequences.
        longest: tokens of the longest row.
        tokens: tokens computed per row, padding included.
        parts: in the order in which they run.
    """

    rows: int
    longest: int
    tokens: int
    parts: list[_Part]


class GpuForward:
    """A loaded model with its KV cache; a `ModelRunner`.

    Args:
        model, cache: exllamav2's; the cache has one spare page more than `pages`, for padding tokens.
        pages: pages that the scheduler may use.
        page_size: positions per page.
        inputs: the inputs of passes.
        modules: computes large passes over prompts, where exl's kernels do not.
        pipeline: computes all other passes.
        backend: computes attention.
        samples: whether tokens may be sampled on the device.

    Attributes:
        cache: exllamav2's.
        max_batch: see `ModelRunner`.
        small: computes small passes, or their first stage.
        why_not_fused: why exl's own kernels do not compute small passes; empty if they do.
        backend: computes attention.
        failed: the error if the GPU hangs; otherwise None. Nothing runs on it any more, and freeing memory would wait.
    """

    max_tokens = quantized_linear.MOST_ROWS

    def __init__(
        self,
        model: Any,
        cache: Any,
        pages: int,
        page_size: int,
        inputs: InputBuffers,
        modules: ModulesForward,
        pipeline: Pipeline,
        backend: Backend,
        *,
        samples: bool = True,
    ) -> None:
        self._model, self.cache = model, cache
        self.pages, self.page_size = pages, page_size
        self.vocab_size = model.config.vocab_size
        self.rope_switches: Sequence[int] = rope_switches(model)
        self._inputs, self._modules, self._pipeline = inputs, modules, pipeline
        self.backend = backend
        self.why_not_fused = pipeline.why_not_fused
        self.small = pipeline.stages[0].forward
        self._most_prompt_tokens = inputs.most_prompt_tokens
        self._experts_captured = min(stage.forward.most_captured for stage in pipeline.stages)
        self.failed: DeviceError | None = None
        # exllamav2's kernels dequantize all weights first if there are more than a few rows.
        most = quantized_linear.MOST_ROWS if self.why_not_fused else quantized_linear.MOST_SEQUENCES
        # Each sequence takes at least one page.
        self.max_batch = min(most, memory.MOST_SEQUENCES, max(quantized_linear.MOST_ROWS, pages))
        # With a quantized cache, each block of a prompt would dequantize all keys before it.
        self._prefills_fused = not self.why_not_fused and backend.captures and not cache.has_scales
        self.prefill_block = PROMPT_BLOCK if self._prefills_fused else 1
        pipeline.prepare(captures=backend.captures and pipeline.is_capturable)
        self._logits = LogitsBuffers(self.max_batch, self.vocab_size, pipeline.last_device)
        most_parts = 2 * len(pipeline.stages)  # of two passes in flight
        self.sampler: DeviceSampler | None = None
        if samples and pipeline.is_capturable and not too_old(pipeline.last_device):
            self.sampler = DeviceSampler(
                pipeline.last_device, self.max_batch, self.vocab_size, inputs.most_keys, most_parts
            )
            since = time.perf_counter()
            inputs.embeddings.share()
            _log.info(
                "the device reads embeddings itself: %s, %.3f s",
                inputs.embeddings.address != 0,
                time.perf_counter() - since,
            )
        self._ends = deque(torch.cuda.Event() for _ in range(most_parts))  # type: ignore[no-untyped-call]
        self._passes: deque[_Pass] = deque()
        self._chosen: list[Chosen | None] = []

    @property
    def captures(self) -> bool:
        """See `Pipeline.captures`."""
        return self._pipeline.captures

    @property
    def why_not_captured(self) -> str:
        """See `Pipeline.why_not_captured`."""
        return self._pipeline.why_not_captured

    @property
    def pends(self) -> bool:
        return self.sampler is not None and self._inputs.embeddings.address != 0

    def rope_table(self, tokens: int) -> int:
        """The RoPE table of a sequence of `tokens` tokens; see `ScheduledTokens`."""
        return bisect_left(self.rope_switches, tokens)

    @torch.inference_mode()
    def prefill(self, *rows: ScheduledTokens) -> None:
        """See `ModelRunner.prefill`. Several sequences take less time together than one after another."""
        self._pipeline.enter()
        if len(rows) == 1 and len(rows[0].ids) <= self.max_tokens:
            self._pass(rows)
            self._pipeline.capture()
            return
        sizes = [-(-len(row.ids) // PROMPT_BLOCK) * PROMPT_BLOCK for row in rows]
        tokens = self._prompt_tokens(sum(sizes))
        # The RoPE tables must cover padding tokens, too.
        fits = all(row.start + size <= self._inputs.most_keys for row, size in zip(rows, sizes, strict=True))
        if self._prefills_fused and fits and all(stage.forward.prefills(tokens) for stage in self._pipeline.stages):
            self._prefill_fused(rows)
            return
        for row in rows:
            self._prefill_modules(row)

    def _prompt_tokens(self, tokens: int) -> int:
        """Most tokens per pass over prompts with `tokens` tokens together, each in whole blocks."""
        count = len(self._pipeline.stages)
        if count > 1:
            # Twice as many passes as stages keep all stages busy most of the time.
            tokens = max(_LEAST_PROMPT_TOKENS, -(-tokens // (2 * count * PROMPT_BLOCK)) * PROMPT_BLOCK)
        return min(tokens, self._most_prompt_tokens)

    def _prefill_fused(self, rows: Sequence[ScheduledTokens]) -> None:
        """Prefill by exl's kernels, all sequences together."""
        blocks = [
            ScheduledTokens(row.ids[at : at + PROMPT_BLOCK], row.start + at, row.block_table, row.rope_table)
            for row in rows
            for at in range(0, len(row.ids), PROMPT_BLOCK)
        ]
        most = self._prompt_tokens(len(blocks) * PROMPT_BLOCK) // PROMPT_BLOCK
        for first in range(0, len(blocks), most):
            # Blocks that attend to the most keys come first, lest the last of them run alone at the end.
            some = blocks[first : first + most][::-1]
            batch = padded_blocks(len(some)) if len(some) < most else most
            bound = key_bound(max(block.start for block in some) + PROMPT_BLOCK, self._inputs.table_keys)
            inputs = self._inputs.of(batch * PROMPT_BLOCK)
            self._pipeline.stages[0].enter()
            inputs.fill(some, batch, PROMPT_BLOCK)
            inputs.send(batch, PROMPT_BLOCK)
            for stage in self._pipeline.through(batch * PROMPT_BLOCK):
                if not stage.graphs.replay(("prompts", batch, bound)):
                    self._prefill_blocks(stage, batch, bound)
            self._pipeline.capture()

    def _prefill_blocks(self, stage: Stage, batch: int, bound: int) -> None:
        """Run a stage of a pass over prompts on the contents of its inputs, for which there is no graph yet."""
        inputs = stage.inputs(batch * PROMPT_BLOCK)

        def work() -> None:
            stage.forward.prefill_blocks(inputs.lengths[:batch], PROMPT_BLOCK, bound)

        if self._experts_captured < batch * PROMPT_BLOCK:
            work()
        else:
            stage.graphs.run(("prompts", batch, bound), work, lambda: None)

    def _prefill_modules(self, row: ScheduledTokens) -> None:
        """Prefill a sequence in small passes, or in large ones by exllamav2's modules."""
        most = self.max_tokens
        if len(row.ids) <= (most if self.why_not_fused else _FEW_PASSES * most):
            for first in range(0, len(row.ids), most):
                ids = row.ids[first : first + most]
                self._pass([ScheduledTokens(ids, row.start + first, row.block_table, row.rope_table)])
                self._pipeline.capture()
            return
        self._pipeline.join()
        self._modules.prefill(row, self._inputs)
        self._pipeline.join()

    @torch.inference_mode()
    def synchronize(self) -> None:
        self._pipeline.enter()
        for stream in self._pipeline.streams:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            self._wait(event)
        self._passes.clear()
        if self.sampler is not None:
            self.sampler.reset()

    def submit(self, rows: Sequence[ScheduledTokens], draws: Sequence[Draw | None] = ()) -> None:
        parts: list[_Part] = []
        longest = tokens = 0
        for first, stop in pairwise(self._shares(rows)):
            count, asked = stop - first, draws[first:stop]
            seats = [draw.seat for draw in asked if draw is not None]
            longest, tokens = self._pass(rows[first:stop], seats)
            drawn = self._follow(count, tokens, asked)
            if stop < len(rows):
                self._logits.keep(len(parts), count)
            end = self._end()
            parts.append(_Part(first, count, drawn, end))
            for seat in seats:
                seat.end = end
        self._passes.append(_Pass(len(rows), longest, tokens, parts))

    def submit_pending(self, row: ScheduledTokens, address: int) -> None:
        """Start a pass of one `PENDING` token, as if the sampler had left it at an address in page-locked memory."""
        place: Any = SimpleNamespace(next=address)
        seat: Any = SimpleNamespace(host_token=address, row=place, end=self._ends[0])
        longest, tokens = self._pass([row], [seat])
        part = _Part(0, 1, self._follow(1, tokens, ()), self._end())
        self._passes.append(_Pass(1, longest, tokens, [part]))

    def _shares(self, rows: Sequence[ScheduledTokens]) -> list[int]:
        """Divide the rows of a pass into parts: the first row of each, then the number of rows.

        With several stages, a pass that does not wait for the host has as many parts, which they compute concurrently.
        """
        count = len(rows)
        parts = min(count, len(self._pipeline.stages)) if rows[0].ids[0] == PENDING else 1
        return [index * count // parts for index in range(parts + 1)]

    @torch.inference_mode()
    def collect(self) -> torch.Tensor:
        oldest = self._passes.popleft()
        self._wait(oldest.parts[-1].end)
        self._chosen = []
        for number, part in enumerate(oldest.parts):
            if self.sampler is None or not part.drawn:
                continue
            self._chosen = self._chosen or [None] * oldest.rows
            for row, chosen in zip(part.drawn, self.sampler.collect(), strict=True):
                index = part.first + row
                self._chosen[index] = chosen
                if chosen is None and not self._passes:
                    kept = part is not oldest.parts[-1]
                    logits = self._logits.kept(number) if kept else self._logits.on_device(part.rows * oldest.tokens)
                    self._logits.on_host(oldest.rows * oldest.tokens)[index].copy_(logits[row])
        return self._logits.view(oldest.rows, oldest.longest, oldest.tokens)

    def chosen(self) -> Sequence[Chosen | None]:
        return self._chosen

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        self._pipeline.enter()
        for stage in self._pipeline.stages:
            stage.enter()
            for tensor in _cache_tensors(self.cache, stage.layers):
                pages = tensor.view(-1, self.page_size, *tensor.shape[2:])
                pages[target].copy_(pages[source])

    def close(self) -> None:
        """Free the memory. The model cannot be used afterwards; closing it again does nothing."""
        if not hasattr(self, "_pipeline"):
            return
        self._pipeline.close()
        self._inputs.embeddings.close()
        self.sampler = None
        del self._pipeline, self.small, self._modules, self._inputs, self._logits, self._model, self.cache

    def _wait(self, event: torch.cuda.Event) -> None:
        """Wait for an event; see `cuda_errors.wait`. After a timeout, fail at once instead of waiting again."""
        if self.failed:
            raise self.failed
        try:
            wait(event)
        except DeviceError as error:
            self.failed = error
            raise

    def _pass(self, rows: Sequence[ScheduledTokens], seats: Sequence[Seat] = ()) -> tuple[int, int]:
        """Start one small pass. The caller calls `Pipeline.capture` afterwards.

        The GPU may be idle until the pass starts, so the common path, replaying a graph, makes as few calls of torch as
        possible.

        Args:
            rows: one per sequence.
            seats: if their tokens are `PENDING`, the seats of all of them, where the tokens are.

        Returns:
            The tokens of the longest row, and the tokens computed per row, padding included.
        """
        longest, last = max(len(row.ids) for row in rows), max(row.start for row in rows)
        batch, tokens = padded_shape(len(rows), longest)
        if last + tokens > self._model.config.max_seq_len:
            tokens = longest  # learned position embeddings end with the context, so padding must not exceed it
        # Graphs are launched on this thread's current stream.
        first = self._pipeline.stages[0]
        first.enter()
        inputs = self._inputs.of(batch * tokens)
        pending: list[int] = []
        if rows[0].ids[0] == PENDING:
            # From another stream, the token is read where the sampler leaves it for the host.
            apart = self._pipeline.end_stream != first.stream
            pending = [seat.host_token if apart else seat.row.next for seat in seats]
            for event in dict.fromkeys(seat.end for seat in seats) if apart else ():
                first.stream.wait_event(event)
        inputs.fill(rows, batch, tokens, pending)
        inputs.send(batch, tokens)
        bound = key_bound(last + tokens, self._inputs.table_keys)
        for stage in self._pipeline.through(batch * tokens):
            if not stage.graphs.replay((batch, tokens, bound)):
                self._run(stage, batch, tokens, bound)
        return longest, tokens

    def _end(self) -> torch.cuda.Event:
        """Capture the part of a pass just started, if it is time; returns the event of its end."""
        self._pipeline.capture()
        self._ends.rotate()
        self._ends[0].record(self._pipeline.end_stream)
        return self._ends[0]

    @torch.inference_mode()
    def _run(self, stage: Stage, batch: int, tokens: int, bound: int) -> None:
        """Run a stage of a small pass on the contents of its inputs, for which there is no graph yet."""
        self._pipeline.enter()
        stage.enter()
        count = batch * tokens
        inputs, is_last = stage.inputs(count), stage is self._pipeline.stages[-1]
        logits = self._logits.on_device(count)[:count]

        def work() -> None:
            out = stage.forward.run(
                inputs.hidden[:count], inputs.lengths[:batch], inputs.block_table[:batch], tokens, bound,
                inputs.rope_offsets[:batch] if self.rope_switches else None,
            )  # fmt: skip
            if not is_last:
                return
            logits.copy_(out[:, : self.vocab_size])
            soft_cap(logits, self._model.config.final_logit_softcapping)

        if self._experts_captured < count:
            work()
        else:
            stage.graphs.run((batch, tokens, bound), work, lambda: stage.forward.prepare(count))

    @torch.inference_mode()
    def _follow(self, rows: int, tokens: int, draws: Sequence[Draw | None]) -> list[int]:
        """Sample on the device for rows with a draw, and copy the other rows' logits to the CPU.

        Returns:
            The rows sampled for.
        """
        if self._pipeline.end_stream != self._pipeline.stages[-1].stream:
            torch.cuda.set_stream(self._pipeline.end_stream)
        count = rows * tokens
        on_device, on_host = self._logits.on_device(count), self._logits.on_host(count)
        drawn: list[int] = []
        if self.sampler is not None and tokens == 1:
            drawn = [index for index, draw in enumerate(draws) if draw is not None]
        if self.sampler is None or not drawn:
            on_host[:count].copy_(on_device[:count], non_blocking=True)
            return []
        for index in {*range(rows)}.difference(drawn):
            on_host[index].copy_(on_device[index], non_blocking=True)
        self.sampler.launch(on_device, drawn, [draw for draw in draws if draw is not None])
        return drawn


def _cache_tensors(cache: Any, layers: range) -> list[torch.Tensor]:
    lists = [cache.key_states, cache.value_states]
    if cache.has_scales:
        lists += [cache.key_scales, cache.value_scales]
    return [states[layer] for states in lists for layer in layers]
