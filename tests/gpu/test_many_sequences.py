"""Forward passes of more sequences than a matrix-vector kernel takes, on a real GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Recorder

from exl_cli import loader
from exl_cli.engines.exllamav2.engine import ExLlamaV2Engine
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

SIZES = (33, 60, 128, 250)


@pytest.mark.parametrize("format_", ["exl2", "gptq"])
def test_sequences_together_get_the_logits_that_each_gets_alone(format_: str, exl2_dir: Path, gptq_dir: Path) -> None:
    info = loader.resolve(str(exl2_dir if format_ == "exl2" else gptq_dir))
    options = LoadOptions(engine="exllamav2", max_seq_len=256, sequences=max(SIZES))
    engine = loader.load(info, Tokenizer(info.path), options, Recorder())
    assert isinstance(engine, ExLlamaV2Engine)
    forward = engine._forward
    rows, alone = [], []
    for index in range(max(SIZES)):
        length = 3 + index * 37 % 200
        ids = tuple((index + 1) * (place + 3) % 4000 + 5 for place in range(length + 1))
        forward.prefill(ScheduledTokens(ids[:-1], 0, [index]))
        rows.append(ScheduledTokens(ids[-1:], length, [index]))
        forward.submit(rows[-1:])
        alone.append(forward.collect()[0, 0].clone())
    expected = torch.stack(alone)
    for size in SIZES:
        # Ordinary passes first, then the capture, then a graph.
        for _ in range(3):
            forward.submit(rows[-size:])
            together = forward.collect()[:, 0]
            assert together.shape == (size, forward.vocab_size)
            error = (together - expected[-size:]).norm(dim=1) / expected[-size:].norm(dim=1)
            assert float(error.max()) < 5e-3
    # Several tokens of each.
    several = [ScheduledTokens((5, 6, 7), row.start, row.block_table) for row in rows[:40]]
    forward.submit(several)
    together = forward.collect().clone()
    for row, logits in zip(several, together, strict=True):
        forward.submit([row])
        assert float((logits - forward.collect()[0]).norm() / logits.norm()) < 5e-3
    engine.close()
