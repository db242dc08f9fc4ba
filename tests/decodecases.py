"""Steps of decoding with known answers, from the projections on: norms, rotary embedding, paged cache, attention.

Random sequences lie scattered over pages; all memory that a step must not read is NaN.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exl_cli.engines.exllamav2.kernels import decode_attention, norm_rope

TOLERANCE = 2e-3
LENGTHS = (0, 1, 15, 16, 17, 255, 256, 257, 600)
_NAN = float("nan")
_EPSILON = 1e-6


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        lengths: positions of each sequence before it.
        tokens: new ones of each.
        turned: how much of a head turns; 0 for all.
        normed: whether heads are normed.
        scattered: whether what comes out goes to places in another order.
        rounds_up: whether averages that are 65,504 exceed it by the rounding of their weights.
    """

    lengths: tuple[int, ...]
    tokens: int = 1
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    turned: int = 0
    normed: bool = False
    window: int = 0
    softcap: float = 0.0
    page_size: int = 256
    scattered: bool = False
    rounds_up: bool = False
    seed: int = 0


def round_up(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Plant what `Step.rounds_up` says: in the last dims, which need not turn, of queries and keys by their position.

    Every sixteenth key scores 0, the others slightly more than where a weight of 1/2 is rounded up to the next float16.
    """
    dim = q.shape[-1]
    q[..., -2:] = dim**0.5
    q[..., :-2], k[:], v[:] = 0, 0, 65504
    k[torch.arange(len(k)) % 16 > 0, :, -2:] = torch.tensor([-1418 / 2048, -0.00024]).to(k)


def random_step(rng: random.Random, head_dim: int, tiles: int, page_size: int, longest: int) -> Step:
    """A step whose queries fill one or two tiles of eight for a KV head."""
    while True:
        tokens, groups = rng.randint(1, 4), rng.choice([1, 2, 4, 5, 8, 16])
        if 8 * (tiles - 1) < tokens * groups <= 8 * tiles:
            break
    kv_heads = rng.choice([1, 2, 3])
    lengths = tuple(
        rng.choice(LENGTHS) if rng.random() < 0.6 else rng.randint(0, longest) for _ in range(rng.choice([1, 1, 2, 3]))
    )
    return Step(
        lengths,
        tokens,
        groups * kv_heads,
        kv_heads,
        head_dim,
        turned=rng.choice([0, 0, 0, head_dim // 2, head_dim * 3 // 4, 10]),
        normed=rng.random() < 0.4,
        window=rng.choice([0, 0, 0, 1, 3, 16, 40, 300]),
        softcap=rng.choice([0.0, 0.0, 20.0]),
        page_size=page_size,
        scattered=rng.random() < 0.5,
        seed=rng.randint(0, 1 << 30),
    )


class Memory:
    """A step's tensors, the argument of the kernel for them, and what should come of it."""

    def __init__(self, step: Step, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(step.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).half()

        def poison(*shape: int) -> Tensor:
            return torch.full(shape, _NAN, dtype=torch.float16)

        self.step = step
        batch, tokens, heads, kv_heads, dim = len(step.lengths), step.tokens, step.heads, step.kv_heads, step.head_dim
        turned = step.turned or dim
        width = (heads + 2 * kv_heads) * dim
        rows = poison(batch * tokens, width + 8)
        rows[:, :width] = normal(batch * tokens, width) * 2
        positions = max(step.lengths) + tokens
        angles = torch.outer(torch.arange(float(positions)), 10000.0 ** (-torch.arange(0, turned, 2) / turned))
        sine, cosine = (table.repeat(1, 2).half() for table in (angles.sin(), angles.cos()))
        weights = [normal(count, dim) if step.normed else None for count in (heads, kv_heads)]

        owned = [-(-(length + tokens) // step.page_size) for length in step.lengths]
        pages = torch.randperm(sum(owned) + 2, generator=generator).tolist()
        cache = poison(2, len(pages), step.page_size, kv_heads, dim)
        # Behind a sequence's own pages the table names one that holds nothing but poison.
        table = torch.full((batch, max(owned) + 1), pages.pop(), dtype=torch.int32)
        self.past: list[Tensor] = []
        for index, length in enumerate(step.lengths):
            past = normal(2, length, kv_heads, dim)
            if step.rounds_up:
                new = rows[index * tokens : index * tokens + tokens, :width].view(tokens, -1, dim)
                whole = torch.cat((past[0], new[:, heads : heads + kv_heads]))
                round_up(new[:, :heads], whole, new[:, heads + kv_heads :])
                past[0], past[1], new[:, heads : heads + kv_heads] = whole[:length], 65504, whole[length:]
            self.past.append(past)
            for place in range(owned[index]):
                table[index, place] = page = pages.pop()
                part = past[:, place * step.page_size : (place + 1) * step.page_size]
                cache[:, page, : part.shape[1]] = part

        self.qkv, self.cache, self.sine, self.cosine = rows, cache, sine, cosine
        self.q_weight, self.k_weight = weights
        self.table, self.lengths = table, torch.tensor(step.lengths, dtype=torch.int32)
        # A row more than there are, to show that it is left alone.
        self.out = poison(batch * tokens + 1, heads * dim)
        order = torch.randperm(heads * dim, generator=generator)
        self.places = order.to(torch.int16) if step.scattered else None
        self._expect()
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def _expect(self) -> None:
        """In float64, with an explicit mask."""
        step = self.step
        batch, tokens, heads, kv_heads, dim = len(step.lengths), step.tokens, step.heads, step.kv_heads, step.head_dim
        projected = self.qkv[:, : (heads + 2 * kv_heads) * dim].view(batch, tokens, -1, dim).double()
        q, k, v = projected.split([heads, kv_heads, kv_heads], 2)
        if self.q_weight is not None and self.k_weight is not None:
            q, k = (
                t * (t.square().mean(-1, keepdim=True) + _EPSILON).rsqrt() * weight.double()
                for t, weight in ((q, self.q_weight), (k, self.k_weight))
            )
        turned = step.turned or dim
        self.expected = torch.empty((batch, tokens, heads, dim), dtype=torch.float64)
        self.expected_cache = self.cache.double()
        for index, length in enumerate(step.lengths):
            at = torch.arange(length, length + tokens)
            cosine, sine = (table[at][:, None].double() for table in (self.cosine, self.sine))

            def rotated(t: Tensor, cosine: Tensor = cosine, sine: Tensor = sine) -> Tensor:
                part = t[..., :turned]
                half = torch.cat((-part[..., turned // 2 :], part[..., : turned // 2]), -1)
                return torch.cat((part * cosine + half * sine, t[..., turned:]), -1)

            new = torch.stack((rotated(k[index]), v[index]))
            pages = self.table[index].long()[at // step.page_size]
            self.expected_cache[:, pages, at % step.page_size] = new
            keys, values = torch.cat((self.past[index].double(), new), 1).repeat_interleave(heads // kv_heads, 2)
            scores = torch.einsum("qhd,khd->hqk", rotated(q[index]), keys) * dim**-0.5
            if step.softcap:
                scores = torch.tanh(scores / step.softcap) * step.softcap
            key, query = torch.arange(length + tokens), at[:, None]
            hidden = key > query
            if step.window:
                hidden |= key <= query - step.window
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            self.expected[index] = torch.einsum("hqk,khd->qhd", weights, values)

    def rope(self) -> norm_rope.RopeArgument:
        """The kernel's argument but for attention."""
        step = self.step
        weights = [None if weight is None else weight.data_ptr() for weight in (self.q_weight, self.k_weight)]
        return norm_rope.RopeArgument(
            qkv=self.qkv.data_ptr(), sine=self.sine.data_ptr(), cosine=self.cosine.data_ptr(),
            lengths=self.lengths.data_ptr(), table=self.table.data_ptr(), keys=self.cache[0].data_ptr(),
            values=self.cache[1].data_ptr(), q_weight=weights[0], k_weight=weights[1], epsilon=_EPSILON,
            heads=step.heads, kv_heads=step.kv_heads, head_dim=step.head_dim, turned=self.sine.shape[1],
            tokens=step.tokens, stride=self.qkv.stride(0), table_stride=self.table.stride(0),
            page_size=step.page_size,
        )  # fmt: skip

    def argument(self, least: int, rows: int) -> decode_attention.AttentionArgument:
        """The kernel's whole argument, with a poisoned workspace of so many rows."""
        step = self.step
        device = self.out.device
        self._workspace = [torch.full((rows, width), _NAN, device=device) for width in (step.head_dim, 2)]
        self.arrived = torch.zeros(len(step.lengths) * step.kv_heads, dtype=torch.int32, device=device)
        argument = decode_attention.AttentionArgument(
            rope=self.rope(), out=self.out.data_ptr(), parts=self._workspace[0].data_ptr(),
            marks=self._workspace[1].data_ptr(), arrived=self.arrived.data_ptr(), groups=step.heads // step.kv_heads,
            window=step.window, least=least, places=None if self.places is None else self.places.data_ptr(),
        )  # fmt: skip
        argument.scale, argument.softcap = decode_attention.factors(step.head_dim**-0.5, step.softcap)
        return argument

    def error(self) -> float:
        """The worst relative L2 error of a sequence's output; infinite where other memory is not as it should be."""
        cache, expected = self.cache.double(), self.expected_cache
        written = ~expected.isnan()
        if not torch.equal(written, ~cache.isnan()):
            return float("inf")
        # What was there stays as it was; new keys are rounded.
        np.testing.assert_allclose(cache[0][written[0]].cpu(), expected[0][written[0]].cpu(), rtol=2e-3, atol=2e-3)
        assert torch.equal(cache[1][written[1]], expected[1][written[1]])
        assert bool(self.out[-1].isnan().all())
        out = self.out[:-1] if self.places is None else self.out[:-1, self.places.long()]
        got = out.view(self.expected.shape).double()
        error = (got - self.expected).flatten(1).norm(dim=1) / self.expected.flatten(1).norm(dim=1)
        return float(error.nan_to_num(torch.inf).max())
