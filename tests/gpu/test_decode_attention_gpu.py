"""The decode attention kernel on a GPU, against float64 attention and in a whole model."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from decodecases import LENGTHS, TOLERANCE, Memory, Step, random_step
from helpers import Recorder

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import CachedScoring
from exl_cli.engines.exllamav2.kernels.compiler import Kernel
from exl_cli.engines.exllamav2.kernels.decode_attention import FILE, NAME, DecodeAttention, Plan
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128}


def bound(memory: Memory) -> Callable[[], None]:
    """The step as the engine takes it."""
    step = memory.step
    attention = DecodeAttention(memory.out.device, step.heads, step.kv_heads, step.head_dim, step.page_size)
    attend = attention.bind(
        memory.rope(),
        memory.out,
        len(step.lengths),
        scale=step.head_dim**-0.5,
        window=step.window,
        softcap=step.softcap,
        places=memory.places,
    )
    most_keys = max(step.lengths) + step.tokens

    def run() -> None:
        attend(torch.cuda.current_stream().cuda_stream, most_keys)

    return run


def built(step: Step, layout: Plan) -> tuple[Memory, Callable[[], None]]:
    """The step with its work divided as told."""
    memory = Memory(step, "cuda:0")
    batch = len(step.lengths)
    argument = memory.argument(layout.least, batch * step.tokens * step.heads * layout.shares)
    kernel = Kernel(
        FILE,
        NAME,
        layout.defines(step.head_dim, step.page_size),
        memory.out.device,
        layout.shared_bytes(step.head_dim),
    )
    launch = kernel.bind((layout.shares, step.kv_heads, batch), 32 * layout.warps, argument)

    def run() -> None:
        launch(torch.cuda.current_stream().cuda_stream)

    return memory, run


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs may still be on their way
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()
    return graph


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 32), (96, 48), (128, 256)])
def test_random_steps(head_dim: int, page_size: int, tiles: int) -> None:
    rng = random.Random(head_dim + tiles)
    for _ in range(40):
        step = random_step(rng, head_dim, tiles, page_size, 3000)
        layout = Plan(tiles, rng.choice([4, 8]) if tiles == 1 else 4, rng.choice([1, 3, 8, 33]), rng.choice([1, 4]))
        memory, run = built(step, layout)
        run()
        torch.cuda.synchronize()
        assert memory.error() < TOLERANCE, (step, layout)
        assert not memory.arrived.any()


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_the_engines_plan(batch: int, tokens: int) -> None:
    if batch * tokens > 32:
        pytest.skip("more than a pass has")
    rng = random.Random(batch)
    for longest in (600, 9000 if batch < 7 else 3000):
        lengths = tuple(rng.choice(LENGTHS) if rng.random() < 0.5 else rng.randint(0, longest) for _ in range(batch))
        memory = Memory(Step(lengths, tokens, **LLAMA), "cuda:0")
        bound(memory)()
        torch.cuda.synchronize()
        assert memory.error() < TOLERANCE, lengths


@pytest.mark.parametrize("step", [Step((768,), **LLAMA), Step((3000, 900, 17), 2, **LLAMA), Step((12000,), **LLAMA)])
def test_the_same_step_gives_the_same_bits(step: Step) -> None:
    memory = Memory(step, "cuda:0")
    run = bound(memory)
    run()
    torch.cuda.synchronize()
    assert memory.error() < TOLERANCE
    first = memory.out.clone()
    for _ in range(500):
        memory.out[:-1].fill_(float("nan"))
        run()
        assert torch.equal(memory.out[:-1], first[:-1])


def test_shares_that_wait_for_each_other_never_miss_one() -> None:
    """Whichever share comes last puts them together: over many launches back to back, always all of them.

    One workspace for all, as layers have, each launch beginning while the one before it ends.
    """
    memories = [Memory(Step((768, 4000), **LLAMA, seed=seed), "cuda:0") for seed in range(4)]
    attention = DecodeAttention(memories[0].out.device, 32, 8, 128, 256)
    attends = [attention.bind(m.rope(), m.out, 2, scale=128**-0.5, window=0, softcap=0.0) for m in memories]

    def chain() -> None:
        for _ in range(25):
            for attend in attends:
                attend(torch.cuda.current_stream().cuda_stream, 4096)

    chain()
    torch.cuda.synchronize()
    first = [memory.out.clone() for memory in memories]
    assert max(memory.error() for memory in memories) < TOLERANCE
    graph = captured(chain)
    for _ in range(100):
        for memory in memories:
            memory.out[:-1].fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(m.out[:-1], out[:-1]) for m, out in zip(memories, first, strict=True))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_captured_step_follows_the_lengths(tokens: int) -> None:
    step = Step((2000, 1500, 700, 300), tokens, **LLAMA)
    replayed, eager = (Memory(step, "cuda:0") for _ in range(2))
    for memory in (replayed, eager):
        memory.cache.nan_to_num_(0.5)
    runs = [bound(memory) for memory in (replayed, eager)]
    for run in runs:
        run()  # what happens once does not happen in the capture
    graph = captured(runs[0])
    for turn in range(3):
        for memory in (replayed, eager):
            memory.lengths.copy_(torch.tensor([17 + turn, 260 + turn, 600 * turn, 0], dtype=torch.int32))
        graph.replay()
        runs[1]()
        torch.cuda.synchronize()
        assert torch.equal(replayed.out[:-1], eager.out[:-1])
        assert torch.equal(replayed.cache, eager.cache)


def logits(folder: Path, ids: Sequence[int], step: int) -> torch.Tensor:
    info = loader.resolve(str(folder))
    engine = EngineThread(loader.load(info, Tokenizer(info.path), LoadOptions(engine="exllamav2"), Recorder()))
    assert isinstance(engine, CachedScoring)
    return engine.cached_logits(ids, step)


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("format_", ["exl2", "gptq"])
def test_a_model_says_what_it_says_with_triton(
    format_: str, step: int, exl2_dir: Path, gptq_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exl2_dir if format_ == "exl2" else gptq_dir
    text = "Once upon a time there was a little fox who lived under a big tree near the river. " * 20
    ids = Tokenizer(folder).encode(text, add_special_tokens=True)[:400]
    monkeypatch.delenv("EXL_ATTENTION", raising=False)
    ours = logits(folder, ids, step)
    monkeypatch.setenv("EXL_ATTENTION", "triton")
    theirs = logits(folder, ids, step)
    error = float((ours - theirs).norm() / theirs.norm())
    losses = [torch.nn.functional.cross_entropy(values[:-1], torch.tensor(ids[1:])).item() for values in (ours, theirs)]
    print(f"\n{format_}, {step} at once: logits {error:.5f} apart, losses {losses[0]:.5f} and {losses[1]:.5f}")
    assert 0 < error < 0.02  # the same only if one of them had been used twice
    assert abs(losses[0] - losses[1]) < 1e-3
