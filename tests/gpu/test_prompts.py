"""Prompts through kernels of our own on a real GPU: keys and values as exllamav2's modules leave them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Recorder

from exl_cli import loader
from exl_cli.engines.exllamav2.engine import ExLlamaV2Engine
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.engines.exllamav2.fused_forward import FusedForward
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple((seed + 3) * (place + 7) % 3900 + 5 for place in range(length))


@pytest.mark.parametrize("format_", ["exl2", "gptq"])
def test_prompts_together_leave_what_exllamav2_leaves(format_: str, exl2_dir: Path, gptq_dir: Path) -> None:
    info = loader.resolve(str(exl2_dir if format_ == "exl2" else gptq_dir))
    options = LoadOptions(engine="exllamav2", max_seq_len=1024, sequences=5)
    engine = loader.load(info, Tokenizer(info.path), options, Recorder())
    assert isinstance(engine, ExLlamaV2Engine)
    forward = engine._forward
    small = forward.small
    assert isinstance(small, FusedForward)
    for lengths in [(40,), (200,), (511,), (700,), (1000, 3, 90, 64, 333), (900, 900, 900), (1020, 40)]:
        rows = [
            ScheduledTokens(prompt(length, index), 0, [*range(4 * index, 4 * index + 4)])
            for index, length in enumerate(lengths)
        ]
        last = [ScheduledTokens((9,), len(row.ids), row.block_table) for row in rows]
        logits = []
        for ours in (False, True):
            with torch.inference_mode():
                for tensor in [*forward.cache.key_states, *forward.cache.value_states]:
                    tensor.fill_(float("nan"))
            if ours:
                while not small.prefills(min(2048, 64 * sum(-(-length // 64) for length in lengths))):
                    pass
                # In two parts, the second of which begins amid a page.
                forward.prefill(*(ScheduledTokens(row.ids[:70], 0, row.block_table) for row in rows))
                rest = [ScheduledTokens(row.ids[70:], 70, row.block_table) for row in rows if len(row.ids) > 70]
                if rest:
                    forward.prefill(*rest)
            else:
                with torch.inference_mode():
                    for row in rows:
                        forward._pipeline.enter()
                        forward._prefill_modules(row)
            forward.submit(last)
            logits.append(forward.collect().clone())
        expected, got = logits
        assert bool(expected.isfinite().all())
        assert float((got - expected).norm() / expected.norm()) < 5e-3
    engine.close()
