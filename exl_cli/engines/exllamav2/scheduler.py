"""Continuous (in-flight) batching over a paged KV cache.

A step collects the forward pass in flight, takes a token for each of its sequences, and submits the next pass before
returning, so the GPU computes while the caller detokenizes. Every pass includes all running sequences. If the device
samples the tokens itself, the next pass is submitted even before the one in flight is collected.

Admission: first come, first served, once a pass has room and there are pages for the prompt plus a margin for every
sequence. Further pages are allocated as decoding proceeds.

Preemption: when pages run out, the youngest sequence goes back into the queue. Its full pages stay in the prefix cache
until they are evicted; later it recomputes whatever is missing. Its sampler and output are kept. The oldest sequence is
never preempted, so all requests finish.

Prefill: prompts are computed in chunks between the others' decode steps, several prompts in one pass. A prompt that
begins like one in that pass waits for the next, to reuse the pages of the common prefix.

RoPE switches: beyond certain lengths some models compute all of a sequence differently (LongRoPE, Ding et al. 2024,
arXiv 2402.13753: one length; "dynamic" scaling: many). A sequence that grows beyond one is recomputed, as transformers
does for Phi 3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.exllamav2.block_manager import Allocation, BlockManager, Root
from exl_cli.engines.exllamav2.draft_length import AcceptanceRate
from exl_cli.engines.exllamav2.forward_pass import PENDING, Chosen, Draw, ModelRunner, ScheduledTokens
from exl_cli.engines.exllamav2.sequence import Sequence
from exl_cli.engines.exllamav2.speculation import Drafter, DraftTokens, Speculation
from exl_cli.engines.output_tokens import OutputTokens
from exl_cli.engines.response import Step
from exl_cli.engines.sampling.sampler import Sampler
from exl_cli.errors import EngineError, PromptError, param

# Tokens prefilled per step while nothing is decoding.
CHUNK = 2048
# While other sequences decode and wait for it, as many tokens are prefilled per step as make it take PAUSE seconds, but
# at least CHUNK_BESIDE_DECODE: fewer take hardly less time. By tokens per step, on an H200 with a GPTQ 7B, measured
# before chunks were of whole blocks:
#
# |                                                  | 256     | 512     | 1,024  | 2,048  |
# |--------------------------------------------------|---------|---------|--------|--------|
# | 20 requests/s of 64 to 1,500 + 128 tokens:       |         |         |        |        |
# | first token after ms, median and 99 %            | 89, 175 | 48, 115 | 36, 94 | 35, 76 |
# | between tokens ms, median and 99 %               | 3.5, 19 | 3.0, 22 | 2.6, 29 | 2.6, 41 |
# | 64 requests of 256 + 256 at once, new tokens/s   | 6,648   | 7,765   | 8,303  | 8,828  |
CHUNK_BESIDE_DECODE = 256
PAUSE = 0.06
# Admit a request only if every sequence can grow by this fraction of a page: being preempted at once wastes a prefill.
_PAGE_AHEAD = 1 / 4

_arrival = attrgetter("arrival")
_log = logging.getLogger(__name__)

_NO_DRAFT = DraftTokens((), 0, AcceptanceRate(0.0))

Logits = npt.NDArray[np.float32]

# A request's id, with a step, the exception that ended it, or None at its end.
Outcome = tuple[int, "Step | Exception | None"]


class _InFlight(NamedTuple):
    """A sequence's part of a forward pass in flight."""

    sequence: Sequence
    row: ScheduledTokens
    draft: DraftTokens
    allocation: Allocation


class Scheduler:
    """Runs sequences on one model. Not thread-safe: an engine thread steps it.

    Args:
        runner: runs the model; not shared. After one of its methods raised, the next call is `synchronize`, and then
            `prefill` and `submit` must work again.
        sampler: makes the sampler of a request.
        outputs: makes the `OutputTokens` of a request; None if it needs none.
        score: log-probabilities of prompt tokens; see `Samplers.prompt_logprobs`.
        drafter: source of draft tokens; None to decode without speculation.
        chunk: most tokens prefilled per step.
        chunk_beside_decode: fewest while others decode; as many more as the GPU does in PAUSE seconds.
        clock: current time in seconds.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Callable[[Request], Sampler],
        *,
        outputs: Callable[[Request], OutputTokens | None] = lambda request: None,
        score: Callable[[Request, int, Logits], list[TokenLogprobs]] = lambda request, begin, logits: [],
        drafter: Drafter | None = None,
        chunk: int = CHUNK,
        chunk_beside_decode: int = CHUNK_BESIDE_DECODE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._sampler, self._outputs, self._score = sampler, outputs, score
        self._chunk = chunk
        self._chunk_beside_decode = self._least_chunk = min(chunk, chunk_beside_decode)
        self._prefill_began: tuple[float, int] | None = None  # of the prefill in flight: time and tokens
        self._clock = clock
        self._blocks = BlockManager(runner.pages, runner.page_size, runner.copy_page)
        self._arrivals = itertools.count()
        self._sequences: dict[int, Sequence] = {}
        # Both in order of arrival.
        self._waiting: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._running: list[Sequence] = []
        self._in_flight: deque[list[_InFlight]] = deque()  # the pass to collect next, and perhaps one ahead of it
        self._full = False  # whether the first waiting request got no pages, and none were released since
        self._outcomes: list[Outcome] = []
        self._speculation = (
            None if drafter is None else Speculation(drafter, runner.max_batch, runner.max_tokens, clock)
        )

    @property
    def num_allocated_pages(self) -> int:
        """Pages held by sequences."""
        return self._blocks.num_allocated

    def check(self, request: Request, max_new_tokens: int) -> None:
        """Raise PromptError for a request that would not fit even alone. Thread-safe."""
        needed, capacity = len(request.ids) + max_new_tokens - 1, self._blocks.count * self._blocks.size
        if needed > capacity:
            raise PromptError(
                f"prompt and response may need {needed:,} tokens, but the KV cache holds {capacity:,}",
                f"shorten the prompt, lower {param('max_new_tokens')} or raise {param('max_seq_len')}",
            )

    def add(self, request_id: int, request: Request, max_new_tokens: int) -> None:
        """Queue a request that `check` accepted.

        Args:
            request_id: identifies it in `cancel` and in the outcomes of `step`.
            request: the request; the caller handles its stop strings.
            max_new_tokens: most new tokens; with 0 it ends after its prompt.
        """
        sampler, started = self._sampler(request), self._clock()
        ids = [*request.ids]
        sequence = Sequence(request_id, request, max_new_tokens, sampler, ids, next(self._arrivals), started)
        sequence.num_to_prefill = sequence.num_reused_tokens = len(ids)
        sequence.rope_switches = self._runner.rope_switches
        sequence.outputs = self._outputs(request)
        self._sequences[request_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: int) -> None:
        """End a sequence and free its pages, without an outcome from `step`. Ignored if it has ended.

        A pass in flight may still write to its pages, but in stream order before any new owner does.
        """
        if sequence := self._sequences.get(request_id):
            self._end(sequence)
            self._outcomes.pop()

    def step(self) -> list[Outcome]:
        """Advance all sequences. A failed forward pass ends all prefilling and running sequences with its exception."""
        try:
            self._submit_ahead()
            self._collect()
            if not self._in_flight:
                self._submit(busy=self._prefill())
        except Exception as error:  # affects all sequences in the pass
            self._fail(error)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def reset(self) -> None:
        """End all requests and clear the prefix cache."""
        error = EngineError("the model was asked for logits", "start the generation again")
        for sequence in [*self._waiting]:
            self._end(sequence, error)
        self._fail(error)
        self._blocks.reset()
        if self._speculation is not None:
            self._speculation.reset()

    # --- the parts of a step --------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Wait for the oldest pass in flight, and extend its sequences."""
        if not self._in_flight:
            return
        since = self._clock()
        logits: Logits = self._runner.collect().numpy()
        in_flight = self._in_flight.popleft()
        if self._speculation is not None:
            self._speculation.collected(since)
        self._adapt_chunk()
        drawn = self._runner.chosen() or itertools.repeat(None)
        for part, its_logits, chosen in zip(in_flight, logits, drawn, strict=False):
            # Skip sequences that ended or were preempted since (then they have another allocation, or none).
            if part.allocation is part.sequence.allocation and not part.sequence.ended:
                self._extend(part, its_logits, chosen)
        self._finish_prefill()

    def _extend(self, part: _InFlight, logits: Logits, drawn: Chosen | None) -> None:
        """Append the token that the device sampled, or else sample one token plus one per accepted draft token."""
        sequence, row, draft, _ = part
        if drawn is None and self._in_flight:
            # The device could not sample, and the pass submitted ahead has overwritten the logits.
            sequence.leave_to_cpu = True
            self._recompute(sequence)
            return
        ids, stops, outputs = sequence.ids, sequence.request.stop_ids, sequence.outputs
        chosen: list[int] = []
        taken_back = False
        error: Exception | None = None
        try:
            for place in range(len(row.ids)):
                if place and chosen[-1] != row.ids[place]:
                    break  # the draft token at this position was rejected, so its logits are invalid
                if drawn is not None:
                    token, logprobs = drawn
                else:
                    ruled_out = outputs.ruled_out(len(ids)) if outputs else ()
                    token = sequence.sampler.sample(logits[place], ids, ruled_out)
                    logprobs = outputs.logprobs(logits[place], token) if outputs else None
                chosen.append(token)
                ids.append(token)
                taken_back = outputs is not None and outputs.take(ids, logprobs)
                if taken_back or chosen[-1] in stops or not sequence.max_new_tokens_left:
                    break
        except Exception as raised:  # concerns this sequence's logits or settings only
            error = raised
        sequence.num_computed_tokens = len(ids) - 1
        self._blocks.mark_computed(sequence.blocks, sequence.num_computed_tokens)
        step = Step(tuple(chosen))
        if self._speculation is not None:
            step = self._speculation.outcome(sequence, draft, chosen)
        ended = error is not None or (not taken_back and (chosen[-1] in stops or not sequence.max_new_tokens_left))
        if outputs:
            token_ids, released = outputs.release(ended=ended)
            step = dataclasses.replace(step, token_ids=token_ids, logprobs=released)
        if chosen or self._speculation is not None:
            self._outcomes.append((sequence.id, step))
        if ended:
            self._end(sequence, error)
        elif taken_back or sequence.rope_table != sequence.wanted_rope_table:
            self._recompute(sequence)

    def _recompute(self, sequence: Sequence) -> None:
        """Return a sequence to the queue, in order of arrival, to prefill whatever the prefix cache does not hold.

        That is everything after a RoPE switch, and little after a rewind.
        """
        (self._prefilling if sequence in self._prefilling else self._running).remove(sequence)
        self._release_seat(sequence)
        self._full = False
        self._blocks.free(sequence.blocks)
        sequence.allocation = None
        sequence.num_computed_tokens, sequence.num_to_prefill = 0, len(sequence.ids)
        if not sequence.answering:
            sequence.prompt_logprobs.clear()
        insort(self._waiting, sequence, key=_arrival)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages for older ones. No decode step is in flight.

        A prefill in flight may still write to its pages, but in stream order before any new owner does.
        """
        _log.info("no page of the KV cache is free: request %d waits", sequence.id)
        if self._speculation is not None:
            self._speculation.end(sequence)
        self._recompute(sequence)

    def _prefill(self) -> bool:
        """Prefill up to one chunk of tokens, of one or more prompts; complete prompts start decoding.

        Returns:
            Whether the device is still busy with it.
        """
        block = self._runner.prefill_block
        budget = max(self._chunk_beside_decode if self._running else self._chunk, block)
        while budget >= block:
            self._admit(budget)
            if not self._prefilling:
                break
            began, before, rows = self._clock(), budget, []
            for sequence in self._prefilling:
                begin, left = sequence.num_computed_tokens, sequence.num_prompt_tokens_left
                count = left if left <= budget else budget // block * block
                if not count:
                    continue
                self._blocks.grow(sequence.blocks, begin + count)
                ids = tuple(sequence.ids[begin : begin + count])
                row = ScheduledTokens(ids, begin, sequence.blocks.block_table, sequence.rope_table)
                if sequence.request.prompt_logprobs is None or sequence.answering:
                    rows.append(row)
                else:
                    self._score_chunk(sequence, row)
                sequence.num_computed_tokens += count
                budget -= _rounded_up(count, block)
            if rows:
                self._runner.prefill(*rows)
                self._prefill_began = began, before - budget
            if rows and self._running and (budget < block or not self._can_admit):
                return True  # the decode step submitted next is collected after it
            self._runner.synchronize()
            self._adapt_chunk()
            self._finish_prefill()
        return False

    def _adapt_chunk(self) -> None:
        """Adapt the chunk beside decoding to the time of a prefill and of the decode step after it, if any."""
        if self._prefill_began is None:
            return
        (began, count), self._prefill_began = self._prefill_began, None
        seconds, least = self._clock() - began, self._least_chunk
        if count >= least and seconds > 0:
            self._chunk_beside_decode = max(least, min(int(count * PAUSE / seconds) // least * least, self._chunk))

    def _score_chunk(self, sequence: Sequence, row: ScheduledTokens) -> None:
        """Prefill tokens in passes that return logits, for prompt log-probabilities."""
        for at in range(0, len(row.ids), self._runner.max_tokens):
            ids, start = row.ids[at : at + self._runner.max_tokens], row.start + at
            self._runner.submit([dataclasses.replace(row, ids=ids, start=start)])
            logits: Logits = self._runner.collect().numpy()
            sequence.prompt_logprobs += self._score(sequence.request, start, logits[0])

    @property
    def _can_admit(self) -> bool:
        """Whether a request waits, a pass has room for it, and there may be pages."""
        room = self._runner.max_batch - len(self._running) - len(self._prefilling)
        return bool(self._waiting) and not self._full and room > 0

    def _admit(self, budget: int) -> None:
        """Allocate pages for waiting requests, until the prompts have as many tokens to prefill as the budget."""
        block = self._runner.prefill_block
        left = budget - sum(_rounded_up(sequence.num_prompt_tokens_left, block) for sequence in self._prefilling)
        while left >= block and self._can_admit and not self._awaits_prefix(self._waiting[0]):
            # Before allocating: that may copy a page, and if the copy fails, `_fail` must end this sequence too.
            sequence = self._waiting.pop(0)
            self._prefilling.append(sequence)
            sequence.rope_table = sequence.wanted_rope_table
            while not self._allocate(sequence):
                youngest = max([*self._running, *self._prefilling], key=_arrival)
                if youngest is sequence:
                    self._prefilling.remove(sequence)
                    self._waiting.insert(0, sequence)
                    self._full = True
                    return
                self._preempt(youngest)
            sequence.num_computed_tokens = sequence.blocks.num_reused_tokens
            sequence.num_reused_tokens = min(sequence.num_reused_tokens, sequence.num_computed_tokens)
            left -= _rounded_up(sequence.num_prompt_tokens_left, block)

    def _awaits_prefix(self, sequence: Sequence) -> bool:
        """Whether the next page of a prompt being prefilled is one that the sequence could reuse."""
        if sequence.request.prompt_logprobs is not None and not sequence.answering:
            return False
        for other in self._prefilling:
            begin = other.blocks.num_cached_pages * self._blocks.size
            end = begin + self._blocks.size
            if end < min(len(other.ids), len(sequence.ids)) and sequence.ids[begin:end] == other.ids[begin:end]:
                same_root = sequence.request.cache_salt == other.request.cache_salt
                if same_root and sequence.ids[:begin] == other.ids[:begin]:
                    return True
        return False

    def _allocate(self, sequence: Sequence) -> bool:
        """Allocate pages for a sequence's known tokens, if that leaves the margin of _PAGE_AHEAD for all sequences."""
        positions = min(len(sequence.ids), sequence.max_tokens)
        root = Root(sequence.rope_table, sequence.request.cache_salt)
        reuse = sequence.request.prompt_logprobs is None or sequence.answering
        spare = 0
        if others := [other for other in (*self._running, *self._prefilling) if other is not sequence]:
            wanted = (self._pages_ahead(other) - other.blocks.num_pages for other in others)
            spare = sum(max(pages, 0) for pages in wanted)
            spare += self._pages_ahead(sequence) - self._blocks.pages_for(positions)
        sequence.allocation = self._blocks.allocate(sequence.ids, positions, root, reuse=reuse, spare=spare)
        return sequence.allocation is not None

    def _pages_ahead(self, sequence: Sequence) -> int:
        """Pages of a sequence after growing by _PAGE_AHEAD."""
        tokens = len(sequence.ids) + int(_PAGE_AHEAD * self._blocks.size)
        return self._blocks.pages_for(min(tokens, sequence.max_tokens))

    def _finish_prefill(self) -> None:
        """Account for prefilled tokens once the device has finished; complete prompts start decoding."""
        for sequence in [*self._prefilling]:
            self._blocks.mark_computed(sequence.blocks, sequence.num_computed_tokens)
            if not sequence.num_prompt_tokens_left:
                self._start_decoding(sequence)

    def _start_decoding(self, sequence: Sequence) -> None:
        """Report a complete prompt, and have its sequence decode from the next step on."""
        # No speculation with banned strings, which may rewind the sequence.
        if self._speculation is not None and sequence.draft is None and not sequence.request.banned_strings:
            self._speculation.begin(sequence)
        if not sequence.answering:
            step = Step(
                prompt_seconds=self._clock() - sequence.started,
                reused_tokens=sequence.num_reused_tokens,
                prompt_logprobs=tuple(sequence.prompt_logprobs),
            )
            self._outcomes.append((sequence.id, step))
            sequence.answering = True
        if not sequence.max_new_tokens_left:
            self._end(sequence)
            return
        self._prefilling.remove(sequence)
        # Sample on the device, except with speculation, which verifies draft tokens on the CPU one by one.
        if self._runner.sampler is not None and self._speculation is None and not sequence.leave_to_cpu:
            sequence.seat = self._runner.sampler.begin(sequence.sampler, sequence.request)
        insort(self._running, sequence, key=_arrival)

    def _grow(self) -> None:
        """Allocate pages for each running sequence's next token, preempting younger ones if needed, and for drafts."""
        done = 0
        while done < len(self._running):
            sequence = self._running[done]
            if self._blocks.grow(sequence.blocks, len(sequence.ids)):
                done += 1
            else:
                self._preempt(max([self._running[-1], *self._prefilling], key=_arrival))
        if self._speculation is not None and self._running:
            most = self._speculation.most_draft_tokens(len(self._running))
            for sequence in self._running:
                if sequence.draft is not None:
                    wanted = len(sequence.ids) + max(min(most, sequence.max_draft_tokens), 0)
                    self._blocks.grow(sequence.blocks, wanted)

    def _submit(self, *, busy: bool) -> None:
        """Submit the next decode step of all running sequences; `busy` if a prefill is still in flight."""
        self._grow()
        if not self._running:
            return
        drafts: Iterable[DraftTokens] = itertools.repeat(_NO_DRAFT)
        if self._speculation is not None:
            drafts = self._speculation.draft(self._running, busy=busy)
        in_flight = []
        for sequence, draft in zip(self._running, drafts, strict=False):
            blocks, start = sequence.blocks, sequence.num_computed_tokens
            ids = (sequence.ids[start], *draft.tokens[: draft.used])
            row = ScheduledTokens(ids, start, blocks.block_table, sequence.rope_table)
            in_flight.append(_InFlight(sequence, row, draft, blocks))
        self._runner.submit([part.row for part in in_flight], [self._draw(part.sequence) for part in in_flight])
        self._in_flight.append(in_flight)

    def _submit_ahead(self) -> None:
        """Submit the decode step after the one in flight, with the tokens that the device is about to sample.

        The GPU then does not wait for the CPU between steps. Some sequences may turn out to have ended with the pending
        token; their part of this pass is discarded.
        """
        if len(self._in_flight) != 1 or not self._runner.pends or self._prefilling or self._can_admit:
            return
        in_flight, draws = [], []
        for part in self._in_flight[0]:
            sequence = part.sequence
            if sequence.ended or sequence.max_new_tokens_left < 2:
                continue
            length = len(sequence.ids) + 1
            if not self._can_run_ahead(sequence, length) or not self._blocks.grow(sequence.blocks, length):
                return
            row = ScheduledTokens((PENDING,), length - 1, sequence.blocks.block_table, sequence.rope_table)
            in_flight.append(_InFlight(sequence, row, _NO_DRAFT, sequence.blocks))
            draws.append(Draw(sequence.seat, sequence.ids, (), pending=True))
        if in_flight:
            self._runner.submit([part.row for part in in_flight], draws)
            self._in_flight.append(in_flight)

    @staticmethod
    def _can_run_ahead(sequence: Sequence, length: int) -> bool:
        """Whether a decode step can be submitted before the CPU knows the sequence's next token."""
        return (
            sequence.seat is not None
            # The CPU needs to see the token for these.
            and not sequence.request.banned_strings
            and not sequence.request.sampling.mirostat
            and bisect_left(sequence.rope_switches, length) == sequence.rope_table
        )

    @staticmethod
    def _draw(sequence: Sequence) -> Draw | None:
        if sequence.seat is None:
            return None
        ids, outputs = sequence.ids, sequence.outputs
        return Draw(sequence.seat, ids, outputs.ruled_out(len(ids)) if outputs else ())

    def _release_seat(self, sequence: Sequence) -> None:
        if sequence.seat is not None and self._runner.sampler is not None:
            self._runner.sampler.end(sequence.seat)
        sequence.seat = None

    # --- ends -----------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, error: Exception | None = None) -> None:
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        elif sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if self._speculation is not None:
            self._speculation.end(sequence)
        self._release_seat(sequence)
        self._full = False
        if sequence.allocation is not None:
            self._blocks.free(sequence.allocation)
        sequence.ended = True
        del self._sequences[sequence.id]
        self._outcomes.append((sequence.id, error))

    def _fail(self, error: Exception) -> None:
        """After a failed forward pass, end all prefilling and running sequences."""
        self._in_flight.clear()
        self._prefill_began = None
        for sequence in [*self._running, *self._prefilling]:
            self._end(sequence, error)
        with contextlib.suppress(Exception):  # the same error again
            self._runner.synchronize()


def _rounded_up(count: int, block: int) -> int:
    return -(-count // block) * block
