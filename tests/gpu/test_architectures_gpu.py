"""Every architecture of exllamav2 with its config variants: correct on the GPU, or refused by name."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import architecture_table
import architectures
import pytest

# What neither exllamav2 nor exl's own forward computes: kinds, as a glob, and what the refusal must name.
REFUSED: dict[str, str] = {
    "dbrx*": "clip_qkv",
    "llama-relu-*": "the activation 'relu'",
    "gpt2-odd-inner-gptq": "multiples of 64",
    "gpt2-odd-inner-exl2": "multiples of 64",
}
# What people run: never to be refused.
NEVER_REFUSED = ("phi3*", "qwen3*", "gemma3*", "mistral*", "*yarn*", "starcoder2*", "glm4*", "llama", "qwen2*")


@pytest.fixture(scope="module", autouse=True)
def _transformers() -> None:
    architectures.imported()


@pytest.mark.parametrize("fmt", architectures.FORMATS)
@pytest.mark.parametrize("kind", architectures.KINDS)
def test_logits_and_text_are_transformers_or_the_model_is_refused_by_name(kind: str, fmt: str, tmp_path: Path) -> None:
    folder = architectures.make(kind, tmp_path / "model", fmt)
    row = architecture_table.measure(kind, fmt, folder, architectures.expected(kind, fmt))
    print(f"\n{row}")
    reasons = [reason for glob, reason in REFUSED.items() if fnmatch.fnmatch(f"{kind}-{fmt}", glob)]
    if reasons:
        assert row.refusal.startswith("UnsupportedModelError")
        assert reasons[0] in row.refusal
    else:
        assert not row.refusal
        assert row.right()


def test_what_people_run_is_not_refused() -> None:
    for kind in architectures.KINDS:
        if any(fnmatch.fnmatch(kind, glob) for glob in NEVER_REFUSED):
            assert not any(fnmatch.fnmatch(f"{kind}-{fmt}", glob) for glob in REFUSED for fmt in architectures.FORMATS)
