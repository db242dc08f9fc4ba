"""Forward passes of a model on the GPU, as the scheduler asks for them: see `ModelRunner`."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exl_cli.engines.exllamav2 import fused_forward, layers
from exl_cli.engines.exllamav2.attention.paged import Backend
from exl_cli.engines.exllamav2.build_model import experts_captured, rope_offsets, rope_switches
from exl_cli.engines.exllamav2.device_sampler import DeviceSampler
from exl_cli.engines.exllamav2.forward_pass import Chosen, Draw, ScheduledTokens
from exl_cli.engines.exllamav2.graphs import Graphs
from exl_cli.engines.exllamav2.kernels import quantized_linear
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.engines.exllamav2.support import too_old
from exl_cli.errors import EngineError

_LEAST_KEYS = 1024
# Through our own kernels so many small passes take less time than a large one, which unpacks all weights first.
_FEW_PASSES = 3
# Embeddings of a prompt that are looked up before they are copied: so few that they stay in the processor's cache.
_LOOKED_UP = 256
# Bytes: no kernel asks for more.
_ALIGNMENT = 256
_NO_TOKENS = ScheduledTokens((), 0, [])
_log = logging.getLogger(__name__)


class GpuForward:
    """A loaded model with its cache: a `ModelRunner`.

    Args:
        model, cache: exllamav2's; the cache holds a page more than `pages`.
        pages: pages that the scheduler may use.
        page_size: positions in a page.
        backend: gives the backend of attention; called when the kernels for everything else are there.

    Attributes:
        cache: exllamav2's.
        small: computes passes of few tokens.
        why_not_fused: why that is not our own kernels; empty where it is.
        backend: computes attention.
    """

    max_batch = quantized_linear.MOST_ROWS
    max_tokens = quantized_linear.MOST_ROWS

    def __init__(self, model: Any, cache: Any, pages: int, page_size: int, backend: Callable[[], Backend]) -> None:
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
        # What a pass gives, on its device, and what the CPU gets of it.
        self._scores = torch.empty((self.max_tokens, self.vocab_size), dtype=torch.float32, device=self._last)
        self._logits = torch.empty((0, self.vocab_size), dtype=torch.float32)
        self.sampler: DeviceSampler | None = None
        if self._device == self._last and not too_old(self._device):
            self.sampler = DeviceSampler(self._device, self.max_batch, self.vocab_size, self._most_keys)
        self._drawn: list[int] = []  # rows of the pass whose tokens are chosen on the device
        self._chosen: list[Chosen | None] = []
        # Views of it, by the rows asked for, the longest one's tokens, and the tokens computed of each.
        self._views: dict[tuple[int, int, int], torch.Tensor] = {}
        self._asked = (0, 0, 0)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending = False

    def rope_table(self, tokens: int) -> int:
        """See `ScheduledTokens`; of a sequence of so many tokens."""
        return bisect_left(self.rope_switches, tokens)

    @property
    def captures(self) -> bool:
        """Whether small passes become CUDA graphs, as far as is known: a capture may still fail."""
        return self._graphs.usable

    @property
    def why_not_captured(self) -> str:
        """What a capture failed with; empty where none did."""
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
        """See `ModelRunner.prefill`."""
        self._enter()
        most = self.max_tokens
        if len(row.ids) <= (most if self.why_not_fused else _FEW_PASSES * most):
            for first in range(0, len(row.ids), most):
                ids = row.ids[first : first + most]
                self._pass([ScheduledTokens(ids, row.start + first, row.block_table, row.rope_table)])
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
        """See `ModelRunner.synchronize`."""
        for device in {self._device, self._last}:
            torch.cuda.synchronize(device)
        self._pending = False

    def submit(self, rows: Sequence[ScheduledTokens], draws: Sequence[Draw | None] = ()) -> None:
        """See `ModelRunner.submit`."""
        self._asked = (len(rows), *self._pass(rows, draws))

    @torch.inference_mode()
    def collect(self) -> torch.Tensor:
        """See `ModelRunner.collect`."""
        self._done.synchronize()
        self._pending = False
        self._chosen = []
        if self.sampler is not None and self._drawn:
            self._chosen = [None] * self._asked[0]
            for index, chosen in zip(self._drawn, self.sampler.collect(), strict=True):
                self._chosen[index] = chosen
                if chosen is None:
                    self._logits[index].copy_(self._scores[index])
        view = self._views.get(self._asked)
        if view is None:
            rows, longest, tokens = self._asked
            view = self._logits[: rows * tokens].view(rows, tokens, -1)[:, :longest]
            self._views[self._asked] = view
        return view

    def chosen(self) -> Sequence[Chosen | None]:
        """See `ModelRunner.chosen`."""
        return self._chosen

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
        if small := self.__dict__.pop("small", None):
            small.close()
        self.sampler = None
        for name in ("_large", "_inputs", "_embeddings", "_logits", "_scores", "_views", "_model", "cache"):
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

    def _pass(self, rows: Sequence[ScheduledTokens], draws: Sequence[Draw | None] | None = None) -> tuple[int, int]:
        """Run rows as one small pass; returns the tokens of the longest row and how many it computes of each.

        With `draws`, even none, what follows is wanted: see `submit`.

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
        if draws is not None:
            self._follow(len(rows), tokens, draws)
        if self._last != self._device:
            # The event that is recorded next is of the first GPU's stream.
            torch.cuda.synchronize(self._last)
        self._done.record(self._stream)
        self._pending = True
        self._graphs.capture()
        return longest, tokens

    @torch.inference_mode()
    def _run(self, batch: int, tokens: int, bound: int) -> None:
        """A pass over what lies in its inputs, of which there is no graph yet."""
        self._enter()
        count = batch * tokens
        scores = self._scores[:count]

        def work() -> None:
            inputs = self._inputs
            inputs.send(batch, tokens)
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
    def _follow(self, rows: int, tokens: int, draws: Sequence[Draw | None]) -> None:
        """Choose tokens from the pass's logits, or have these copied to the CPU."""
        count = rows * tokens
        if len(self._logits) < count:
            self._views.clear()
            size = 1 if count == 1 else self.max_tokens
            self._logits = torch.empty((size, self.vocab_size), dtype=torch.float32, pin_memory=True)
        self._drawn = []
        if self.sampler is not None and tokens == 1:
            self._drawn = [index for index, draw in enumerate(draws) if draw is not None]
        if not self._drawn:
            self._logits[:count].copy_(self._scores[:count], non_blocking=True)
            return
        for index in {*range(rows)}.difference(self._drawn):
            self._logits[index].copy_(self._scores[index], non_blocking=True)
        if self.sampler is not None:
            self.sampler.launch(self._scores, self._drawn, [draw for draw in draws if draw is not None])


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


class Embeddings:
    """Embeddings of tokens, looked up on the CPU, where exllamav2 leaves them.

    exllamav2 0.3.2 looks up all of a prompt's, into memory that is new each time, and copies that through the driver's
    own buffer: on an H100's host the first layer of 2,048 tokens began after six milliseconds, and begins after four
    now. A lookup in NumPy takes two microseconds, in torch forty, and the GPU waits for it.

    Args:
        module: exllamav2's embedding module.
        device: where embeddings of prompts are wanted.

    Attributes:
        rows: the table of embeddings, two bytes a number, shape (vocabulary, hidden); None where an embedding is more
            than its row.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module, self._device = module, device
        params, weight = module.archparams, module.embedding.weight
        plain = not (params.residual_stream_fp32 or params.normalize_embeddings) and weight.is_contiguous()
        self.rows: npt.NDArray[np.int16] | None = None
        if plain and weight.device.type == "cpu" and weight.dtype == torch.half:
            self.rows = weight.detach().view(torch.int16).numpy()
        # Two, each with the event of its last copy: while one is copied, the other is written.
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        on_gpu = device.type == "cuda"
        for _ in range(0 if self.rows is None else 2):
            buffer = torch.empty((_LOOKED_UP, weight.shape[1]), dtype=torch.half, pin_memory=on_gpu)
            event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
            self._buffers.append((buffer, event))

    def computed(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """The embeddings of tokens, shape (batch, tokens), by exllamav2 on the CPU; they get a dimension more."""
        embeddings: torch.Tensor = self._module.forward(torch.from_numpy(ids))
        return embeddings

    def of(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """The embeddings of a prompt's tokens, in order with what the current stream does.

        Args:
            ids: shape (tokens,).

        Returns:
            Shape (1, tokens, hidden), on the device.
        """
        if self.rows is None:
            return self.computed(ids[None]).to(self._device)
        states = torch.empty((len(ids), self.rows.shape[1]), dtype=torch.half, device=self._device)
        for index, target in enumerate(torch.split(states, _LOOKED_UP)):
            buffer, copied = self._buffers[index % len(self._buffers)]
            if copied is not None:
                copied.synchronize()
            source, some = buffer[: len(target)], ids[index * _LOOKED_UP : index * _LOOKED_UP + len(target)]
            # In the default mode NumPy would write to a temporary array first.
            self.rows.take(some, axis=0, out=source.view(torch.int16).numpy(), mode="clip")
            target.copy_(source, non_blocking=True)
            if copied is not None:
                copied.record()
        return states[None]


class Inputs:
    """Lengths, block tables and embeddings of a small pass, filled on the CPU and copied to the device in one go.

    They lie at addresses that never change, for CUDA graphs.

    Args:
        embeddings: of the model.
        hidden: numbers of an embedding.
        dtype: of the stream of hidden states.
        most_rows, most_tokens: sequences, and tokens of all of them together, of one pass.
        table_width: pages of the longest sequence, and one more for tokens that only fill up a pass.
        spare_page: a page that is nobody's.
        rope_offsets: see `build_model.rope_offsets`.
        device: where the pass runs.

    Attributes:
        hidden: on the device, shape (most_tokens, hidden).
        lengths: int32 on the device, shape (most_rows,): positions in the cache before the pass.
        rope_offsets: int32 on the device, shape (most_rows,): how many rows further each sequence's rotary table lies.
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
        # The numbers come first, all of them: a few bytes too many take less time than a second copy.
        numbers = most_rows * (2 + table_width)
        self._states_at = -(-4 * numbers // _ALIGNMENT) * _ALIGNMENT
        size = self._states_at + most_tokens * self._state_bytes
        self._here = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self._there = torch.empty(size, dtype=torch.uint8, device=device)

        def parts(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
            whole = memory[: 4 * numbers].view(torch.int32)
            table = whole[2 * most_rows :].view(most_rows, table_width)
            states = memory[self._states_at :].view(dtype).view(most_tokens, hidden)
            return whole[:most_rows], whole[most_rows : 2 * most_rows], table, states

        lengths, offsets, table, self._states = parts(self._here)
        self._lengths, self._offsets, self._table = lengths.numpy(), offsets.numpy(), table.numpy()
        self._state_halves = self._states.view(torch.int16).numpy()
        # The block table that each row was written from.
        self._written: list[list[int]] = [[] for _ in range(most_rows)]
        self._table[:] = spare_page
        self.lengths, self.rope_offsets, self.block_table, self.hidden = parts(self._there)

    def fill(self, rows: Sequence[ScheduledTokens], batch: int, tokens: int) -> None:
        """Write rows where `send` will find them.

        Args:
            rows: at most `batch`.
            batch: sequences of the pass; those that are not there have no past and live on the spare page.
            tokens: of each; behind the end of a row's block table its tokens live on the spare page, too.
        """
        count = batch * tokens
        ids = np.zeros(count, dtype=np.int64)
        for index in range(batch):
            row = rows[index] if index < len(rows) else _NO_TOKENS
            begin = index * tokens
            ids[begin : begin + len(row.ids)] = row.ids
            self._lengths[index] = row.start
            self._offsets[index] = self._rope_offsets[row.rope_table]
            # As a rule it is what it was for the pass before.
            if self._written[index] != row.block_table:
                self._table[index] = self._spare_page
                self._table[index, : len(row.block_table)] = row.block_table
                self._written[index] = [*row.block_table]
        if self._embeddings.rows is not None:
            self._embeddings.rows.take(ids, axis=0, out=self._state_halves[:count], mode="clip")
        else:
            with torch.inference_mode():
                embeddings = self._embeddings.computed(ids.reshape(batch, tokens))
                self._states[:count].copy_(embeddings.view(count, -1))

    def send(self, batch: int, tokens: int) -> None:
        """Copy to the device what `fill` wrote, in order with what runs there. May be captured in a graph."""
        used = self._states_at + batch * tokens * self._state_bytes
        self._there[:used].copy_(self._here[:used], non_blocking=True)
