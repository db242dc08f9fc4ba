"""Paged attention cases with known results: random sequences in scattered pages, with unused memory poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from decodecases import round_up

from exl_cli.engines.exllamav2.attention.paged import Call, attend_paged

PAGE = 256
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        lengths: keys of each sequence, its new ones included.
        q_len: queries of each; the last ones.
        fresh: whether their keys and values come with the call, rather than being in the cache.
        rounds_up: see `decodecases.Step`.
    """

    lengths: tuple[int, ...]
    q_len: int = 1
    heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    window: int = 0
    softcap: float = 0.0
    fresh: bool = True
    rounds_up: bool = False
    seed: int = 0


class Built:
    """A case's tensors. `run` has `attend_paged` compute it; `check` says how far off that was."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).half().to(device)

        self.case = case
        batch, kv_heads, dim = len(case.lengths), case.kv_heads, case.dim
        self.q = normal(batch, case.q_len, case.heads, dim) * 2
        # As a fused projection leaves them: neighbours in one buffer, so that a row's stride is not its length.
        both = normal(batch, case.q_len, 2 * kv_heads, dim)
        self.k, self.v = both[:, :, :kv_heads], both[:, :, kv_heads:]
        self.sequences = [(normal(n, kv_heads, dim), normal(n, kv_heads, dim)) for n in case.lengths]
        if case.rounds_up:
            for row, (k, v) in enumerate(self.sequences):
                round_up(self.q[row], k, v)
                self.k[row], self.v[row] = k[-case.q_len :], v[-case.q_len :]
        owned = [-(-n // PAGE) for n in case.lengths]
        self.before = torch.full(
            (2, sum(owned) + 2, PAGE, kv_heads, dim), torch.nan, dtype=torch.float16, device=device
        )
        self.after = self.before.clone()
        pages = torch.randperm(sum(owned) + 2, generator=generator).tolist()
        # Past a sequence's own pages the table names one that holds nothing but poison.
        table = torch.full((batch, max(owned) + 2), pages.pop(), dtype=torch.int32)
        for row, (length, (k, v)) in enumerate(zip(case.lengths, self.sequences, strict=True)):
            k[length - case.q_len :], v[length - case.q_len :] = self.k[row], self.v[row]
            for index in range(owned[row]):
                table[row, index] = page = pages.pop()
                part = slice(index * PAGE, min(index * PAGE + PAGE, length))
                old = min(part.stop, length - case.q_len) if case.fresh else part.stop
                for side, values in enumerate((k, v)):
                    self.after[side, page, : part.stop - part.start] = values[part]
                    if old > part.start:
                        self.before[side, page, : old - part.start] = values[part.start : old]
        self.cache = self.before.clone()
        self.table = table.to(device)
        cached = [n - case.q_len if case.fresh else n for n in case.lengths]
        self.lengths = torch.tensor(cached, dtype=torch.int32, device=device)

    def call(self, max_len: int | None = None) -> Call:
        case = self.case
        k, v = (self.k, self.v) if case.fresh else (None, None)
        max_len = max_len or self.table.shape[1] * PAGE
        cache = self.cache[0], self.cache[1], self.lengths, self.table
        return Call(self.q, *cache, k, v, case.dim**-0.5, case.window, case.softcap, max_len)

    def run(self, max_len: int | None = None) -> torch.Tensor:
        return attend_paged(**self.call(max_len)._asdict())

    def check(self, out: torch.Tensor) -> float:
        """The worst relative L2 error of a sequence; infinite where the cache does not hold what it should."""
        # Compared as bits, in which one NaN is like another.
        if not torch.equal(self.cache.view(torch.int16), self.after.view(torch.int16)):
            return float("inf")
        worst = 0.0
        for row, (k, v) in enumerate(self.sequences):
            expected = attention(self.q[row], k, v, self.case)
            error = float((out[row].float() - expected).norm() / expected.norm())
            worst = max(worst, error if error == error else float("inf"))
        return worst


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    """Softmax attention in float32 with an explicit mask. Shapes (positions, heads, dim)."""
    groups = case.heads // case.kv_heads
    q, k, v = q.float(), k.float().repeat_interleave(groups, 1), v.float().repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * case.dim**-0.5
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    key = torch.arange(len(k), device=q.device)
    query = key[len(k) - len(q) :, None]
    hidden = key > query
    if case.window:
        hidden |= key <= query - case.window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
