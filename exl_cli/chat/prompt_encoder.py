"""From a conversation's text to token ids that begin with exactly those which the engine has already computed.

Tokenizing an answer's text again can give other tokens than the model generated, and from the first that differs the KV
cache is of no use. So the ids of prompts and answers are kept as they went through the engine, and of a new prompt only
the text that follows them is tokenized. That is done only

- where the new prompt's text begins with the old text, character for character, and
- where the tokenizer itself sees a boundary at that place: tokenizing the last piece of the old text, alone and with
  what follows, gives the same tokens up to there.

Otherwise an earlier place is tried, and in the end all of the text is tokenized: always right, and the engine still
finds what the ids have in common with its cache.
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
        marks: (characters, tokens) of the places where the ids of a prompt or an answer end, in order, from (0, 0) on.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    marks: tuple[tuple[int, int], ...] = ((0, 0),)


class PromptEncoder:
    """Remembers what one engine has computed of one conversation.

    Attributes:
        known: what the engine has computed.
        tag_ids: tags of reasoning that are special tokens, and thus missing in decoded text.
    """

    def __init__(self, tokenizer: Tokenizer, *, add_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        self.known = Encoded()
        self._invisible = tokenizer.special_ids() | tokenizer.eos_ids
        self.tag_ids = tag_ids(tokenizer)

    def encode(self, text: str) -> Encoded:
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
        """Note what the engine has computed; `answer` is the text that is kept, with tags of reasoning, without stop
        strings."""
        size, length = self._visible(prompt, answer_ids, answer)
        self.known = prompt
        if size:
            text, ids = prompt.text + answer[:length], prompt.ids + tuple(answer_ids[:size])
            self.known = Encoded(text, ids, (*prompt.marks, (len(text), len(ids))))

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _rest(self, text: str, start: int, end: int) -> tuple[int, ...] | None:
        """The tokens of the text from `end` on; None where the tokenizer has no boundary there."""
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
        """How many of the answer's ids are seen in its text, and how much of the text they make up: an end-of-sequence
        token, half a character or the beginning of a stop string at the end are not."""
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
