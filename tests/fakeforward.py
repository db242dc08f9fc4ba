"""A model that is a hash function, behind a KV cache that is really paged: errors in who reads and writes where show.

What a pass writes into the cache is a token, its position and a hash of all tokens up to it, as keys and values depend
on all of them; what it reads back, through the row's table, is the whole sequence so far, and the logits are a function
of just that. So a test knows every token without any cache.
"""

from __future__ import annotations

import dataclasses
import random
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from exl_cli.engines.base import Request
from exl_cli.engines.exllamav2.forward_pass import PENDING, Chosen, Draw, ScheduledTokens
from exl_cli.engines.sampling.sampler import Sampler

_MASK = (1 << 61) - 1
_TABLE = 12345  # by how much the beginnings of states of different rotary tables differ


def _mixed(state: int, token: int) -> int:
    """A state that depends on all tokens so far."""
    state = (state * 6364136223846793005 + token * 1442695040888963407 + 1013904223) & _MASK
    return state ^ (state >> 29)


def _logits(state: int, vocab_size: int, spread: float) -> torch.Tensor:
    """One token far above the others, or, where `spread` is not 0, that many logits of similar height."""
    logits = torch.zeros(vocab_size)
    if spread:
        generator = torch.Generator().manual_seed(state)
        return torch.randn(vocab_size, generator=generator) * spread
    logits[state % vocab_size] = 50.0
    return logits


class FakeClock:
    """Seconds that pass only where something takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSampler:
    """A `TokenSampler`: the CPU's, at another time. It leaves tokens of an id below `fails` to the CPU."""

    def __init__(self, seats: int, *, pends: bool, fails: int = 10) -> None:
        self.seats, self.pends, self.fails = seats, pends, fails
        self.last: dict[Sampler, int] = {}

    def begin(self, sampler: Sampler, request: Request) -> Sampler | None:
        if not self.seats:
            return None
        self.seats -= 1
        return sampler

    def end(self, seat: Sampler) -> None:
        self.seats += 1

    def choose(self, draw: Draw, logits: torch.Tensor) -> Chosen | None:
        ids = [*draw.ids, self.last[draw.seat]] if draw.pending else draw.ids
        token = draw.seat.sample(logits.numpy(), ids, draw.banned)
        failed = token < self.fails
        self.last[draw.seat] = 96 if failed else token
        return None if failed else Chosen(token, None)


class FakeForward:
    """A `ModelRunner`.

    Args:
        memory: logits are a function of only the last so many tokens, so that texts repeat; 0 for all of them.
        spread: standard deviation of the logits; 0 for one that stands out.
        wrong: how many of a hundred logits are those of another model.
        clock: moves on by the time that passes take: `seconds` and for each token `growth` times as much.
        rope_switches, prefill_block: see `ModelRunner`.
        seats: sequences whose tokens it chooses itself; None for no sampler on the device.
        pends: see `ModelRunner`.
        fail: called with the name of each operation in the middle of it; may raise.
    """

    def __init__(
        self,
        *,
        page_size: int = 4,
        pages: int = 16,
        max_batch: int = 4,
        max_tokens: int = 8,
        vocab_size: int = 97,
        spread: float = 0.0,
        memory: int = 0,
        wrong: int = 0,
        clock: FakeClock | None = None,
        seconds: float = 1.0,
        growth: float = 0.05,
        rope_switches: Sequence[int] = (),
        prefill_block: int = 1,
        seats: int | None = None,
        pends: bool = False,
        fail: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.page_size, self.pages = page_size, pages
        self.max_batch, self.max_tokens, self.vocab_size = max_batch, max_tokens, vocab_size
        self.prefill_block = prefill_block
        self.rope_switches = rope_switches
        self.sampler = None if seats is None else FakeSampler(seats, pends=pends)
        self._chosen: list[Chosen | None] = []
        self._spread, self.memory, self._wrong, self.fail = spread, memory, wrong, fail
        self.clock, self.seconds, self.growth = clock or FakeClock(), seconds, growth
        self.prefill_seconds = 0.0
        self._behind = 0.0
        self._cache = [[(-1, -1, -1)] * page_size for _ in range(pages)]
        self._passes: list[tuple[torch.Tensor, list[Chosen | None], float]] = []
        self.ahead = 0  # passes that took tokens which the CPU had not seen
        self._returned: torch.Tensor | None = None
        self._garbage = random.Random(0)
        self.calls: list[str] = []
        self.rows: list[list[int]] = []
        self.prefilled: list[list[int]] = []
        self.computed = self.reached = 0
        self.copies = 0

    def prefill(self, *rows: ScheduledTokens) -> None:
        assert rows
        assert not self._passes, "prefill between submit and collect"
        self.calls.append("prefill")
        self.fail("prefill")
        self.prefilled.append([len(row.ids) for row in rows])
        owners = [row.block_table[at // self.page_size] for row in rows for at in self._pages_written(row)]
        assert len(owners) == len(set(owners)), "two rows write into one page"
        for row in rows:
            self._write(row)
        for row in rows:
            self._read(row)
            self._behind += self.prefill_seconds * len(row.ids)

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        self.fail("synchronize")
        self.clock.now += self._behind
        self._behind = 0.0
        self._passes.clear()

    @property
    def pends(self) -> bool:
        return self.sampler is not None and self.sampler.pends

    def submit(self, rows: Sequence[ScheduledTokens], draws: Sequence[Draw | None] = ()) -> None:
        if rows[0].ids == (PENDING,):
            assert len(self._passes) == 1
            self.ahead += 1
            rows = [
                dataclasses.replace(row, ids=(self.sampler.last[draw.seat],))
                for row, draw in zip(rows, draws, strict=True)
            ]
        else:
            assert not self._passes, "submit before collect"
        longest = max(len(row.ids) for row in rows)
        assert 0 < len(rows) <= self.max_batch
        assert len(rows) > 1 or longest <= self.max_tokens
        assert len(rows) * longest <= max(self.max_batch, self.max_tokens)
        if self._returned is not None:
            self._returned.fill_(float("nan"))
        self.calls.append("submit")
        self.rows.append([len(row.ids) for row in rows])
        owners = [row.block_table[at // self.page_size] for row in rows for at in self._pages_written(row)]
        assert len(owners) == len(set(owners)), "two rows write into one page"
        for row in rows:
            self._write(row)
        logits = torch.full((len(rows), longest, self.vocab_size), float("nan"))
        for index, row in enumerate(rows):
            for place, state in enumerate(self._read(row)):
                state += state % 100 < self._wrong
                logits[index, place] = _logits(state, self.vocab_size, self._spread)
        chosen: list[Chosen | None] = []
        if longest == 1 and any(draws):
            chosen = [draw and self.sampler.choose(draw, logits[index, 0]) for index, draw in enumerate(draws)]
            for index, one in enumerate(chosen):
                if one is not None:
                    logits[index] = float("nan")
        self._passes.append((logits, chosen, self.seconds * (1 + self.growth * sum(len(row.ids) for row in rows))))
        self.fail("submit")

    def collect(self) -> torch.Tensor:
        assert self._passes, "collect without submit"
        self.calls.append("collect")
        self.fail("collect")
        self._returned, self._chosen, takes = self._passes.pop(0)
        self.clock.now += takes + self._behind
        self._behind = 0.0
        if self._passes:
            self._returned.fill_(float("nan"))  # they are the next pass's by now
        return self._returned

    def chosen(self) -> Sequence[Chosen | None]:
        return self._chosen

    def copy_page(self, source: int, target: int) -> None:
        assert source != target
        self.fail("copy")
        self.copies += 1
        self._cache[target] = [*self._cache[source]]

    def _pages_written(self, row: ScheduledTokens) -> list[int]:
        end = row.start + len(row.ids)
        return [*range(row.start - row.start % self.page_size, end, self.page_size)]

    def _write(self, row: ScheduledTokens) -> None:
        assert row.ids
        assert row.start >= 0
        end = row.start + len(row.ids)
        assert len(row.block_table) * self.page_size >= end
        assert len(set(row.block_table)) == len(row.block_table)
        self.computed += len(row.ids)
        self.reached = max(self.reached, end)
        state = self._at(row, row.start - 1)[2] if row.start else _TABLE * row.rope_table
        assert row.rope_table >= bisect_left(self.rope_switches, end)
        for at, token in enumerate(row.ids, row.start):
            state = _mixed(state, token)
            self._cache[row.block_table[at // self.page_size]][at % self.page_size] = (token, at, state)
        while end % self.page_size:
            self._cache[row.block_table[end // self.page_size]][end % self.page_size] = (
                self._garbage.randrange(97),
                -1,
                -1,
            )
            end += 1

    def _at(self, row: ScheduledTokens, at: int) -> tuple[int, int, int]:
        return self._cache[row.block_table[at // self.page_size]][at % self.page_size]

    def _read(self, row: ScheduledTokens) -> list[int]:
        """The state after each of the row's tokens, from nothing but the cache."""
        tokens, state = [], _TABLE * row.rope_table
        for at in range(row.start + len(row.ids)):
            token, position, found = self._at(row, at)
            state = _mixed(state, token)
            assert position == at, f"position {at} holds what belongs to {position}"
            assert found == state, f"position {at} holds what belongs to another sequence"
            tokens.append(token)
        assert tuple(tokens[row.start :]) == row.ids
        return self.states(tokens, row.rope_table)[row.start :]

    def states(self, tokens: Sequence[int], rope_table: int = 0) -> list[int]:
        """What the logits at each of these positions are a function of."""
        found, state = [], _TABLE * rope_table
        for at, token in enumerate(tokens):
            if self.memory:
                state = _TABLE * rope_table
                for near in tokens[max(0, at + 1 - self.memory) : at]:
                    state = _mixed(state, near)
            state = _mixed(state, token)
            found.append(state)
        return found

    def expected(self, request: Request, limit: int) -> list[int]:
        """The new tokens of a request, without any cache."""
        sampler, ids = sampler_for(request, self.vocab_size), [*request.ids]
        while len(ids) < len(request.ids) + limit:
            table = bisect_left(self.rope_switches, len(ids))
            logits = _logits(self.states(ids, table)[-1], self.vocab_size, self._spread)
            ids.append(sampler.sample(logits.numpy(), ids))
            if ids[-1] in request.stop_ids:
                break
        return ids[len(request.ids) :]


def sampler_for(request: Request, vocab_size: int = 97) -> Sampler:
    """The real sampler, without a tokenizer."""
    return Sampler(request.sampling, request.seed, vocab_size=vocab_size)
