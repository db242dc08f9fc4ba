"""Forward passes on the GPU: the `ModelRunner` that the scheduler drives."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from exl_cli.engines.exllamav2 import fused_forward, layers
from exl_cli.engines.exllamav2.attention.paged import Backend
from exl_cli.engines.exllamav2.build_model import experts_captured, rope_offsets, rope_switches
from exl_cli.engines.exllamav2.cuda_errors import cause, wait
from exl_cli.engines.exllamav2.device_sampler import DeviceSampler, Seat
from exl_cli.engines.exllamav2.forward_pass import PENDING, Chosen, Draw, ScheduledTokens
from exl_cli.engines.exllamav2.graphs import Graphs
from exl_cli.engines.exllamav2.inputs import Embeddings, Inputs, Received
from exl_cli.engines.exllamav2.kernels import quantized_linear
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.engines.exllamav2.stages import Stage, stages_of
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
# Tokens that a pass through prompts over several stages has at least; with fewer, products take longer for each.
_LEAST_PROMPT_TOKENS = 256
# Largest relative difference between exl's kernels and exllamav2's modules; lost data differ by as much as there is.
_MOST_DIFFERENCE = 0.1
_log = logging.getLogger(__name__)


class _Part(NamedTuple):
    """Sequences that go through the stages together: of a pass all, or a share so that all stages are busy.

    Attributes:
        first: number of the part's first row.
        rows: number of its rows.
        drawn: rows that the device samples for, from the part's first one on.
        end: recorded after the part and what follows it.
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
        backend: chooses the attention backend; called once the other kernels are ready.
        samples: whether tokens may be sampled on the device.
        cuts: layers that begin a stage although the one before them is on the same GPU.

    Attributes:
        cache: exllamav2's.
        max_batch: see `ModelRunner`.
        small: computes small passes, or their first stage.
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
        cuts: Sequence[int] = (),
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
        # exllamav2's streams of the first and of the last GPU.
        self._stream, self._last_stream = (
            model.get_device_context(device.index, scratch=False).stream for device in (self._device, self._last)
        )
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
        self._most_prompt_tokens: int = min(quantized_linear.MOST_TOKENS, most)
        self._prompt_inputs = Inputs(
            self._embeddings, model.config.hidden_size, dtype, self._most_prompt_tokens // _BLOCK,
            self._most_prompt_tokens, self._most_keys // page_size + 1, pages, self._rope_offsets, self._device,
            with_states=False,
        )  # fmt: skip
        self._large = ModulesForward(model, cache, page_size)
        self._stages, self.why_not_fused = self._choose(cuts)
        self.backend = backend()
        self._experts_captured = experts_captured(model)
        self.failed: DeviceError | None = None
        self._set_up(samples=samples)
        if len(self._stages) > 1 and (reason := self._why_not_trusted()):
            _log.info("the model does not run in stages: %s", reason)
            for stage in self._stages:
                stage.close()
            self._stages, self.why_not_fused = [self._whole()], reason
            self._set_up(samples=samples)

    def _set_up(self, *, samples: bool) -> None:
        """Make what passes through the chosen stages need."""
        self.small = self._stages[0].forward
        # exllamav2's kernels dequantize all weights first if there are more than a few rows.
        most = quantized_linear.MOST_ROWS if self.why_not_fused else quantized_linear.MOST_SEQUENCES
        # Each sequence takes at least one page.
        self.max_batch = min(most, memory.MOST_SEQUENCES, max(quantized_linear.MOST_ROWS, self.pages))
        # With a quantized cache, each block of a prompt would dequantize all keys before it.
        self._prefills_fused = not self.why_not_fused and self.backend.captures and not self.cache.has_scales
        self.prefill_block = _BLOCK if self._prefills_fused else 1
        # exllamav2's modules over several GPUs are neither captured nor followed by a sampler.
        together = not self.why_not_fused or self._device == self._last
        for stage in self._stages:
            stage.forward.compile_ahead()
            stage.graphs = Graphs(self.backend.captures and together)
        # Logits on the device and the CPU's copy of them, by `_logits_rows`; graphs write to the former.
        self._scores: dict[int, torch.Tensor] = {}
        self._logits: dict[int, torch.Tensor] = {}
        most_parts = 2 * len(self._stages)  # of two passes in flight
        self.sampler: DeviceSampler | None = None
        if samples and together and not too_old(self._last):
            self.sampler = DeviceSampler(self._last, self.max_batch, self.vocab_size, self._most_keys, most_parts)
            since = time.perf_counter()
            self._embeddings.share()
            _log.info(
                "the device reads embeddings itself: %s, %.3f s",
                self._embeddings.address != 0,
                time.perf_counter() - since,
            )
        # The stream on which passes end; `_extra_streams` if some stage's is not exllamav2's.
        self._end_stream = self._last_stream if self.why_not_fused else self._stages[-1].stream
        self._extra_streams = len({stage.stream.device for stage in self._stages}) < len(self._stages)
        self._ends = deque(torch.cuda.Event() for _ in range(most_parts))  # type: ignore[no-untyped-call]
        # Logits on the device of parts of a pass but the last, by their number.
        self._kept: dict[int, torch.Tensor] = {}
        self._passes: deque[_Pass] = deque()
        self._chosen: list[Chosen | None] = []
        # Views of `_logits`, by `_Pass.rows`, `longest` and `tokens`.
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}

    def _why_not_trusted(self) -> str:
        """Why the stages do not compute what exllamav2's modules do; empty if they do.

        Computes one token by an ordinary pass, the pass that is captured, its graph, and with the token where the last
        GPU would leave it: so a link or a driver that loses or reorders data shows before any text does.
        """
        row, token = ScheduledTokens((0,), 0, [0]), torch.zeros(1, dtype=torch.int32, pin_memory=True)
        try:
            results = []
            for _ in range(3):
                self.submit([row])
                results.append(self.collect()[0, 0].clone())
            if self.pends:
                place: Any = SimpleNamespace(next=token.data_ptr())
                seat: Any = SimpleNamespace(host_token=token.data_ptr(), row=place, end=self._ends[0])
                self._pass([ScheduledTokens((PENDING,), 0, [0])], [seat])
                part = _Part(0, 1, self._follow(1, 1, ()), self._end())
                self._passes.append(_Pass(1, 1, 1, [part]))
                results.append(self.collect()[0, 0].clone())
            expected = self._logits_of_modules(row)
        except Exception as error:  # of torch, the driver or the kernels
            return f"trying them failed: {cause(error)}"
        if not bool(expected.isfinite().all()):
            return ""  # nothing to compare with
        for result in results:
            if not float((result - expected).norm()) <= _MOST_DIFFERENCE * float(expected.norm()):
                return "they do not compute what exllamav2's modules do"
        return ""

    @torch.inference_mode()
    def _logits_of_modules(self, row: ScheduledTokens) -> torch.Tensor:
        """The logits of a row of one token by exllamav2's modules."""
        self._enter()
        self._join()
        inputs = self._inputs_of(1)
        inputs.fill([row], 1, 1)
        inputs.send(1, 1)
        offsets = inputs.rope_offsets[:1] if self.rope_switches else None
        out = self._large.run(
            inputs.hidden[:1], inputs.lengths[:1], inputs.block_table[:1], 1, self._bound(1), offsets
        )  # fmt: skip
        logits = out[0, : self.vocab_size].float()
        if softcap := self._model.config.final_logit_softcapping:
            logits = (logits / softcap).tanh() * softcap
        self._join()
        return logits.cpu()

    def rope_table(self, tokens: int) -> int:
        """The RoPE table of a sequence of `tokens` tokens; see `ScheduledTokens`."""
        return bisect_left(self.rope_switches, tokens)

    @property
    def captures(self) -> bool:
        """Whether small passes are captured in CUDA graphs, unless a capture has failed."""
        return all(stage.graphs.usable for stage in self._stages)

    @property
    def why_not_captured(self) -> str:
        """Why a capture failed; empty if none did."""
        return next((stage.graphs.why_not for stage in self._stages if stage.graphs.why_not), "")

    def _choose(self, cuts: Sequence[int]) -> tuple[list[Stage], str]:
        """The stages of small passes; and why these are not exl's own kernels, where it is one stage for all GPUs."""
        reason = layers.why_not(self._model)
        if not reason:
            try:
                stages, reason = self._fused_stages(cuts)
                if not reason:
                    return stages, ""
            except EngineError as error:
                reason = error.message
            finally:
                torch.cuda.set_stream(self._stream)
        _log.info("small passes through exllamav2's modules: %s", reason)
        return [self._whole()], reason

    def _whole(self) -> Stage:
        """All layers by exllamav2's modules, on whatever GPUs they are."""
        return Stage(self._stream, range(self._model.config.num_hidden_layers), self._inputs_of, self._large)

    def _fused_stages(self, cuts: Sequence[int]) -> tuple[list[Stage], str]:
        model, stages, reason = self._model, list[Stage](), ""
        # Of what a quantized cache and exllamav2's modules need to compute with, there is one on each GPU.
        shared = self.cache.has_scales or model.config.num_experts
        for layers_, index in stages_of(model, cuts):
            stream = model.get_device_context(index, scratch=False).stream
            alone = all(stage.stream.device != stream.device for stage in stages)
            if not alone and not shared:
                stream = torch.cuda.Stream(stream.device)  # type: ignore[no-untyped-call]
            inputs = self._received(stream.device) if stages else self._inputs_of
            torch.cuda.set_stream(stream)
            forward = fused_forward.FusedForward(
                model, self.cache, self.page_size, inputs, self._large, layers_, scratch=alone
            )
            reason = reason or forward.why_not()
            stages.append(Stage(stream, layers_, inputs, forward))
        return stages, reason

    def _received(self, device: torch.device) -> Callable[[int], Received]:
        """What `_inputs_of` is on the first GPU, on a later stage's."""
        all_inputs = self._inputs, self._many_inputs, self._prompt_inputs
        received = {id(inputs): inputs.received(device) for inputs in all_inputs}
        return lambda tokens: received[id(self._inputs_of(tokens))]

    @torch.inference_mode()
    def prefill(self, *rows: ScheduledTokens) -> None:
        """See `ModelRunner.prefill`. Several sequences take less time together than one after another."""
        self._enter()
        if len(rows) == 1 and len(rows[0].ids) <= self.max_tokens:
            self._pass(rows)
            self._record()
            return
        sizes = [-(-len(row.ids) // _BLOCK) * _BLOCK for row in rows]
        tokens = self._prompt_tokens(sum(sizes))
        # The RoPE tables must cover padding tokens, too.
        fits = all(row.start + size <= self._most_keys for row, size in zip(rows, sizes, strict=True))
        if self._prefills_fused and fits and all(stage.forward.prefills(tokens) for stage in self._stages):
            self._prefill_fused(rows)
            return
        for row in rows:
            self._prefill_modules(row)

    def _prompt_tokens(self, tokens: int) -> int:
        """Most tokens of a pass through prompts of so many in all, whole blocks of each."""
        if len(self._stages) > 1:
            # So many passes that most of the time all stages are busy.
            tokens = max(_LEAST_PROMPT_TOKENS, -(-tokens // (2 * len(self._stages) * _BLOCK)) * _BLOCK)
        return min(tokens, self._most_prompt_tokens)

    def _prefill_fused(self, rows: Sequence[ScheduledTokens]) -> None:
        blocks = [
            ScheduledTokens(row.ids[at : at + _BLOCK], row.start + at, row.block_table, row.rope_table)
            for row in rows
            for at in range(0, len(row.ids), _BLOCK)
        ]
        most = self._prompt_tokens(len(blocks) * _BLOCK) // _BLOCK
        for first in range(0, len(blocks), most):
            # Blocks that attend to the most keys come first, so that none of those runs alone at the end.
            some = blocks[first : first + most][::-1]
            batch = _padded(len(some)) if len(some) < most else most
            bound = self._bound(max(block.start for block in some) + _BLOCK)
            inputs = self._inputs_of(batch * _BLOCK)
            self._stages[0].enter()
            inputs.fill(some, batch, _BLOCK)
            inputs.send(batch, _BLOCK)
            for stage in self._through(batch * _BLOCK):
                if not stage.graphs.replay(("prompts", batch, bound)):
                    self._prefill_blocks(stage, batch, bound)
            self._record()

    def _prefill_blocks(self, stage: Stage, batch: int, bound: int) -> None:
        """Run a stage of a pass over prompts on the contents of its inputs, for which there is no graph yet."""
        inputs = stage.inputs(batch * _BLOCK)

        def work() -> None:
            stage.forward.prefill_blocks(inputs.lengths[:batch], _BLOCK, bound)

        if self._experts_captured < batch * _BLOCK:
            work()
        else:
            stage.graphs.run(("prompts", batch, bound), work, lambda: None)

    def _prefill_modules(self, row: ScheduledTokens) -> None:
        most = self.max_tokens
        if len(row.ids) <= (most if self.why_not_fused else _FEW_PASSES * most):
            for first in range(0, len(row.ids), most):
                ids = row.ids[first : first + most]
                self._pass([ScheduledTokens(ids, row.start + first, row.block_table, row.rope_table)])
                self._record()
            return
        self._join()
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
        self._join()

    @torch.inference_mode()
    def synchronize(self) -> None:
        self._enter()
        for stream in {self._stream, self._last_stream, *(stage.stream for stage in self._stages)}:
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
            some, its = rows[first:stop], draws[first:stop]
            longest, tokens = self._pass(some, [draw.seat for draw in its if draw is not None])
            drawn = self._follow(len(some), tokens, its)
            if stop < len(rows):
                self._keep(len(parts), len(some))
            end = self._end()
            parts.append(_Part(first, len(some), drawn, end))
            for draw in its:
                if draw is not None:
                    draw.seat.end = end
        self._passes.append(_Pass(len(rows), longest, tokens, parts))

    def _shares(self, rows: Sequence[ScheduledTokens]) -> list[int]:
        """The first rows of the parts of a pass, and the number of all.

        With several stages, a pass that does not wait for the host has a part for each: so they work at the same time.
        """
        count = len(rows)
        parts = min(count, len(self._stages)) if rows[0].ids[0] == PENDING else 1
        return [index * count // parts for index in range(parts + 1)]

    @torch.inference_mode()
    def _keep(self, part: int, rows: int) -> None:
        """Keep the logits of a part's single tokens on the device, as the next part will overwrite them."""
        kept = self._kept.get(part)
        if kept is None or len(kept) < rows:
            kept = self._kept[part] = torch.empty_like(self._scores_of(rows))
        kept[:rows].copy_(self._scores_of(rows)[:rows])

    @torch.inference_mode()
    def collect(self) -> torch.Tensor:
        asked = self._passes.popleft()
        self._wait(asked.parts[-1].end)
        self._chosen = []
        for number, part in enumerate(asked.parts):
            if self.sampler is None or not part.drawn:
                continue
            self._chosen = self._chosen or [None] * asked.rows
            for row, chosen in zip(part.drawn, self.sampler.collect(), strict=True):
                index = part.first + row
                self._chosen[index] = chosen
                if chosen is None and not self._passes:
                    kept = part is not asked.parts[-1]
                    scores = self._kept[number] if kept else self._scores_of(part.rows * asked.tokens)
                    self._logits_of(asked.rows * asked.tokens)[index].copy_(scores[row])
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
        for stage in self._stages:
            stage.enter()
            for tensor in _cache_tensors(self.cache, stage.layers):
                pages = tensor.view(-1, self.page_size, *tensor.shape[2:])
                pages[target].copy_(pages[source])

    def close(self) -> None:
        """Free the memory. The model cannot be used afterwards; closing it again does nothing."""
        for stage in self.__dict__.pop("_stages", ()):
            stage.close()
        self.sampler = None
        if embeddings := self.__dict__.get("_embeddings"):
            embeddings.close()
        for name in (
            "small",
            "_large",
            "_inputs",
            "_many_inputs",
            "_prompt_inputs",
            "_embeddings",
            "_logits",
            "_scores",
            "_kept",
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

    def _pass(self, rows: Sequence[ScheduledTokens], seats: Sequence[Seat] = ()) -> tuple[int, int]:
        """Start one small pass; returns the tokens of the longest row, and the tokens computed per row with padding.

        The GPU may be idle until the pass starts, so the common path, replaying a graph, makes as few calls of torch as
        possible. The caller calls `_record` afterwards.

        Args:
            rows: the rows.
            seats: the seats of all of them, which `PENDING` tokens are taken from.
        """
        longest, last = max(len(row.ids) for row in rows), max(row.start for row in rows)
        batch, tokens = _shape(len(rows), longest)
        if last + tokens > self._model.config.max_seq_len:
            tokens = longest  # learned position embeddings end with the context, so padding must not exceed it
        # Graphs are launched on this thread's current stream.
        first = self._stages[0]
        first.enter()
        inputs = self._inputs_of(batch * tokens)
        pending: list[int] = []
        if rows[0].ids[0] == PENDING:
            # From another stream, the token is read where the sampler leaves it for the host.
            apart = self._end_stream != first.stream
            pending = [seat.host_token if apart else seat.row.next for seat in seats]
            for event in dict.fromkeys(seat.end for seat in seats) if apart else ():
                first.stream.wait_event(event)
        inputs.fill(rows, batch, tokens, pending)
        inputs.send(batch, tokens)
        bound = self._bound(last + tokens)
        for stage in self._through(batch * tokens):
            if not stage.graphs.replay((batch, tokens, bound)):
                self._run(stage, batch, tokens, bound)
        return longest, tokens

    def _through(self, tokens: int) -> Iterator[Stage]:
        """The stages of a pass of so many tokens, each as soon as it has been handed its input."""
        yield self._stages[0]
        for before, stage in pairwise(self._stages):
            stage.receive(before, tokens)
            yield stage

    def _end(self) -> torch.cuda.Event:
        """The event of the end of the part of a pass just started."""
        self._record()
        self._ends.rotate()
        self._ends[0].record(self._end_stream)
        return self._ends[0]

    def _record(self) -> None:
        """Capture the pass just started, if it is time."""
        for stage in self._stages:
            if stage.graphs.is_due:
                stage.enter()
                stage.graphs.capture()

    @torch.inference_mode()
    def _run(self, stage: Stage, batch: int, tokens: int, bound: int) -> None:
        """Run a stage of a small pass on what is in its inputs, for which there is no graph yet."""
        self._enter()
        stage.enter()
        count = batch * tokens
        inputs, is_last = stage.inputs(count), stage is self._stages[-1]
        scores = self._scores_of(count)[:count]

        def work() -> None:
            out = stage.forward.run(
                inputs.hidden[:count], inputs.lengths[:batch], inputs.block_table[:batch], tokens, bound,
                inputs.rope_offsets[:batch] if self.rope_switches else None,
            )  # fmt: skip
            if not is_last:
                return
            scores.copy_(out[:, : self.vocab_size])
            if softcap := self._model.config.final_logit_softcapping:
                scores.div_(softcap).tanh_().mul_(softcap)

        if self._experts_captured < count:
            work()
        else:
            stage.graphs.run((batch, tokens, bound), work, lambda: stage.forward.prepare(count))

    def _join(self) -> None:
        """Have the stages wait for one another, where exllamav2's modules run on other streams than theirs."""
        streams = [self._stream, *(stage.stream for stage in self._stages)]
        for stream in streams if self._extra_streams else ():
            for other in streams:
                stream.wait_stream(other)

    @torch.inference_mode()
    def _follow(self, rows: int, tokens: int, draws: Sequence[Draw | None]) -> list[int]:
        """Sample on the device for rows with a draw, and copy the other rows' logits to the CPU.

        Returns:
            The rows sampled for.
        """
        if self._end_stream != self._stages[-1].stream:
            torch.cuda.set_stream(self._end_stream)
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


def _cache_tensors(cache: Any, layers: range) -> list[torch.Tensor]:
    lists = [cache.key_states, cache.value_states]
    if cache.has_scales:
        lists += [cache.key_scales, cache.value_scales]
    return [states[layer] for states in lists for layer in layers]
