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
        small: computes small passes, of up to `max_tokens` tokens.
        why_not_fused: why exl's own kernels do not compute small passes; empty if they do.
        backend: computes attention.
        failed: the error after the GPU hung. It cannot be used any more; even freeing memory would wait for it.
    """

    max_batch = min(quantized_linear.MOST_ROWS, memory.MOST_SEQUENCES)
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
        self._inputs = Inputs(
            self._embeddings, model.config.hidden_size, dtype, self.max_batch, self.max_tokens,
            self._most_keys // page_size + 1, pages, self._rope_offsets, self._device,
        )  # fmt: skip
        self._large = ModulesForward(model, cache, page_size)
        self.small, self.why_not_fused = self._choose()
        self.backend = backend()
        self.small.compile_ahead()
        self._graphs = Graphs(self.backend.captures and self._device == self._last)
        self._experts_captured = experts_captured(model)
        # The logits of a small pass on the device, and the CPU's copy.
        self._scores = torch.empty((self.max_tokens, self.vocab_size), dtype=torch.float32, device=self._last)
        self._logits = torch.empty((0, self.vocab_size), dtype=torch.float32)
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
        # Recorded after each small pass; `_unwaited` until the CPU knows that it has completed.
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._unwaited = False

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
                small = fused_forward.FusedForward(self._model, self.cache, self.page_size, self._inputs, self._large)
                reason = small.why_not()
            except EngineError as error:
                reason = error.message
            if not reason:
                return small, ""
        _log.info("small passes through exllamav2's modules: %s", reason)
        return self._large, reason

    @torch.inference_mode()
    def prefill(self, row: ScheduledTokens) -> None:
        self._enter()
        most = self.max_tokens
        if len(row.ids) <= (most if self.why_not_fused else _FEW_PASSES * most):
            for first in range(0, len(row.ids), most):
                ids = row.ids[first : first + most]
                self._pass([ScheduledTokens(ids, row.start + first, row.block_table, row.rope_table)])
                self._record()
            return
        self._await_inputs()
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
        self._unwaited = False
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
        self._unwaited = bool(self._passes)
        self._chosen = []
        if self.sampler is not None and asked.drawn:
            self._chosen = [None] * asked.rows
            for index, chosen in zip(asked.drawn, self.sampler.collect(), strict=True):
                self._chosen[index] = chosen
                if chosen is None and not self._passes:
                    self._logits[index].copy_(self._scores[index])
        key = (asked.rows, asked.longest, asked.tokens)
        view = self._views.get(key)
        if view is None:
            view = self._logits[: asked.rows * asked.tokens].view(asked.rows, asked.tokens, -1)[:, : asked.longest]
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
        for name in ("_large", "_inputs", "_embeddings", "_logits", "_scores", "_views", "_model", "cache"):
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

    def _enter(self) -> None:
        # The current stream is per thread, so set it in every thread that gets here.
        self._set_streams()
        torch.cuda.set_stream(self._stream)

    def _await_inputs(self) -> None:
        """Wait until the last small pass has read its inputs, whose memory is about to be reused."""
        if self._unwaited:
            self._wait(self._done)
            self._unwaited = False

    def _pass(self, rows: Sequence[ScheduledTokens], pending: Sequence[int] = ()) -> tuple[int, int]:
        """Start one small pass; returns the tokens of the longest row, and the tokens computed per row with padding.

        The GPU may be idle until the pass starts, so the common path, replaying a graph, makes as few calls of torch as
        possible. The caller calls `_record` afterwards. For `pending` see `Inputs.fill`.
        """
        longest, last = max(len(row.ids) for row in rows), max(row.start for row in rows)
        batch, tokens = _shape(len(rows), longest, self.max_tokens)
        if last + tokens > self._model.config.max_seq_len:
            tokens = longest  # learned position embeddings end with the context, so padding must not exceed it
        # There are graphs only for models on one GPU. They are launched on this thread's current stream.
        torch.cuda.set_stream(self._stream)
        self._inputs.fill(rows, batch, tokens, pending)
        self._inputs.send(batch, tokens)
        bound = _LEAST_KEYS
        while bound < last + tokens:
            bound *= 2
        bound = min(bound, self._most_keys + self.page_size)
        if not self._graphs.replay((batch, tokens, bound)):
            self._run(batch, tokens, bound)
        return longest, tokens

    def _record(self) -> None:
        """Mark the end of a small pass, and capture it if it is time."""
        if self._last != self._device:
            # The event below is recorded on the first GPU's stream, which does not wait for the last one.
            torch.cuda.synchronize(self._last)
        self._done.record(self._stream)
        self._unwaited = True
        self._graphs.capture()

    @torch.inference_mode()
    def _run(self, batch: int, tokens: int, bound: int) -> None:
        """Run a small pass on what is in `_inputs`, for which there is no graph yet."""
        self._enter()
        count = batch * tokens
        scores = self._scores[:count]

        def work() -> None:
            inputs = self._inputs
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
        if len(self._logits) < count:
            self._views.clear()
            size = 1 if count == 1 else self.max_tokens
            self._logits = torch.empty((size, self.vocab_size), dtype=torch.float32, pin_memory=True)
        drawn: list[int] = []
        if self.sampler is not None and tokens == 1:
            drawn = [index for index, draw in enumerate(draws) if draw is not None]
        if self.sampler is None or not drawn:
            self._logits[:count].copy_(self._scores[:count], non_blocking=True)
            return []
        for index in {*range(rows)}.difference(drawn):
            self._logits[index].copy_(self._scores[index], non_blocking=True)
        self.sampler.launch(self._scores, drawn, [draw for draw in draws if draw is not None])
        return drawn


def _shape(rows: int, tokens: int, most: int) -> tuple[int, int]:
    """Round rows and tokens up to powers of two if that fits into a pass, so that fewer CUDA graphs are needed."""
    batch, count = (1 << (n - 1).bit_length() for n in (rows, tokens))
    if batch * count <= most:
        return batch, count
    return (batch, tokens) if batch * tokens <= most else (rows, tokens)


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
        return states[None]


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
    ) -> None:
        self._embeddings, self._spare_page, self._rope_offsets = embeddings, spare_page, rope_offsets
        self._state_bytes = hidden * dtype.itemsize
        # Lengths, offsets and block tables come first and are copied whole: that takes less time than a second copy of
        # the parts in use. Rounded up, as 8-byte addresses follow.
        self._numbers = -(-most_rows * (2 + table_width) // 2) * 2
        self._shape = (most_rows, table_width, most_tokens, hidden, dtype)
        self._states_at = -(-(4 * self._numbers + 8 * most_rows) // _ALIGNMENT) * _ALIGNMENT
        size = self._states_at + most_tokens * self._state_bytes
        self._device_memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._sources, self.lengths, self.rope_offsets, self.block_table, self.hidden = self._parts(self._device_memory)
        pinned = device.type != "cpu"
        self._host_buffers = [
            _HostBuffer(torch.empty(size, dtype=torch.uint8, pin_memory=pinned), self._parts, spare_page)
            for _ in range(2)
        ]
        self._embed: Kernel | None = None

    def _parts(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, width, most_tokens, hidden, dtype = self._shape
        numbers = memory[: 4 * self._numbers].view(torch.int32)
        table = numbers[2 * rows : (2 + width) * rows].view(rows, width)
        sources = memory[4 * self._numbers :][: 8 * rows].view(torch.int64)
        states = memory[self._states_at :].view(dtype).view(most_tokens, hidden)
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
        elif self._embeddings.rows is not None:
            self._embeddings.rows.take(ids, axis=0, out=buffer.state_halves[:count], mode="clip")
        else:
            with torch.inference_mode():
                embeddings = self._embeddings.computed(ids.reshape(batch, tokens))
                buffer.states[:count].copy_(embeddings.view(count, -1))

    def send(self, batch: int, tokens: int) -> None:
        """Copy what `fill` wrote to the device, in stream order."""
        buffer = self._host_buffers[0]
        used = self._states_at + (0 if buffer.pending else batch * tokens * self._state_bytes)
        self._device_memory[:used].copy_(buffer.memory[:used], non_blocking=True)
        if buffer.sent is not None:
            buffer.sent.record()
        if buffer.pending:
            self._look_up(buffer.pending)

    def _look_up(self, rows: int) -> None:
        """Look up embeddings on the device, for tokens that the CPU does not know yet."""
        device = self.hidden.device
        if self._embed is None:
            self._embed = norm_rope.embed_kernel(device)
        launch = norm_rope.embed(self._embed, rows, self._embeddings.address, self._sources, self.hidden)
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
        # Recorded after its last copy to the device.
        self.sent = torch.cuda.Event() if memory.is_pinned() else None  # type: ignore[no-untyped-call]
