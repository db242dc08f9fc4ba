"""Encodes a conversation so that its prompt starts with the token ids that the engine has already computed.

Tokenizing the text of an answer does not always give back the tokens that the model generated, and from the first
difference on the KV cache is useless. So the ids of prompts and answers are kept as they went through the engine, and
only the text after them is tokenized. The ids up to a mark (the end of an earlier prompt or answer) are reused if

- the new text begins with the old text up to the mark, character for character, and
- the tokenizer has a token boundary there: tokenizing the text since the mark before, alone and with what follows,
  gives the same tokens up to the mark.

Otherwise the mark before is tried, and in the end all of the text is tokenized. That is always correct, and the engine
still reuses the longest common prefix of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exl_cli.models.tokenizer import Tokenizer
from exl_cli.structured.reasoning import tag_ids


@dataclass(frozen=True)
class Encoded:
    """A text and its token ids.

    Attributes:
        marks: (characters, tokens) at the end of each prompt and answer, ascending, after an initial (0, 0).
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    marks: tuple[tuple[int, int], ...] = ((0, 0),)


class PromptEncoder:
    """Remembers what one engine has computed of one conversation.

    Attributes:
        known: prompt and answer that the engine computed last.
        tag_ids: reasoning tags that are special tokens, by id; decoding leaves these out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, add_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        self.known = Encoded()
        self._invisible = tokenizer.special_ids() | tokenizer.eos_ids
        self.tag_ids = tag_ids(tokenizer)

    def encode(self, text: str) -> Encoded:
        """Encode a prompt, reusing known ids up to the last mark that allows it."""
        marks = self.known.marks
        for index in range(len(marks) - 1, 0, -1):
            (end, count), start = marks[index], marks[index - 1][0]
            if text[:end] != self.known.text[:end]:
                continue
            rest = self._rest(text, start, end)
            if rest is not None:
                ids = self.known.ids[:count] + rest
                return Encoded(text, ids, (*marks[: index + 1], (len(text), len(ids))) if rest else marks[: index + 1])
        ids = self._tokens(text, 0)
        return Encoded(text, ids, ((0, 0), (len(text), len(ids))))

    def computed(self, prompt: Encoded, answer_ids: Sequence[int], answer: str) -> None:
        """Record what the engine has computed; `answer` is the text with reasoning tags and without stop strings."""
        size, length = self._visible(prompt, answer_ids, answer)
        self.known = prompt
        if size:
            text, ids = prompt.text + answer[:length], prompt.ids + tuple(answer_ids[:size])
            self.known = Encoded(text, ids, (*prompt.marks, (len(text), len(ids))))

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _rest(self, text: str, start: int, end: int) -> tuple[int, ...] | None:
        """Tokenize the text from `end` on; None if the tokenizer has no boundary there. `start` is the mark before."""
        if len(text) == end:
            return ()
        before, whole = self._tokens(text[:end], start), self._tokens(text, start)
        if not before or whole[: len(before)] != before:
            return None
        return whole[len(before) :]

    def _tokens(self, text: str, start: int) -> tuple[int, ...]:
        add = self._add_special_tokens and start == 0
        return tuple(self._tokenizer.encode(text[start:], add_special_tokens=add))

    def _visible(self, prompt: Encoded, answer_ids: Sequence[int], answer: str) -> tuple[int, int]:
        """How many of the answer's ids its text shows, and how many characters they decode to.

        Not shown at the end: an end-of-sequence token, part of a character, or the beginning of a stop string.
        """
        stream = self._tokenizer.decode_stream(prompt.ids)
        size = length = 0
        for index, id_ in enumerate(answer_ids, 1):
            if id_ in self._invisible and id_ not in self.tag_ids:
                break
            piece = self.tag_ids.get(id_) or stream.push(id_)
            if not answer.startswith(piece, length):
                break
            if piece:
                size, length = index, length + len(piece)
        return size, length
