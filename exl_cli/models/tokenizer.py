"""The model's tokenizer: encoding, incremental decoding, special tokens. Imports neither transformers nor torch."""

from __future__ import annotations

import contextlib
import hashlib
import re
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl_cli.errors import DamagedModelError, UnsupportedModelError, os_errors
from exl_cli.models import template_helper
from exl_cli.models.config import read_json, refuse_pointer, require_regular
from exl_cli.models.template_worker import STOPPED, TEXT
from exl_cli.system.files import read_file, user_cache

if TYPE_CHECKING:
    import tokenizers


# SHA-256 of the built-in model's tokenizer.json, which is trusted.
BUILTIN_SHA256 = "8ca15f966f4c3efdcf43743e81754c3a4650514f51da785ad0401d3bfc30b653"


# `as_text` replaces a special token in user text by its index, written as three digits in base 30. The digits are
# Unicode noncharacters, which no real text contains.
_DIGITS = [chr(code) for code in range(0xFDD2, 0xFDF0)]
_CUT = "\uffff"
_HIDDEN = re.compile(f"[{_DIGITS[0]}-{_DIGITS[-1]}]{{3}}")

# Byte-level BPE writes printable Latin-1 bytes as themselves and the others from U+0100 on (openai/gpt-2,
# src/encoder.py, bytes_to_unicode).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


class Tokenizer:
    """A model's tokenizer, read from `tokenizer.json`.

    Attributes:
        eos_ids: ids that end a response: from generation_config.json, else config.json, plus the tokenizer's
            `eos_token`.
        vocab_size: largest token id plus 1.

    Raises:
        UnsupportedModelError: the folder has only a SentencePiece `tokenizer.model`.
        DamagedModelError: the file is missing, unreadable, or would use excessive memory or time.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        file = path / "tokenizer.json"
        if not file.exists():
            if (path / "tokenizer.model").exists():
                raise UnsupportedModelError(
                    f"{path} has tokenizer.model but no tokenizer.json, which exllamav2 needs since 0.3.1",
                    "copy tokenizer.json from the original model's repository into the folder",
                )
            raise DamagedModelError(f"{file} is missing", "download the model again, tokenizer.json included")
        require_regular(file)
        with os_errors(f"cannot read {file}", "check its permissions", DamagedModelError):
            data = read_file(file).removeprefix(BOM_UTF8)
        refuse_pointer(file, data)
        _try(file, data)
        try:
            self._backend: tokenizers.Tokenizer = Backend.from_buffer(data)
        except Exception as error:  # the Rust side raises bare Exception
            raise DamagedModelError(f"cannot read {file}: {error}", "download the file again") from error
        # Training-time settings that would cut or pad prompts.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._plain_backends: dict[bool, tokenizers.Tokenizer] = {}
        self._config = read_json(path / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self._special = {id_: token.content for id_, token in added.items() if token.special}
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        self.eos_ids = self._find_eos_ids(path)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode a text. Special tokens in it are recognised, except those escaped by `as_text`.

        Args:
            text: the text.
            add_special_tokens: add BOS and the like; False for the output of a chat template, which contains them.
        """
        if _HIDDEN.search(text):
            ids = self._encode_hidden(text, add_special_tokens)
        else:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens:
            ids = self._apply_bos_setting(ids)
        return ids

    def least_tokens(self, text: str) -> int:
        """A lower bound on a text's tokens. Encoding takes 200 bytes of memory per byte: refuse hopeless texts first.

        Spaces and newlines count nothing, other characters half: normalizers may drop spaces and accents.
        """
        return (len(text) - text.count(" ") - text.count("\n")) // (2 * self._longest)

    @cached_property
    def _longest(self) -> int:
        return max((len(token) for token in self._backend.get_vocab(with_added_tokens=True)), default=1)

    def as_text(self, text: str) -> str:
        """Escape special tokens in user text, so that `encode` treats them as plain text.

        Otherwise a user could end their own turn, or forge a system message, by typing the template's tokens.
        """
        typed = [name for name in self._special_names if name in text]
        if not typed:
            return text
        pattern = "|".join(re.escape(name) for name in sorted(typed, key=len, reverse=True))
        return re.sub(pattern, lambda match: self._mark(match[0]), text)

    def as_text_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Apply `as_text` to all messages but the assistant's."""

        def hidden(content: Any) -> Any:
            if isinstance(content, str):
                return self.as_text(content)
            if isinstance(content, (list, tuple)):
                return [hidden(part) for part in content]
            if isinstance(content, Mapping) and isinstance(content.get("text"), str):
                return {**content, "text": self.as_text(content["text"])}
            return content

        return [
            dict(message)
            if message.get("role") == "assistant"
            else {**message, **({"content": hidden(message["content"])} if "content" in message else {})}
            for message in messages
        ]

    def shown(self, text: str) -> str:
        """Undo `as_text`."""
        return _HIDDEN.sub(lambda match: self._name(match[0]), text)

    def hidden(self, text: str) -> list[str]:
        """The distinct special tokens that `as_text` escaped in a text."""
        return list(dict.fromkeys(self._name(mark) for mark in _HIDDEN.findall(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids, skipping special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decode_stream(self, prompt_ids: Sequence[int]) -> DecodeStream:
        """An incremental decoder for the tokens after a prompt."""
        return DecodeStream(self._backend, prompt_ids, self._special)

    def pieces(self) -> list[str]:
        """Each token's text decoded on its own, indexed by id; empty for special and unused ids."""
        return self._backend.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=True)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Special tokens by id."""
        return dict(self._special)

    def token_bytes(self, id_: int) -> bytes:
        """A token's UTF-8 bytes, possibly part of a character; a special token's name."""
        token = self.token(id_)
        if id_ in self._special:
            return token.encode()
        if "ByteLevel" in self._decoder_kind and all(char in _BYTES for char in token):
            return bytes(_BYTES[char] for char in token)
        if "ByteFallback" in self._decoder_kind and (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _decoder_kind(self) -> str:
        decoder = self._backend.decoder
        return "" if decoder is None else decoder.__getstate__().decode()

    def special_ids(self) -> set[int]:
        return set(self._special)

    def token_id(self, token: str) -> int | None:
        """The id of an exact vocabulary entry; None if there is none."""
        id_: int | None = self._backend.token_to_id(token)
        return id_

    def token(self, id_: int) -> str:
        """The vocabulary entry of an id; empty if there is none."""
        return self._backend.id_to_token(id_) or ""

    def difference(self, other: Tokenizer) -> str:
        """How another tokenizer's vocabulary differs, in words; empty if all ids, special ones included, mean the same.

        Merges and the padding of the models' vocabularies are not compared.
        """
        mine, theirs = ({id_: token for token, id_ in t._backend.get_vocab(True).items()} for t in (self, other))
        different = [id_ for id_ in mine.keys() | theirs.keys() if mine.get(id_) != theirs.get(id_)]
        if not different:
            return ""
        first = min(different)
        here, there = (repr(ids[first]) if first in ids else "nothing" for ids in (mine, theirs))
        return f"token {first} is {here} in one and {there} in the other, and {len(different)} tokens differ in all"

    @cached_property
    def _special_names(self) -> list[str]:
        return sorted(name for name in self._special.values() if name.strip())[: len(_DIGITS) ** 3]

    def _mark(self, name: str) -> str:
        index, digits = self._special_names.index(name), len(_DIGITS)
        return _DIGITS[index // digits**2] + _DIGITS[index // digits % digits] + _DIGITS[index % digits]

    def _name(self, mark: str) -> str:
        index = 0
        for digit in mark:
            index = index * len(_DIGITS) + _DIGITS.index(digit)
        return self._special_names[index] if index < len(self._special_names) else mark

    def _encode_hidden(self, text: str, add_special_tokens: bool) -> list[int]:
        """`encode` for a text with escaped special tokens."""
        # A tokenizer first splits the text at special tokens and then encodes each part independently. So encode once
        # to find the parts, then encode the parts with escapes again, unescaped and with special tokens disabled.
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        part: list[int] = []
        start = 0
        for id_, added, (begin, end) in zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True):
            if (added and begin == end) or (begin < end and text[begin:end].strip() == self.token(id_) in self._cuts):
                # Tokens added by the post-processor have empty offsets: before any part it is BOS, after it EOS.
                stop = begin if begin < end else len(text) if part else start
                ids += [*self._encode_part(text[start:stop], part, start == 0), id_]
                part, start = [], end if begin < end else stop
            else:
                part.append(id_)
        return ids + self._encode_part(text[start:], part, start == 0)

    @cached_property
    def _cuts(self) -> frozenset[str]:
        return frozenset(self._special_names)

    def _encode_part(self, text: str, ids: list[int], first: bool) -> list[int]:
        """Encode the text between two special tokens; returns `ids` if it has no escapes."""
        if not _HIDDEN.search(text):
            return ids
        again: list[int] = self._plain(first).encode(self.shown(text), add_special_tokens=False).ids
        if {self.token_id(name) for name in self.hidden(text)}.isdisjoint(again):
            return again
        # The special token is an ordinary vocabulary entry too. Split it after its first character to avoid its id.
        cut = _HIDDEN.sub(lambda match: f"{self._name(match[0])[0]}{_CUT}{self._name(match[0])[1:]}", text).split(_CUT)
        parts = [self._plain(first and not i).encode(t, add_special_tokens=False).ids for i, t in enumerate(cut)]
        return [id_ for part in parts for id_ in part]

    def _plain(self, first: bool) -> tokenizers.Tokenizer:
        """The tokenizer with special tokens disabled; `first` for the beginning of a text."""
        if first in self._plain_backends:
            return self._plain_backends[first]
        source = self._backend.to_str()
        if not first:  # SentencePiece-style tokenizers put a space before the first word of a text only
            source = source.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        plain = type(self._backend).from_str(source)
        plain.encode_special_tokens = True
        self._plain_backends[first] = plain
        return plain

    def _find_eos_ids(self, path: Path) -> frozenset[int]:
        ids: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            value = read_json(path / name).get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            ids |= {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
            if ids:
                break
        own = self.token_id(_token_text(self._config.get("eos_token")))
        return frozenset(ids if own is None else ids | {own})

    def _apply_bos_setting(self, ids: list[int]) -> list[int]:
        # As in transformers, add_bos_token in tokenizer_config.json overrides tokenizer.json's post-processor.
        setting, bos = self._config.get("add_bos_token"), self.token_id(_token_text(self._config.get("bos_token")))
        if bos is None or not isinstance(setting, bool):
            return ids
        has_bos = ids[:1] == [bos]
        if setting and not has_bos:
            return [bos, *ids]
        return ids[1:] if has_bos and not setting else ids


class DecodeStream:
    """Incremental decoder. Holds bytes back until they form a complete character.

    Primed with the end of the prompt, since whether a leading space is kept depends on the preceding tokens.
    """

    _CONTEXT = 8

    def __init__(self, backend: tokenizers.Tokenizer, prompt_ids: Sequence[int], special: Mapping[int, str]) -> None:
        from tokenizers.decoders import DecodeStream as Backend

        self._tokenizer = backend
        self._special = special
        self._stream: Any = Backend(ids=list(prompt_ids)[-self._CONTEXT :], skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The text this token completes; empty while a character is incomplete."""
        return self._stream.step(self._tokenizer, token_id) or ""

    def special(self, token_id: int) -> str:
        """A special token's text; empty for any other token."""
        return self._special.get(token_id, "")


def _try(file: Path, data: bytes) -> None:
    """Test a tokenizer in the helper process, once per file content; raises DamagedModelError if it fails."""
    digest = hashlib.sha256(data).hexdigest()
    if digest == BUILTIN_SHA256:
        return
    # Bump the number in the folder's name when the limits change: old results must not count.
    passed = user_cache() / "tokenizers-1" / digest
    if passed.exists():
        return
    reply = template_helper.try_tokenizer(data)
    if reply.kind == STOPPED:
        raise DamagedModelError(
            f"{file} was rejected: on a short text, {reply.text}", "copy it from the original model's repository"
        )
    if reply.kind == TEXT:  # not if the helper process failed to start
        with contextlib.suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


def _token_text(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
