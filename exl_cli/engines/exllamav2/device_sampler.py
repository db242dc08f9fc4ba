"""Chooses tokens on the GPU, behind the forward pass that gave their logits: see `kernels/sample.cu`.

The CPU's sampler says what is chosen; this one takes its settings and state. What it leaves to the CPU is in
`DeviceSampler.begin`.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.exllamav2.forward_pass import Chosen, Draw
from exl_cli.engines.exllamav2.kernels import compiler, sample
from exl_cli.engines.exllamav2.kernels.compiler import Kernel
from exl_cli.engines.sampling.dry import BoolArray
from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.errors import EngineError

_log = logging.getLogger(__name__)

# Biases and bans of a row; one with more is left to the CPU.
_MOST_EDITS = 1024
# Log-probabilities asked for; tokens equal to the last one take the rest of `sample.MOST_TOP`.
_MOST_LOGPROBS = 32
# Different masks of tokens that are kept on the device.
_MOST_MASKS = 64


class Seat:
    """A sequence's place in the device's memory, from `begin` to `end`.

    Attributes:
        index: which one.
        sampler: the sequence's.
        row: its settings, as the kernel reads them.
        count: how many of the likeliest tokens have their log-probabilities reported; None for no log-probabilities.
        masks: what the row's masks are read from.
        known: tokens of its history that are on the device.
        needs_history: whether the kernel reads that.
    """

    def __init__(self, index: int, sampler: Sampler, count: int | None) -> None:
        self.index, self.sampler, self.count = index, sampler, count
        self.row = sample.row(sampler.settings, sampler.seed)
        self.known = 0
        self.masks: list[torch.Tensor] = []
        settings = sampler.settings
        self.needs_history = (
            settings.token_repetition_penalty != 1.0
            or settings.token_presence_penalty != 0.0
            or settings.token_frequency_penalty != 0.0
            or settings.dry_multiplier > 0.0
        )


class _Launch:
    """The CPU's side of what a launch reads and writes.

    Attributes:
        rows, row_array: settings, as memory and as structures.
        chosen, chosen_array: the tokens.
        edits: ids and biases, int32, shape (2, seats, `_MOST_EDITS`).
        drawn: each seat with the length of its history.
    """

    def __init__(self, seats: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.rows = torch.zeros(seats * ctypes.sizeof(sample.Row), dtype=torch.uint8, pin_memory=pinned)
        self.row_array = (sample.Row * seats).from_address(self.rows.data_ptr())
        self.chosen = torch.zeros(seats * ctypes.sizeof(sample.Chosen), dtype=torch.uint8, pin_memory=pinned)
        self.chosen_array = (sample.Chosen * seats).from_address(self.chosen.data_ptr())
        self.edits = torch.zeros((2, seats, _MOST_EDITS), dtype=torch.int32, pin_memory=pinned)
        self.drawn: list[tuple[Seat, int]] = []


class DeviceSampler:
    """Chooses the tokens of up to `seats` sequences.

    Args:
        device: where the logits are.
        seats: sequences at a time.
        columns: logits of a position.
        longest: tokens of the longest sequence.

    Attributes:
        why_not: why the kernel cannot be used, once that is known; empty where it can.
    """

    def __init__(self, device: torch.device, seats: int, columns: int, longest: int) -> None:
        self._device, self._columns = device, columns
        self._free = [*range(seats)]
        self._kernel: Kernel | None = None
        self.why_not = ""
        compiler.begin(sample.FILE, [{}], device)
        self._longest = longest
        # Of each seat, from its first use on.
        self._histories: dict[int, torch.Tensor] = {}
        self._rows_there = torch.empty(seats * ctypes.sizeof(sample.Row), dtype=torch.uint8, device=device)
        self._chosen_there = torch.empty(seats * ctypes.sizeof(sample.Chosen), dtype=torch.uint8, device=device)
        self._edits_there = torch.empty((2, seats, _MOST_EDITS), dtype=torch.int32, device=device)
        # Two: while the device works on one launch, the next is written.
        self._idle = deque([_Launch(seats, device) for _ in range(2)])
        self._launched: deque[_Launch] = deque()
        self._scratch: torch.Tensor | None = None
        self._masks: dict[bytes, torch.Tensor] = {}
        self._argument = sample.SampleArgument()

    def begin(self, sampler: Sampler, request: Request) -> Seat | None:
        """Take a sequence in; None where the CPU has to sample it.

        That is with tail-free sampling and with skew, which need the candidates in order, and with more than 512 biases
        or 32 log-probabilities.
        """
        if sample.why_not(sampler.settings) or not self._free or (request.logprobs or 0) > _MOST_LOGPROBS:
            return None
        if len(sampler.edits(0, ())) > _MOST_EDITS // 2 or not self._compiled():
            return None
        seat = Seat(self._free.pop(), sampler, request.logprobs)
        row, history = seat.row, self._histories.get(seat.index)
        if history is None:
            history = torch.zeros(self._longest + 1, dtype=torch.int32, device=self._device)
            self._histories[seat.index] = history
        row.history = history.data_ptr()
        row.top_logprobs = 0 if seat.count is None else seat.count + 1
        if sampler.settings.dry_multiplier > 0:
            row.breakers = self._mask(sampler.breakers, seat)
        if sampler.settings.xtc_probability > 0:
            row.is_protected = self._mask(sampler.protected, seat)
        return seat

    def _compiled(self) -> bool:
        """Whether the kernel is there, for which this waits."""
        if self._kernel is None and not self.why_not:
            try:
                self._kernel = Kernel(sample.FILE, sample.NAME, {}, self._device, sample.SHARED_BYTES)
            except EngineError as error:
                self.why_not = error.message
                _log.info("tokens are chosen on the CPU: %s", self.why_not)
        return not self.why_not

    def end(self, seat: Seat) -> None:
        """Let a sequence go."""
        self._free.append(seat.index)

    def launch(self, logits: torch.Tensor, places: Sequence[int], draws: Sequence[Draw]) -> None:
        """Choose tokens, in order with what runs on the current stream; `collect` gets them.

        Args:
            logits: float32, shape (rows, columns), contiguous.
            places: the row of each draw's logits.
            draws: at most one of each seat.
        """
        vocab = draws[0].seat.sampler.vocab_size
        launch = self._idle.popleft()
        self._launched.append(launch)
        launch.drawn.clear()
        edited = scratch = False
        for index, (place, draw) in enumerate(zip(places, draws, strict=True)):
            seat, length = draw.seat, len(draw.ids) + draw.pending
            row, edits = seat.row, seat.sampler.edits(length, draw.banned)
            if seat.needs_history and seat.known < length:
                # What the CPU has chosen, or computed before.
                late = torch.tensor(draw.ids[seat.known : length], dtype=torch.int32).pin_memory()
                self._histories[seat.index][seat.known : length].copy_(late, non_blocking=True)
            seat.known = length + 1
            row.logits, row.length, row.edits, row.bits = place, length, len(edits), seat.sampler.bits
            row.next = row.history + 4 * length
            if edits:
                ids, biases = launch.edits[0, index], launch.edits[1, index].view(torch.float32)
                ids.numpy()[: len(edits)] = [*edits]
                biases.numpy()[: len(edits)] = [*edits.values()]
                row.edited, row.biases = (self._edits_there[side, index].data_ptr() for side in (0, 1))
                edited = True
            scratch |= bool(edits) or seat.needs_history
            launch.row_array[index] = row
            launch.drawn.append((seat, length))
        size = len(draws) * ctypes.sizeof(sample.Row)
        self._rows_there[:size].copy_(launch.rows[:size], non_blocking=True)
        if edited:
            self._edits_there[:, : len(draws)].copy_(launch.edits[:, : len(draws)], non_blocking=True)
        if scratch and (self._scratch is None or len(self._scratch) < len(draws)):
            rows = 1 << (len(draws) - 1).bit_length()
            self._scratch = torch.empty((rows, 2, vocab), dtype=torch.float32, device=self._device)
        if self._kernel is None:
            raise RuntimeError("a sequence without a seat is sampled")
        argument = self._argument
        argument.logits, argument.rows = logits.data_ptr(), self._rows_there.data_ptr()
        argument.chosen, argument.columns, argument.vocab = self._chosen_there.data_ptr(), self._columns, vocab
        argument.scratch = None if self._scratch is None else self._scratch.data_ptr()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._kernel.bind((len(draws),), sample.THREADS, argument)(stream)
        size = len(draws) * ctypes.sizeof(sample.Chosen)
        launch.chosen[:size].copy_(self._chosen_there[:size], non_blocking=True)

    def collect(self) -> list[Chosen | None]:
        """The tokens of the first launch that has not been collected, which has ended.

        None for one that the CPU has to choose, which says why.
        """
        launch = self._launched.popleft()
        self._idle.append(launch)
        tokens: list[Chosen | None] = []
        for (seat, length), chosen in zip(launch.drawn, launch.chosen_array, strict=False):
            if chosen.token == sample.FAILED or chosen.top > sample.MOST_TOP:
                seat.known = length
                tokens.append(None)
                continue
            seat.sampler.observe(chosen.prob)
            tokens.append(Chosen(chosen.token, None if seat.count is None else _logprobs(chosen, seat.count)))
        return tokens

    def reset(self) -> None:
        """Forget launches that nobody will collect; the device has ended all."""
        self._idle.extend(self._launched)
        self._launched.clear()

    def _mask(self, mask: BoolArray, seat: Seat) -> int:
        """The address of a mask's bits on the device, for as long as the seat is taken."""
        padded = np.zeros(-(-len(mask) // 32) * 32, dtype=np.bool_)
        padded[: len(mask)] = mask
        key = np.packbits(padded, bitorder="little").tobytes()
        bits = self._masks.get(key)
        if bits is None:
            if len(self._masks) >= _MOST_MASKS:
                self._masks.clear()
            bits = self._masks[key] = torch.frombuffer(bytearray(key), dtype=torch.uint8).to(self._device)
        seat.masks.append(bits)
        return bits.data_ptr()


def _logprobs(chosen: sample.Chosen, count: int) -> TokenLogprobs:
    """As `token_logprobs` gives them."""
    top = sorted(zip(chosen.logits[: chosen.top], chosen.ids[: chosen.top], strict=True), reverse=True)[:count]
    return TokenLogprobs(
        chosen.token, chosen.logit - chosen.total, tuple((id_, logit - chosen.total) for logit, id_ in top)
    )
