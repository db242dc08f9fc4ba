"""What is asked about a model, each time in a process of its own; see `child.ask`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from exl_cli import loader
from exl_cli.engines import soundness
from exl_cli.engines.base import Engine, Summary
from exl_cli.engines.base import Request as _Request
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

# Children's English, which every language model has read.
_TEXT = (
    "Once upon a time there was a little girl who lived in a small house near the forest. Every morning she went to "
    "the river with her mother to fetch some water, and every evening they sat by the fire and told each other stories."
)
_PROMPT_TOKENS = 12
_LONGEST = 256


class _Silent:
    def note(self, message: str) -> None:
        """See `loader.Observer.note`."""

    def progress(self, done: int, total: int) -> None:
        """See `loader.Observer.progress`."""


def _load(model: str, models_dir: str | None, engine: str) -> tuple[ModelInfo, Tokenizer, Engine, float]:
    info = loader.resolve(model, Path(models_dir) if models_dir else None)
    tokenizer = Tokenizer(info.path)
    begun = time.perf_counter()
    options = LoadOptions(engine="cpu" if engine == "cpu" else "exllamav2")
    loaded = loader.load(info, tokenizer, options, _Silent(), needed=_LONGEST)
    return info, tokenizer, loaded, time.perf_counter() - begun


def generate(model: str, models_dir: str | None, engine: str, new_tokens: int) -> dict[str, Any]:
    """Load a model, let it read a text and go on from its beginning, greedily."""
    _, tokenizer, loaded, seconds = _load(model, models_dir, engine)
    ids = tokenizer.encode(_TEXT, add_special_tokens=True)[:_LONGEST]
    prompt = ids[:_PROMPT_TOKENS]
    found = soundness.perplexity(loaded, ids)
    tokens: list[int] = []
    text, summary = "", None
    for chunk in loaded.stream(_Request(prompt, build({}, "greedy"), new_tokens, seed=0)):
        tokens += chunk.token_ids
        text += chunk.text
        summary = chunk.summary or summary
    return {
        "load_seconds": seconds,
        "perplexity": None if found != found else found,
        "vocabulary": tokenizer.vocab_size,
        "prompt": prompt,
        "tokens": tokens,
        "text": text,
        "facts": loaded.facts,
        "tokens_per_second": summary.generation_rate if isinstance(summary, Summary) else 0.0,
    }


def compare(model: str, models_dir: str | None, prompt: list[int], tokens: list[int]) -> dict[str, Any]:
    """How the CPU engine finds what another has generated."""
    _, tokenizer, loaded, _ = _load(model, models_dir, "cpu")
    ids = tokenizer.encode(_TEXT, add_special_tokens=True)[:_LONGEST]
    found = soundness.perplexity(loaded, ids)
    below = soundness.shortfalls(loaded, [*prompt, *tokens], len(tokens))
    return {"perplexity": None if found != found else found, "shortfalls": below, "vocabulary": tokenizer.vocab_size}
