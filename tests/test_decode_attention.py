"""The decode attention kernel's source, emulated on the CPU, against float64 attention."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from decodecases import LENGTHS, TOLERANCE, Memory, Step, random_step
from kernels.emulated import COMPILER, Emulated

from exl_cli.engines.exllamav2.kernels import decode_attention

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ to compile the kernels for the CPU")


@pytest.fixture(scope="module")
def folder(kernels_folder: Path) -> Path:
    return kernels_folder


def attend(folder: Path, step: Step, *, warps: int = 4, shares: int = 1, least: int = 1, order: int = 0) -> Memory:
    """The step, its keys in up to so many shares; with an order, see `Emulated`."""
    memory = Memory(step)
    tiles = 1 if step.tokens * step.heads // step.kv_heads <= 8 else 2
    layout = decode_attention.Plan(tiles, warps, shares, least)
    batch = len(step.lengths)
    argument = memory.argument(least, batch * step.tokens * step.heads * shares)
    kernel = Emulated(
        folder, decode_attention.FILE, decode_attention.NAME, "Attention", layout.defines(step.head_dim, step.page_size)
    )
    kernel(argument, (shares, step.kv_heads, batch), 32 * warps, order)
    assert not memory.arrived.any()  # so that the workspace serves again
    return memory


@pytest.mark.parametrize(
    ("head_dim", "page_size", "tiles", "warps"),
    [(64, 32, 1, 4), (64, 32, 2, 4), (96, 48, 1, 2), (128, 256, 1, 8), (128, 256, 2, 4)],
)
def test_random_steps(folder: Path, head_dim: int, page_size: int, tiles: int, warps: int) -> None:
    rng = random.Random(head_dim + tiles)
    for _ in range(3):
        step = random_step(rng, head_dim, tiles, page_size, 700)
        shares, least = rng.choice([(1, 1), (4, 1), (6, 3), (18, 2)])
        memory = attend(folder, step, warps=warps, shares=shares, least=least, order=rng.randint(0, 99))
        assert memory.error() < TOLERANCE, (step, shares, least)


@pytest.mark.parametrize("shares", [1, 3])
def test_averages_stay_within_the_range_of_float16(folder: Path, shares: int) -> None:
    step = Step((700, 90), head_dim=64, turned=32, page_size=32, rounds_up=True)
    assert attend(folder, step, shares=shares).error() < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_at_borders(folder: Path, length: int) -> None:
    memory = attend(folder, Step((length, 3), tokens=4, heads=4, kv_heads=2, page_size=256), warps=8, shares=3)
    assert memory.error() < TOLERANCE


def test_the_order_in_which_shares_and_copies_arrive_changes_no_bit(folder: Path) -> None:
    step = Step((600, 333), page_size=256)
    first, *others = (attend(folder, step, warps=8, shares=7, order=order) for order in range(4))
    assert first.error() < TOLERANCE
    assert all(torch.equal(other.out[:-1], first.out[:-1]) for other in others)


def test_rows_that_only_fill_up_a_pass_share_a_page(folder: Path) -> None:
    memory = Memory(Step((300, 0, 0)))
    memory.table[2] = memory.table[1]
    layout = decode_attention.Plan(1, 8, 2, 1)
    kernel = Emulated(folder, decode_attention.FILE, decode_attention.NAME, "Attention", layout.defines(128, 256))
    kernel(memory.argument(1, 3 * 8 * 2), (2, 2, 3), 256)
    got = memory.out[:-1].view(memory.expected.shape).double()
    assert bool(got.isfinite().all())
    assert float((got - memory.expected)[0].norm() / memory.expected[0].norm()) < TOLERANCE


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (32, 32), (28, 4), (64, 8), (12, 2), (16, 1)])
@pytest.mark.parametrize("processors", [20, 132])
def test_a_plan_fills_the_gpu_and_leaves_room_for_other_sequences(heads: int, kv_heads: int, processors: int) -> None:
    rows = decode_attention.workspace_rows(heads, kv_heads, processors)
    # No more than a few megabytes, in rows of 128 sums.
    assert rows * 130 * 4 <= 20 << 20
    for batch, keys in itertools.product((1, 2, 7, 16, 32, 100, 256), (1024, 4096, 32768, 131072)):
        plan = decode_attention.plan(batch, 1, heads, kv_heads, keys, processors)
        assert batch * heads * plan.shares <= rows
        blocks = plan.shares * batch * kv_heads
        # As many as fill the GPU, or as have something to do.
        assert 2 * blocks >= processors or plan.shares == 64 or 16 * plan.shares * plan.least >= keys
        # What a block may have at least, on compute capabilities 8.6 and 8.9 (CUDA programming guide).
        assert plan.shared_bytes(128) <= 99 * 1024


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((32, 8, 128, 256), ""),
        ((32, 8, 80, 256), "heads of 80 values"),
        ((32, 1, 64, 256), "32 heads for 1 of keys"),
        ((8, 8, 64, 24), "pages of 24 positions"),
    ],
)
def test_what_it_takes(shape: tuple[int, int, int, int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXL_ATTENTION", raising=False)
    assert decode_attention.why_not(*shape, quantized_cache=False) == reason
    assert decode_attention.why_not(*shape, quantized_cache=True) == "the cache is quantized"
    monkeypatch.setenv("EXL_ATTENTION", "triton")
    assert decode_attention.why_not(*shape, quantized_cache=False) == "EXL_ATTENTION is set"
