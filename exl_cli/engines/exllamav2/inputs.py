"""The inputs of forward passes: embeddings, lengths and block tables, from the CPU to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exl_cli.engines.exllamav2.build_model import rope_offsets
from exl_cli.engines.exllamav2.cuda_errors import wait
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.engines.exllamav2.kernels import norm_rope, quantized_linear
from exl_cli.engines.exllamav2.kernels.compiler import Kernel

# A pass over prompts treats each block of this many tokens like a sequence, so it can take prompts of any number and
# length. All keys and values are stored before any block attends.
PROMPT_BLOCK = 64
# Embeddings looked up per copy; few enough to stay in the CPU's cache.
_LOOKED_UP = 256
# Bytes; the strictest alignment any kernel needs.
_ALIGNMENT = 256
_NO_TOKENS = ScheduledTokens((), 0, [])


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
        memory: all of them, as bytes.
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
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._sources, self.lengths, self.rope_offsets, self.block_table, self.hidden = self._parts(self.memory)
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

    def size(self, tokens: int) -> int:
        """Bytes of `memory` that a pass of so many tokens uses."""
        return self._states_at + tokens * self._state_bytes

    def received(self, device: torch.device) -> Received:
        """Buffers for the same on another device, or for another stage."""
        return Received(torch.empty_like(self.memory, device=device), self._parts, self.size)

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
        self.memory[:used].copy_(buffer.memory[:used], non_blocking=True)
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


class Received:
    """What a later stage receives of `Inputs`, with the hidden states: the same attributes, on its device."""

    def __init__(
        self,
        memory: torch.Tensor,
        parts: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        size: Callable[[int], int],
    ) -> None:
        self.memory, self.size = memory, size
        _, self.lengths, self.rope_offsets, self.block_table, self.hidden = parts(memory)


class InputBuffers:
    """The inputs of passes of any size, in three sets of buffers: for few tokens, for many, and for prompts.

    Small passes have their own, as copying the block tables of 256 sequences takes a while.

    Args:
        model: exllamav2's.
        pages: pages that the scheduler may use; the next is the spare page.
        page_size: positions per page.
        device: of the first layer.

    Attributes:
        device: see above.
        embeddings: the model's.
        rope_offsets: see `build_model.rope_offsets`.
        most_keys: the longest sequence that the RoPE tables cover, in whole pages.
        table_keys: positions that a block table has room for: those, and a page for padding tokens.
        most_prompt_tokens: most tokens in a pass over prompts.
    """

    def __init__(self, model: Any, pages: int, page_size: int, device: torch.device) -> None:
        config, self.device = model.config, device
        self.embeddings = Embeddings(model.modules[0], device)
        self.rope_offsets = rope_offsets(model)
        self.most_keys: int = -(-config.max_seq_len // page_size) * page_size
        self.table_keys = self.most_keys + page_size
        most = max(quantized_linear.MOST_SEQUENCES, config.max_input_len // PROMPT_BLOCK * PROMPT_BLOCK)
        self.most_prompt_tokens: int = min(quantized_linear.MOST_TOKENS, most)
        dtype = torch.float if config.arch.lm.residual_stream_fp32 else torch.half

        def inputs(most_rows: int, most_tokens: int, *, with_states: bool = True) -> Inputs:
            return Inputs(
                self.embeddings, config.hidden_size, dtype, most_rows, most_tokens, self.table_keys // page_size,
                pages, self.rope_offsets, device, with_states=with_states,
            )  # fmt: skip

        self._few = inputs(quantized_linear.MOST_ROWS, quantized_linear.MOST_ROWS)
        self._many = inputs(quantized_linear.MOST_SEQUENCES, quantized_linear.MOST_SEQUENCES)
        self._prompts = inputs(self.most_prompt_tokens // PROMPT_BLOCK, self.most_prompt_tokens, with_states=False)

    def of(self, tokens: int) -> Inputs:
        """The inputs of a pass of this many tokens."""
        if tokens <= quantized_linear.MOST_ROWS:
            return self._few
        return self._many if tokens <= quantized_linear.MOST_SEQUENCES else self._prompts

    def received(self, device: torch.device) -> Callable[[int], Received]:
        """Allocate a later stage's buffers for them on its device; the result returns these as `of` does its own."""
        received = {id(inputs): inputs.received(device) for inputs in (self._few, self._many, self._prompts)}
        return lambda tokens: received[id(self.of(tokens))]


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
