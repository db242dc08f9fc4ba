"""Samples tokens on the GPU, right after the forward pass that computes their logits, with `kernels/sample.cu`.

The distribution is that of the CPU's `Sampler`, whose settings and state it uses. `DeviceSampler.begin` lists what is
left to the CPU.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

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

# Biases and bans of a row. `begin` accepts half as many, so that bans of a single position have room beside them.
_MOST_EDITS = 1024
# Top log-probabilities per token. The other half of `sample.MOST_TOP` is room for ties with the last of them.
_MOST_LOGPROBS = 32
# Different token masks cached on the device.
_MOST_MASKS = 64


class Seat:
    """A sequence's slot in the sampler, from `begin` to `end`.

    Attributes:
        index: number of the slot.
        sampler: the sequence's sampler.
        row: its settings as the kernel reads them.
        count: number of top log-probabilities to report; None for no log-probabilities at all.
        masks: the tensors that `row` points to, kept alive.
        known: number of tokens of the history that are on the device.
        host_token: address of the token last chosen in page-locked host memory, which any GPU can read.
        end: recorded after that, by the caller of `launch`.
    """

    def __init__(self, index: int, sampler: Sampler, count: int | None) -> None:
        self.index, self.sampler, self.count = index, sampler, count
        self.row = sample.row(sampler.settings, sampler.seed)
        self.known = self.host_token = 0
        self.end: Any = None
        self.masks: list[torch.Tensor] = []


class _Launch:
    """What a launch reads and writes in host memory, which a GPU accesses itself: that takes less time than copies.

    Attributes:
        rows, row_array: settings, as bytes and as structures.
        chosen, chosen_array: results, likewise.
        edits: token ids and the bits of their float32 biases, int32, shape (2, seats, `_MOST_EDITS`).
        drawn: each seat with the length of its history before the token.
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
    """Samples for up to `seats` sequences.

    Args:
        device: where the logits are.
        seats: most sequences at a time.
        columns: logits per position, padding included.
        longest: tokens of the longest possible sequence.
        launches: most that are not collected at a time.

    Attributes:
        why_not: why the kernel cannot be used, once that is known; empty otherwise.
    """

    def __init__(self, device: torch.device, seats: int, columns: int, longest: int, launches: int = 2) -> None:
        self._device, self._columns = device, columns
        self._free = [*range(seats)]
        self._kernel: Kernel | None = None
        self.why_not = ""
        compiler.begin(sample.FILE, [{}], device)
        self._longest = longest
        # By seat, allocated on its first use.
        self._histories: dict[int, torch.Tensor] = {}
        # The CPU fills one while the device may still use the others.
        self._idle = deque([_Launch(seats, device) for _ in range(launches)])
        self._launched: deque[_Launch] = deque()
        self._scratch: torch.Tensor | None = None
        self._meetings = torch.zeros(seats * sample.MEETING_BYTES, dtype=torch.uint8, device=device)
        self._processors = 1
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._masks: dict[bytes, torch.Tensor] = {}
        self._argument = sample.SampleArgument()

    def begin(self, sampler: Sampler, request: Request) -> Seat | None:
        """Assign a seat to a sequence; None if the CPU has to sample it.

        The CPU samples with tail-free sampling or skew, which need sorted candidates, with more than 512 biases or 32
        top log-probabilities, and if all seats are taken or the kernel cannot be compiled.
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
        """Load the kernel, waiting for its compilation; returns whether it can be used."""
        if self._kernel is None and not self.why_not:
            try:
                self._kernel = Kernel(sample.FILE, sample.NAME, {}, self._device, sample.SHARED_BYTES)
            except EngineError as error:
                self.why_not = error.message
                _log.info("tokens are chosen on the CPU: %s", self.why_not)
        return not self.why_not

    def end(self, seat: Seat) -> None:
        """Release a seat."""
        self._free.append(seat.index)

    def launch(self, logits: torch.Tensor, places: Sequence[int], draws: Sequence[Draw]) -> None:
        """Sample on the current stream, asynchronously; `collect` returns the tokens.

        Args:
            logits: float32, shape (rows, columns), contiguous.
            places: for each draw, its row of the logits.
            draws: at most one per seat.
        """
        vocab = draws[0].seat.sampler.vocab_size
        launch = self._idle.popleft()
        self._launched.append(launch)
        launch.drawn.clear()
        scratch = False
        for index, (place, draw) in enumerate(zip(places, draws, strict=True)):
            seat, length = draw.seat, len(draw.ids) + draw.pending
            row, edits = seat.row, seat.sampler.edits(length, draw.banned)
            if seat.sampler.reads_history and seat.known < length:
                # The kernel appends the tokens it chooses itself. The prompt and tokens chosen on the CPU are copied.
                late = torch.tensor(draw.ids[seat.known : length], dtype=torch.int32).pin_memory()
                self._histories[seat.index][seat.known : length].copy_(late, non_blocking=True)
            seat.known = length + 1  # the kernel writes the new token to `row.next`
            row.logits, row.length, row.edits, row.bits = place, length, len(edits), seat.sampler.bits
            row.next = row.history + 4 * length
            if edits:
                ids, biases = launch.edits[0, index], launch.edits[1, index].view(torch.float32)
                ids.numpy()[: len(edits)] = [*edits]
                biases.numpy()[: len(edits)] = [*edits.values()]
                row.edited, row.biases = ids.data_ptr(), biases.data_ptr()
            scratch |= bool(edits) or seat.sampler.reads_history
            launch.row_array[index] = row
            seat.host_token = launch.chosen.data_ptr() + index * ctypes.sizeof(sample.Chosen)
            launch.drawn.append((seat, length))
        if scratch and (self._scratch is None or len(self._scratch) < len(draws)):
            rows = 1 << (len(draws) - 1).bit_length()
            self._scratch = torch.empty((rows, 2, vocab), dtype=torch.float32, device=self._device)
        if self._kernel is None:
            raise RuntimeError("a sequence without a seat is sampled")
        argument = self._argument
        argument.logits, argument.rows = logits.data_ptr(), launch.rows.data_ptr()
        argument.chosen, argument.columns, argument.vocab = launch.chosen.data_ptr(), self._columns, vocab
        argument.meetings = self._meetings.data_ptr()
        argument.scratch = None if self._scratch is None else self._scratch.data_ptr()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        parts = sample.parts(len(draws), vocab, self._processors)
        self._kernel.bind((parts, len(draws)), sample.THREADS, argument)(stream)

    def collect(self) -> list[Chosen | None]:
        """Return the tokens of the oldest launch not yet collected, which must have completed.

        None for a token that the CPU has to sample, or raise an error for: there is no candidate, a logit is not
        finite, or more tokens tie among the top log-probabilities than there is room for.
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
        """Discard launches that will not be collected; the device must be idle."""
        self._idle.extend(self._launched)
        self._launched.clear()

    def _mask(self, mask: BoolArray, seat: Seat) -> int:
        """Copy a mask to the device, a bit per token, and keep it there for the seat; returns its address."""
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
    # `total` is the log of the sum of exponentials, so a logit less `total` is a log-probability.
    top = sorted(zip(chosen.logits[: chosen.top], chosen.ids[: chosen.top], strict=True), reverse=True)[:count]
    return TokenLogprobs(
        chosen.token, chosen.logit - chosen.total, tuple((id_, logit - chosen.total) for logit, id_ in top)
    )
