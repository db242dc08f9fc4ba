"""Telling a model's reasoning from its answer, as the text comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exl_cli.models.tokenizer import Tokenizer

# What models put around their reasoning: DeepSeek R1, Qwen and most others the first; Magistral, Seed, Kimi and
# OpenThinker those of their own.
TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}

Kind = Literal["reasoning", "answer"]


def tag_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """Tags of reasoning that are special tokens, and thus missing in decoded text, by their ids."""
    special = tokenizer.special_tokens
    ids = {tokenizer.token_id(tag): tag for pair in TAGS.items() for tag in pair}
    return {id_: tag for id_, tag in ids.items() if id_ in special}


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, its tags left out."""

    kind: Kind
    text: str


class Splitter:
    """Takes an answer apart.

    Reasoning is what stands at the very beginning between two tags of a kind. A tag further on is text like any other:
    an answer may well speak of <think>.

    Args:
        prompt: the text of the prompt: templates of some models open the reasoning themselves.
    """

    def __init__(self, prompt: str = "") -> None:
        end = prompt.rstrip()
        self._close = next((close for tag, close in TAGS.items() if end.endswith(tag)), "")
        self._state: Literal["start", "reasoning", "gap", "answer"] = "reasoning" if self._close else "start"
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        """What is certain after this text; the beginning of what may be a tag is held back."""
        self._held += text
        reasoning = answer = ""
        if self._state == "start":
            begun = self._held.lstrip()
            if tag := next((tag for tag in TAGS if begun.startswith(tag)), ""):
                self._state, self._close, self._held = "reasoning", TAGS[tag], begun[len(tag) :]
            elif not any(tag.startswith(begun) for tag in TAGS):
                self._state = "answer"
        if self._state == "reasoning":
            reasoning, close, after = self._held.partition(self._close)
            if close:
                self._state, self._held = "gap", after
            else:
                most = min(len(self._close) - 1, len(reasoning))
                keep = next((n for n in range(most, 0, -1) if self._close.startswith(reasoning[-n:])), 0)
                end = len(reasoning) - keep
                reasoning, self._held = reasoning[:end], reasoning[end:]
        if self._state == "gap":
            # The empty line after the reasoning belongs to neither.
            self._held = self._held.lstrip()
            self._state = "answer" if self._held else "gap"
        if self._state == "answer":
            answer, self._held = self._held, ""
        pieces = (Piece("reasoning", reasoning), Piece("answer", answer))
        return [piece for piece in pieces if piece.text]

    def flush(self) -> list[Piece]:
        """The rest: no tag came of it."""
        kind: Kind = "reasoning" if self._state == "reasoning" else "answer"
        text, self._held = self._held, ""
        return [Piece(kind, text)] if text and self._state != "gap" else []


def split(text: str, prompt: str = "") -> tuple[str, str]:
    """The reasoning and the answer of a whole text; see `Splitter`."""
    splitter = Splitter(prompt)
    pieces = splitter.push(text) + splitter.flush()
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    return reasoning, "".join(piece.text for piece in pieces if piece.kind == "answer")
