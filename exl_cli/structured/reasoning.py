"""Telling a model's reasoning from its answer, as the text comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        pieces: list[Piece] = []
        while (piece := self._next()) is not None:
            if piece.text:
                pieces.append(piece)
        return pieces

    def flush(self) -> list[Piece]:
        """The rest: no tag came of it."""
        kind: Kind = "reasoning" if self._state == "reasoning" else "answer"
        text, self._held = self._held, ""
        return [Piece(kind, text)] if text and self._state != "gap" else []

    def _next(self) -> Piece | None:
        """One piece, an empty one for a mere change of state; None where more text is needed."""
        if not self._held:
            return None
        if self._state == "start":
            return self._start()
        if self._state == "reasoning":
            return self._reasoning()
        if self._state == "gap":
            # The empty line after the reasoning belongs to neither.
            self._held = self._held.lstrip()
            if not self._held:
                return None
            self._state = "answer"
        text, self._held = self._held, ""
        return Piece("answer", text)

    def _start(self) -> Piece | None:
        begun = self._held.lstrip()
        tag = next((tag for tag in TAGS if begun.startswith(tag)), None)
        if tag is not None:
            self._state, self._close = "reasoning", TAGS[tag]
            self._held = begun[len(tag) :]
            return Piece("reasoning", "")
        if any(tag.startswith(begun) for tag in TAGS):
            return None
        self._state = "answer"
        return Piece("answer", "")

    def _reasoning(self) -> Piece | None:
        before, found, after = self._held.partition(self._close)
        if found:
            self._state, self._held = "gap", after
            return Piece("reasoning", before)
        keep = next(
            (n for n in range(min(len(self._close) - 1, len(before)), 0, -1) if self._close.startswith(before[-n:])), 0
        )
        text, self._held = before[: len(before) - keep], before[len(before) - keep :]
        return Piece("reasoning", text) if text else None


def split(text: str, prompt: str = "") -> tuple[str, str]:
    """The reasoning and the answer of a whole text; see `Splitter`."""
    splitter = Splitter(prompt)
    pieces = splitter.push(text) + splitter.flush()
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    return reasoning, "".join(piece.text for piece in pieces if piece.kind == "answer")
