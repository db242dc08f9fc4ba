"""The files of a repository, and which of them to fetch: by default what inference needs, and never a pickle."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from exl_cli.errors import DownloadError, UnsupportedModelError, UsageError, brief, os_errors, param
from exl_cli.models.config import quantization_of
from exl_cli.models.hub.names import Repository
from exl_cli.models.info import refuse_method

# Files in the repository's root; engines read no others.
_NEEDED = re.compile(
    r".*\.(safetensors|json|jinja|model|tiktoken)|tokenizer.*|(vocab|merges).*\.txt"
    r"|(licen[cs]e|copying|notice|use_policy).*|readme\.md"
)
_NEEDED_BELOW = re.compile(r"additional_chat_templates/.*\.jinja")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|joblib|dill)")
_BLOCK = 2**20

_LARGEST = 2**63 - 1  # of what a file system can hold
_LONGEST_NAME, _LONGEST_PART = 1024, 255
# What could lead out of a folder, here or on Windows: parts like "", "." and "..", backslashes, drives, control codes.
_UNSAFE = re.compile(r"(^|/)\.{0,2}(/|\Z)|\\|^[A-Za-z]:|[\0-\x1f\x7f]")


def is_reserved(name: str) -> bool:
    """Whether exl keeps something under this name in a model's folder: `.exl.json`, `.exl-download/`."""
    return name.lower().startswith(".exl")


@dataclass(frozen=True)
class File:
    """A file of a repository.

    Attributes:
        name: its path in the repository.
        size: bytes.
        blob_id: git's SHA-1 of it (of the pointer, where it is an LFS file); empty where unknown.
        sha256: of the content, for LFS files; empty for others.

    Raises:
        ValueError: a name or hash that must not become part of a path, or a size that cannot be.
    """

    name: str
    size: int
    blob_id: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if _UNSAFE.search(self.name):
            raise ValueError(f"a file named {brief(self.name)!r}, which could be written outside its folder")
        # Half a character (a lone surrogate) cannot be encoded, which is a ValueError too.
        encoded = self.name.encode()
        if len(encoded) > _LONGEST_NAME or any(len(part) > _LONGEST_PART for part in encoded.split(b"/")):
            raise ValueError(f"a file named {brief(self.name)!r}, which is too long")
        if type(self.size) is not int or not 0 <= self.size <= _LARGEST:
            raise ValueError(f"{self.name} of {brief(repr(self.size))} bytes")
        for value, digits in ((self.blob_id, 40), (self.sha256, 64)):
            if value and not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
                raise ValueError(f"{self.name} with {brief(value)!r} for a hash")

    @property
    def identity(self) -> str:
        """The hash of the content: its SHA-256, else its git id, else empty."""
        return self.sha256 or self.blob_id

    def digest(self, content: bytes = b"") -> Any:
        """A hashlib object to feed the content to, or the rest of it, for `is_right`.

        git names a file by the SHA-1 of "blob", its length, a zero byte and its content.
        """
        if self.sha256 or not self.blob_id:
            return hashlib.sha256(content)
        return hashlib.sha1(f"blob {self.size}\0".encode() + content, usedforsecurity=False)

    def is_right(self, digest: Any) -> bool:
        """Whether a digest of the whole content is this file's; true where no hash is known."""
        return not self.identity or digest.hexdigest() == self.identity

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has this content; where no hash is known, this size. DiskError if unreadable."""
        digest = self.digest()
        with os_errors(f"cannot read {path}", "check its permissions"):
            if not path.is_file() or path.stat().st_size != self.size:
                return False
            with path.open("rb") as stream:
                while self.identity and (block := stream.read(_BLOCK)):
                    digest.update(block)
        return self.is_right(digest)


def check_commit(commit: str) -> str:
    """The commit, unless it is none: ValueError."""
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40,64}", commit):
        raise ValueError(f"{brief(str(commit))!r} for a commit")
    return commit


@dataclass(frozen=True)
class Listing:
    """All files of a repository at the commit that its revision stands for, and the model card's licence, or empty.

    Raises:
        ValueError: a commit or files that no git repository has.
    """

    repository: Repository
    commit: str
    files: tuple[File, ...]
    license: str = ""

    def __post_init__(self) -> None:
        check_commit(self.commit)
        # In this order a folder comes right before its files.
        paths = sorted(file.name.split("/") for file in self.files)
        for path, after in pairwise(paths):
            if after[: len(path)] == path:
                raise ValueError(f"{'/'.join(path)!r} twice in its list of files")


@dataclass(frozen=True)
class Choice:
    """Which files are wanted: patterns that replace exl's own choice (empty for that), and patterns to leave out."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


ALL_NEEDED = Choice()


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)


def is_pickle(name: str) -> bool:
    """Whether opening the file can run code."""
    return _PICKLE.fullmatch(name.lower()) is not None


def select(files: Sequence[File], choice: Choice) -> list[File]:
    """The files of a listing that are wanted; never a pickled one, nor one with a name that exl keeps for itself."""

    def is_chosen(name: str) -> bool:
        if is_pickle(name) or is_reserved(name) or matches(name, choice.exclude):
            return False
        if choice.include:
            return matches(name, choice.include)
        return bool(_NEEDED_BELOW.fullmatch(name) if "/" in name else _NEEDED.fullmatch(name.lower()))

    chosen = [file for file in files if is_chosen(file.name)]
    if choice.include:
        return chosen
    weights = {file.name for file in chosen if file.name.endswith(".safetensors")}
    # Mistral's repositories carry the same weights twice, once in its own naming.
    twins = {name for name in weights if name.startswith("consolidated")}
    return [file for file in chosen if file.name not in twins] if twins < weights else chosen


def weight_bytes(files: Sequence[File]) -> int:
    """Bytes of the safetensors files."""
    return sum(file.size for file in files if file.name.endswith(".safetensors"))


def check_runnable(listing: Listing, chosen: Sequence[File], choice: Choice, config: dict[str, Any]) -> None:
    """Refuse, before anything large is fetched, what exl could not run afterwards.

    Raises:
        UnsupportedModelError: other weights than exl runs.
        UsageError: the patterns choose nothing.
        DownloadError: a revision without weights.
    """
    where, include = str(listing.repository), param("include")
    if not chosen:
        raise UsageError(f"no file in {where} matches", f"list its files with {include} '*' {param('dry_run')}")
    if choice.include:
        return
    refuse_method(Path(where), quantization_of(config))
    if weight_bytes(chosen):
        if not config:
            raise DownloadError(
                f"{where} has no config.json, which is needed to run its weights",
                f"to download it anyway, use {include} '*'",
            )
        return
    names = [file.name.lower() for file in listing.files]
    if any(name.endswith(".gguf") for name in names):
        raise UnsupportedModelError(f"{where} has GGUF weights, which exl does not support", "use llama.cpp or ollama")
    if any(is_pickle(name) for name in names):
        raise UnsupportedModelError(
            f"{where} has only pickled weights, which exl never downloads because they can run code when opened",
            "look for a safetensors version of the model",
        )
    raise DownloadError(
        f"{where} has no weights", f"they may be in a branch: exl download {listing.repository.id} --branches"
    )
