"""A model in stages, on one GPU or several: the same logits and tokens as in one piece."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Recorder

from exl_cli import loader
from exl_cli.engines.base import Chunk, Request
from exl_cli.engines.exllamav2 import engine as exllamav2
from exl_cli.engines.exllamav2 import import_exllamav2
from exl_cli.engines.exllamav2.engine import ExLlamaV2Engine
from exl_cli.engines.exllamav2.extension.build import Notes
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.engines.exllamav2.fused_forward import FusedForward
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

# Of the eight layers of fable-7m.
CUTS = [(4,), (1, 6), (2, 4, 7)]
# GiB of weights: a layer has half a MiB.
SPLITS = {2: (0.0022, 1.0), 4: (0.0012, 0.0012, 0.0012, 1.0)}


def load(folder: Path, cuts: Sequence[int] = (), context: int = 1024, **options: Any) -> ExLlamaV2Engine:
    info = loader.resolve(str(folder))
    import_exllamav2.import_exllamav2(Notes(print))
    given = LoadOptions(engine="exllamav2", max_seq_len=context, **options)
    draft = loader.resolve(given.draft) if given.draft else None
    return exllamav2.load(info, Tokenizer(info.path), context, given, Recorder().progress, draft, cuts=cuts)


def prompt(length: int, seed: int) -> list[int]:
    return [(seed + 3) * (place + 7) % 3900 + 5 for place in range(length)]


def passes(engine: ExLlamaV2Engine) -> list[torch.Tensor]:
    """Logits of prompts and decode steps of several shapes: eager, captured and replayed."""
    forward, logits = engine._forward, []
    # With several stages prompts run in passes of no more tokens.
    forward._most_prompt_tokens = 256
    await_kernels(engine)
    for lengths in [(5,), (40,), (200,), (700, 3, 90)]:
        rows = []
        for index, length in enumerate(lengths):
            table = [*range(4 * index, 4 * index + 4)]
            forward.prefill(ScheduledTokens(tuple(prompt(length, index)), 0, table))
            rows.append(ScheduledTokens((9,), length, table))
        for step in range(4):
            forward.submit([ScheduledTokens((9 + step,), row.start + step, row.block_table) for row in rows])
            logits.append(forward.collect().clone())
        for _ in range(3):
            forward.submit([ScheduledTokens((5, 6, 7), row.start + 4, row.block_table) for row in rows])
            logits.append(forward.collect().clone())
    return logits


def answers(engine: ExLlamaV2Engine, asked: Sequence[Request]) -> list[list[int]]:
    """The tokens of requests that run together."""
    parts: list[list[int]] = [[] for _ in asked]
    for index, request in enumerate(asked):
        engine.add(index, request)
    ended = 0
    while ended < len(asked):
        for index, event in engine.step():
            assert isinstance(event, Chunk), event
            parts[index] += event.token_ids
            ended += event.summary is not None
    return parts


def await_kernels(engine: ExLlamaV2Engine) -> None:
    """Wait until prompts of all lengths run through exl's kernels, where they do at all."""
    for stage in engine._forward._pipeline.stages:
        if isinstance(stage.forward, FusedForward):
            for count in (64, 128, 256, 512, 1024):
                while not stage.forward.prefills(count):
                    time.sleep(0.01)


@pytest.fixture(scope="module", params=["exl2", "gptq"])
def model(request: pytest.FixtureRequest, exl2_dir: Path, gptq_dir: Path) -> tuple[Path, list[torch.Tensor]]:
    folder = exl2_dir if request.param == "exl2" else gptq_dir
    engine = load(folder, sequences=3)
    logits = passes(engine)
    engine.close()
    return folder, logits


@pytest.mark.parametrize("cuts", CUTS)
def test_stages_on_one_gpu_give_the_same_bits(model: tuple[Path, list[torch.Tensor]], cuts: tuple[int, ...]) -> None:
    folder, expected = model
    engine = load(folder, cuts, sequences=3)
    forward = engine._forward
    assert (forward.why_not_fused, len(forward._pipeline.stages)) == ("", len(cuts) + 1)
    for got, wanted in zip(passes(engine), expected, strict=True):
        assert torch.equal(got, wanted)
    assert (forward.captures, forward.why_not_captured) == (True, "")
    engine.close()


@pytest.mark.parametrize("count", SPLITS)
def test_several_gpus_give_the_same_bits(model: tuple[Path, list[torch.Tensor]], count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"fewer than {count} GPUs")
    folder, expected = model
    engine = load(folder, sequences=3, gpu_split=SPLITS[count])
    forward = engine._forward
    assert [stage.stream.device.index for stage in forward._pipeline.stages] == [*range(count)]
    assert len(engine.memory()) == count
    for got, wanted in zip(passes(engine), expected, strict=True):
        assert torch.equal(got, wanted)
    assert (forward.captures, forward.why_not_captured) == (True, "")
    engine.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"cache": "q8"}, {"cache": "q6"}, {"cache": "q4"}, {"speculate": "ngram"}, {"draft": True}],
    ids=lambda options: ",".join(map(str, options.values())) or "plain",
)
@pytest.mark.parametrize("count", [2, 3])
def test_answers_are_the_same_near_ties_aside(exl2_dir: Path, options: dict[str, Any], count: int) -> None:
    if "draft" in options:
        options = {"draft": str(exl2_dir)}
    several = torch.cuda.device_count() >= count and count in SPLITS
    cuts, split = ((), {"gpu_split": SPLITS[count]}) if several else ((3, 6)[: count - 1], {})
    whole, staged = load(exl2_dir, sequences=6, **options), load(exl2_dir, cuts, sequences=6, **options, **split)
    assert len(staged._forward._pipeline.stages) == count
    for engine in (whole, staged):
        await_kernels(engine)
    # The second time they find a part of the prompt in the cache. The sixth ends early, amid passes in flight.
    asked = [Request(prompt(length, length), build({}, "greedy"), 40, 0) for length in (60, 333, 700, 9, 130)]
    asked.append(Request(prompt(77, 5), build({}, "greedy"), 7, 0))
    for _ in range(2):
        for request, expected, got in zip(asked, answers(whole, asked), answers(staged, asked), strict=True):
            assert len(got) == request.max_new_tokens
            parted = next((place for place, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
            if parted is not None:
                logits = whole.logits([*request.ids, *got[:parted]])[-1]
                assert abs(logits[got[parted]] - logits[expected[parted]]) < (0.05 if "cache" not in options else 0.5)
    sampled = [Request(prompt(90, 8), build({}, None), 40, seed=5)]
    if "cache" not in options:
        assert answers(whole, sampled) == answers(staged, sampled)
    whole.close()
    staged.close()
