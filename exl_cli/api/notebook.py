"""The status lines of LangChain's exllamav2 notebook, printed to stdout as there."""

from __future__ import annotations

from exl_cli.engines.base import Summary


def say(text: str) -> None:
    """Print a line to stdout."""
    print(text, flush=True)


def timings(summary: Summary) -> list[str]:
    """The two lines after a response, plus lines on speculation if it was used."""
    computed = summary.prompt_tokens - summary.reused_tokens
    lines = [
        _timed("Prompt processed", summary.prompt_seconds, computed, summary.prompt_rate),
        _timed("Response generated", summary.generation_seconds, summary.new_tokens, summary.generation_rate),
    ]
    if summary.drafted_tokens:
        lines.append(accepted(summary.accepted_tokens, summary.drafted_tokens))
    if summary.note:
        lines.append(f"note: {summary.note}")
    return lines


def accepted(right: int, proposed: int) -> str:
    return f"{right:,} of {proposed:,} draft tokens accepted ({right / proposed:.0%})"


def _timed(what: str, seconds: float, tokens: int, rate: float) -> str:
    return f"{what} in {seconds:.2f} seconds, {tokens} tokens, {rate:.2f} tokens/second"
