"""Forward passes on the GPU: the `ModelRunner` that the scheduler drives."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from exl_cli.engines.exllamav2 import fused_forward, layers
from exl_cli.engines.exllamav2.attention.paged import Backend
from exl_cli.engines.exllamav2.build_model import experts_captured, rope_offsets, rope_switches
from exl_cli.engines.exllamav2.cuda_errors import wait
from exl_cli.engines.exllamav2.device_sampler import DeviceSampler
from exl_cli.engines.exllamav2.forward_pass import PENDING, Chosen, Draw, ScheduledTokens
from exl_cli.engines.exllamav2.graphs import Graphs
from exl_cli.engines.exllamav2.kernels import norm_rope, quantized_linear
from exl_cli.engines.exllamav2.kernels.compiler import Kernel
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.engines.exllamav2.support import too_old
from exl_cli.errors import DeviceError, EngineError
from exl_cli.models import memory

# A pass is launched for at most this many keys per sequence, or twice as many and so on: that takes few CUDA graphs.
_LEAST_KEYS = 1024
# Up to this many small passes through exl's kernels are faster than a large pass, which dequantizes all weights first.
_FEW_PASSES = 3
# Tokens of a prompt that stand for a sequence of their own in a pass through prompts: so any number of sequences, of
# any lengths, make up one pass, and each sees what was written before it.
_BLOCK = 64
# Embeddings looked up per copy; few enough to stay in the CPU's cache.
_LOOKED_UP = 256
# Bytes; the strictest alignment any kernel needs.
_ALIGNMENT = 256
_NO_TOKENS = ScheduledTokens((), 0, [])
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
        # Of passes of few tokens, and of many: the block tables of 256 sequences would take a single one's time.
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
        # exllamav2's own kernels compute rows one after the other, or unpack all weights first.
        most = quantized_linear.MOST_ROWS if self.why_not_fused else quantized_linear.MOST_SEQUENCES
        # Each sequence has a page at least.
        self.max_batch = min(most, memory.MOST_SEQUENCES, max(quantized_linear.MOST_ROWS, pages))
        self.backend = backend()
        # With a quantized cache each block of a prompt would unpack all keys before it.
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
        """See `ModelRunner.prefill`; several sequences take less time together."""
        self._enter()
        if len(rows) == 1 and len(rows[0].ids) <= self.max_tokens:
            self._pass(rows)  # by a graph
            self._record()
            return
        sizes = [-(-len(row.ids) // _BLOCK) * _BLOCK for row in rows]
        tokens, small = min(sum(sizes), self._most_prompt_tokens), self.small
        # What fills up a block has a position, too, of which there must be an angle.
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
            # Those that see the most keys first: blocks of attention that begin last shall not be the longest.
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
        """A pass over what lies in its inputs, of which there is no graph yet."""

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
        """So many rounded up, as the bound that a graph is made for."""
        bound = _LEAST_KEYS
        while bound < keys:
            bound *= 2
        most: int = self._most_keys + self.page_size
        return min(bound, most)

    def _inputs_of(self, tokens: int) -> Inputs:
        """What a pass of so many tokens reads."""
        if tokens <= quantized_linear.MOST_ROWS:
            return self._inputs
        return self._many_inputs if tokens <= quantized_linear.MOST_SEQUENCES else self._prompt_inputs

    def _logits_rows(self, tokens: int) -> int:
        """Rows of the buffers of logits that a pass of so many tokens uses: one set for few tokens, one for many."""
        few = quantized_linear.MOST_ROWS
        return few if tokens <= few else quantized_linear.most_rows(self.max_batch)

    def _scores_of(self, tokens: int) -> torch.Tensor:
        """Where a pass of so many tokens leaves its logits, on its device; graphs write there."""
        most = self._logits_rows(tokens)
        if most not in self._scores:
            self._scores[most] = torch.empty((most, self.vocab_size), dtype=torch.float32, device=self._last)
        return self._scores[most]

    def _logits_of(self, tokens: int) -> torch.Tensor:
        """The CPU's copy of them."""
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
    """Blocks rounded up a little: what is made for a pass of so many serves others."""
    step = 1 << max(blocks.bit_length() - 3, 0)
    return -(-blocks // step) * step


def _cache_tensors(cache: Any) -> list[torch.Tensor]:
    lists = [cache.key_states, cache.value_states]
    if cache.has_scales:
        lists += [cache.key_scales, cache.value_scales]
    return [tensor for states in lists for tensor in states]


class Embeddings:
    """Embedding lookup on the CPU, where exllamav2 keeps the embeddings.

    exllamav2 0.3.2 looks up a whole prompt into newly allocated pageable memory, which the driver then copies through
    its own buffer. Looking up in pieces into page-locked buffers starts the first layer of a 2,048-token prompt after
    four instead of six milliseconds (on an H100). In decoding the GPU waits for the lookup: NumPy takes two
    microseconds, torch forty.

    Args:
        module: exllamav2's embedding module.
        device: where embeddings are needed.

    Attributes:
        rows: the float16 embedding table, viewed as int16, shape (vocabulary, hidden); None if a plain row lookup is
            not enough, as when embeddings are scaled.
        address: address of the table if the device can read it; otherwise 0.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module, self._device = module, device
        params, weight = module.archparams, module.embedding.weight
        plain = not (params.residual_stream_fp32 or params.normalize_embeddings) and weight.is_contiguous()
        self.rows: npt.NDArray[np.int16] | None = None
        if plain and weight.device.type == "cpu" and weight.dtype == torch.half:
            self.rows = weight.detach().view(torch.int16).numpy()
        self.address = 0
        # Double buffering: one is filled while the other is copied. Each comes with the event of its last copy.
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        on_gpu = device.type == "cuda"
        for _ in range(0 if self.rows is None else 2):
            buffer = torch.empty((_LOOKED_UP, weight.shape[1]), dtype=torch.half, pin_memory=on_gpu)
            event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
            self._buffers.append((buffer, event))

    def share(self) -> None:
        """Let the device read the table in host memory, if the driver can map it."""
        rows = self.rows
        if rows is None or self.address or self._device.type != "cuda" or rows.shape[1] % 8:
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(rows.ctypes.data, rows.nbytes, 0)) == 0:
            self.address = rows.ctypes.data

    def close(self) -> None:
        """Unmap the table; to be called before its memory is freed."""
        if self.address and self.rows is not None:
            torch.cuda.cudart().cudaHostUnregister(self.rows.ctypes.data)  # type: ignore[no-untyped-call]
            self.address = 0

    def computed(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Embeddings computed by exllamav2 on the CPU: [batch, tokens] to [batch, tokens, hidden]."""
        embeddings: torch.Tensor = self._module.forward(torch.from_numpy(ids))
        return embeddings

    def of(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Embeddings of a prompt on the device, in stream order: [tokens] to [1, tokens, hidden]."""
        if self.rows is None:
            return self.computed(ids[None]).to(self._device)
        states = torch.empty((len(ids), self.rows.shape[1]), dtype=torch.half, device=self._device)
        self.put(ids, states)
        return states[None]

    def put(self, ids: npt.NDArray[np.int64], states: torch.Tensor) -> None:
        """The same into memory that is there, shape (tokens, hidden)."""
        if self.rows is None:
            states.copy_(self.computed(ids[None])[0])
            return
        for index, target in enumerate(torch.split(states, _LOOKED_UP)):
            buffer, copied = self._buffers[index % len(self._buffers)]
            if copied is not None:
                wait(copied)
            source, some = buffer[: len(target)], ids[index * _LOOKED_UP : index * _LOOKED_UP + len(target)]
            # mode="clip" writes to `out` directly; the default mode buffers.
            self.rows.take(some, axis=0, out=source.view(torch.int16).numpy(), mode="clip")
            target.copy_(source, non_blocking=True)
            if copied is not None:
                copied.record()


class Inputs:
    """Lengths, block tables and embeddings of a small pass, written on the CPU and copied to the device at once.

    CUDA graphs read them, so their device addresses never change.

    Args:
        embeddings: the model's.
        hidden: size of an embedding.
        dtype: of the residual stream.
        most_rows, most_tokens: most sequences in a pass, and most tokens of all of them together.
        table_width: pages of the longest sequence, and one for padding tokens.
        spare_page: a page that the scheduler never allocates, for padding tokens.
        rope_offsets: see `build_model.rope_offsets`.
        device: where the pass runs.
        with_states: whether embeddings are looked up on the CPU and copied with the rest; if not, the device does that
            where it can.

    Attributes:
        hidden: embeddings, on the device, shape (most_tokens, hidden).
        lengths: int32 on the device, shape (most_rows,): positions in the cache before the pass.
        rope_offsets: int32 on the device, shape (most_rows,): row of each sequence's first position in the RoPE tables.
        block_table: int32 on the device, shape (most_rows, table_width).
    """

    def __init__(
        self,
        embeddings: Embeddings,
        hidden: int,
        dtype: torch.dtype,
        most_rows: int,
        most_tokens: int,
        table_width: int,
        spare_page: int,
        rope_offsets: Sequence[int],
        device: torch.device,
        *,
        with_states: bool = True,
    ) -> None:
        self._embeddings, self._spare_page, self._rope_offsets = embeddings, spare_page, rope_offsets
        self._with_states = with_states
        self._state_bytes = hidden * dtype.itemsize
        # Lengths, offsets and block tables come first and are copied whole: that takes less time than a second copy of
        # the parts in use. Rounded up, as 8-byte addresses follow.
        self._numbers = -(-most_rows * (2 + table_width) // 2) * 2
        self._shape = (most_rows, table_width, hidden, dtype)
        self._states_at = -(-(4 * self._numbers + 8 * most_rows) // _ALIGNMENT) * _ALIGNMENT
        size = self._states_at + most_tokens * self._state_bytes
        self._device_memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._sources, self.lengths, self.rope_offsets, self.block_table, self.hidden = self._parts(self._device_memory)
        pinned = device.type != "cpu"
        host_size = size if with_states else self._states_at
        self._host_buffers = [
            _HostBuffer(torch.empty(host_size, dtype=torch.uint8, pin_memory=pinned), self._parts, spare_page)
            for _ in range(2)
        ]
        self._embed: Kernel | None = None
        # Where the device finds the tokens of prompts.
        self._ids = torch.empty(0 if with_states else most_tokens, dtype=torch.int32, device=device)
        self._id_sources = torch.arange(len(self._ids), device=device) * 4 + self._ids.data_ptr()

    def _parts(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, width, hidden, dtype = self._shape
        numbers = memory[: 4 * self._numbers].view(torch.int32)
        table = numbers[2 * rows : (2 + width) * rows].view(rows, width)
        sources = memory[4 * self._numbers :][: 8 * rows].view(torch.int64)
        states = memory[self._states_at :].view(dtype).view(-1, hidden)
        return sources, numbers[:rows], numbers[rows : 2 * rows], table, states

    def fill(self, rows: Sequence[ScheduledTokens], batch: int, tokens: int, pending: Sequence[int] = ()) -> None:
        """Write rows into the host buffer that `send` copies; the two buffers alternate.

        Args:
            rows: at most `batch`.
            batch: sequences of the pass. Padding sequences have length 0 and use the spare page.
            tokens: tokens per sequence. Padding tokens past a row's block table use the spare page, too.
            pending: for `PENDING` tokens: the device address of each row's token; empty otherwise.
        """
        self._host_buffers.reverse()
        buffer, count = self._host_buffers[0], batch * tokens
        if buffer.sent is not None:
            wait(buffer.sent)
        ids = np.zeros(count, dtype=np.int64)
        for index in range(batch):
            row = rows[index] if index < len(rows) else _NO_TOKENS
            begin = index * tokens
            ids[begin : begin + len(row.ids)] = row.ids
            buffer.lengths[index] = row.start
            buffer.offsets[index] = self._rope_offsets[row.rope_table]
            # Usually unchanged since this buffer was last used.
            if buffer.written[index] != row.block_table:
                buffer.table[index] = self._spare_page
                buffer.table[index, : len(row.block_table)] = row.block_table
                buffer.written[index] = [*row.block_table]
        buffer.pending = len(pending)
        if pending:
            buffer.sources[: len(pending)] = pending
        elif not self._with_states:
            buffer.ids = ids
        elif self._embeddings.rows is not None:
            self._embeddings.rows.take(ids, axis=0, out=buffer.state_halves[:count], mode="clip")
        else:
            with torch.inference_mode():
                embeddings = self._embeddings.computed(ids.reshape(batch, tokens))
                buffer.states[:count].copy_(embeddings.view(count, -1))

    def send(self, batch: int, tokens: int) -> None:
        """Copy what `fill` wrote to the device, in stream order."""
        buffer, count = self._host_buffers[0], batch * tokens
        with_states = self._with_states and not buffer.pending
        used = self._states_at + (count * self._state_bytes if with_states else 0)
        self._device_memory[:used].copy_(buffer.memory[:used], non_blocking=True)
        if buffer.sent is not None:
            buffer.sent.record()
        if buffer.pending:
            self._look_up(buffer.pending, self._sources)
        elif not self._with_states and self._embeddings.address:
            ids = torch.from_numpy(buffer.ids.astype(np.int32)).pin_memory()
            self._ids[:count].copy_(ids, non_blocking=True)
            self._look_up(count, self._id_sources)
        elif not self._with_states:
            self._embeddings.put(buffer.ids, self.hidden[:count])

    def _look_up(self, rows: int, sources: torch.Tensor) -> None:
        """Look up embeddings on the device, for tokens whose ids are at these device addresses."""
        device = self.hidden.device
        if self._embed is None:
            self._embed = norm_rope.embed_kernel(device)
        launch = norm_rope.embed(self._embed, rows, self._embeddings.address, sources, self.hidden)
        launch(torch.cuda.current_stream(device).cuda_stream)


class _HostBuffer:
    """A host buffer of `Inputs`: its memory, the parts of that, and the block table last written for each row."""

    def __init__(
        self, memory: torch.Tensor, parts: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], spare_page: int
    ) -> None:
        self.memory = memory
        sources, lengths, offsets, table, self.states = parts(memory)
        self.sources, self.lengths, self.offsets = sources.numpy(), lengths.numpy(), offsets.numpy()
        self.table, self.state_halves = table.numpy(), self.states.view(torch.int16).numpy()
        self.table[:] = spare_page
        self.written: list[list[int]] = [[] for _ in range(len(lengths))]
        self.pending = 0
        self.ids: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        # Recorded after its last copy to the device.
        self.sent = torch.cuda.Event() if memory.is_pinned() else None  # type: ignore[no-untyped-call]
