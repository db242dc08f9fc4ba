"""Paged attention on a GPU: Triton and torch against float32 attention."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from pagedcases import PAGE, TOLERANCE, Built, Case

from exl_cli.engines.exllamav2.attention import paged
from exl_cli.errors import EngineError

# Calls that decode, by head_dim: each new combination of features has Triton compile for about a second.
DECODING = {64: 6, 80: 4, 96: 4, 128: 24, 256: 6}
HEADS = [(8, 2), (32, 8), (28, 4), (8, 1), (4, 4)]


@pytest.fixture(params=paged.NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(paged.VARIABLE, request.param)
    try:
        paged.backend()
    except EngineError as error:
        pytest.skip(str(error))
    return str(request.param)


def check(case: Case, max_len: int | None = None) -> None:
    built = Built(case, "cuda")
    assert built.check(built.run(max_len)) <= TOLERANCE, case


@pytest.mark.parametrize("dim", DECODING)
def test_decoding(name: str, dim: int) -> None:
    for seed in range(DECODING[dim]):
        rng = random.Random(1000 * dim + seed)
        heads, kv_heads = rng.choice(HEADS)
        q_len = rng.choice([1, 1, 1, 2, 5, 8, 16])
        longest = rng.choice([40, 300, 800, 3000])
        lengths = tuple(rng.randint(q_len, longest) for _ in range(rng.choice([1, 1, 2, 4, 16])))
        window = rng.choice([0, 0, 0, 1, 33, 600]) if dim == 128 else rng.choice([0, 70])
        softcap = rng.choice([0.0, 0.0, 0.0, 30.0]) if dim in (128, 256) else 0.0
        case = Case(lengths, q_len, heads, kv_heads, dim, window, softcap, rng.random() < 0.7, seed=seed)
        check(case, rng.choice([None, max(lengths)]))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 256, 257, 511, 512, 513])
def test_lengths_at_borders(name: str, length: int) -> None:
    check(Case((length, 1, PAGE)))


@pytest.mark.parametrize(
    "case",
    [
        Case((512,), 512, 32, 8),
        Case((2048,), 2048, 32, 8),
        Case((3000,), 1500, 8, 2),
        Case((2600,), 20, 8, 1),
        Case((1100, 17, 600), 17, 8, 2, fresh=False),
        Case((700, 333), 333, 28, 4),
        Case((1000,), 1000, 8, 8, 64),
        Case((900,), 300, 8, 2, 80),
        Case((900,), 300, 8, 8, 96),
        Case((1300,), 700, 8, 4, 256),
        Case((2000,), 1700, 8, 2, window=500),
        Case((2000,), 1000, 8, 4, 256, window=1024, softcap=50.0),
    ],
    ids=lambda case: f"{case.q_len} of {max(case.lengths)}, {case.heads}/{case.kv_heads} of {case.dim}",
)
def test_prompts(name: str, case: Case) -> None:
    check(case)


def test_a_prompt_in_chunks_is_the_whole_prompt(name: str) -> None:
    case = Case((2300,), 2300, 8, 2)
    whole, chunked = Built(case, "cuda"), Built(case, "cuda")
    expected, parts = whole.run(), []
    q, k, v = chunked.q, chunked.k, chunked.v
    for begin in range(0, 2300, 768):
        part = slice(begin, begin + 768)
        chunked.q, chunked.k, chunked.v = q[:, part], k[:, part], v[:, part]
        chunked.lengths.fill_(begin)
        parts.append(chunked.run())
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0.02, atol=0.002)
    assert torch.equal(chunked.cache.view(torch.int16), chunked.after.view(torch.int16))


@pytest.mark.parametrize("q_len", [1, 4])
def test_a_captured_call_follows_the_lengths(name: str, q_len: int) -> None:
    if name == "torch":
        pytest.skip("reads the lengths back")
    lengths = (2000, 1500, 700, 300)
    replayed, eager = (Built(Case(lengths, q_len, 32, 8), "cuda") for _ in range(2))
    for built in (replayed, eager):
        built.cache.nan_to_num_(0.5)
    graph, out = captured(replayed.run)
    eager.run()  # as the other one has, before it was captured
    for step in range(3):
        for built in (replayed, eager):
            built.lengths.copy_(torch.tensor([17 + step, 260 + step, 600 * step, 0], dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, eager.run())
        assert torch.equal(replayed.cache, eager.cache)


@pytest.mark.parametrize("case", [Case((768,), 1, 32, 8), Case((3000, 900), 2, 32, 8), Case((1500,), 600, 8, 2)])
def test_the_same_call_gives_the_same_bits(name: str, case: Case) -> None:
    built = Built(case, "cuda")
    first = built.run()
    for _ in range(500):
        assert torch.equal(built.run(), first)


def captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = call()
    torch.cuda.synchronize()
    return graph, out


def test_exllamav2_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from exllamav2 import attn

    for attribute in (
        "has_flash_attn",
        "has_flash_attn_with_paged",
        *(f"has_flash_attn_with_{x}" for x in ("window", "softcap")),
    ):
        monkeypatch.setattr(attn, attribute, getattr(attn, attribute))
    monkeypatch.setattr(attn, "flash_attn_with_kvcache", None, raising=False)
    paged.install_paged()
    attn.assert_paged_attn()
    built = Built(Case((700,), 3, window=100, softcap=30.0), "cuda")
    with paged.at_most(700):
        out = attn.flash_attn_with_kvcache(
            q=built.q,
            k=built.k,
            v=built.v,
            k_cache=built.cache[0],
            v_cache=built.cache[1],
            cache_seqlens=built.lengths,
            block_table=built.table,
            causal=True,
            softmax_scale=built.case.dim**-0.5,
            window_size=(100, 100),
            softcap=30.0,
        )
    assert built.check(out) <= TOLERANCE
