"""Which repository and revision a text means."""

from __future__ import annotations

import re
from dataclasses import dataclass

from exl_cli.errors import UsageError, param

# The Hub's own rule for both halves of a name. A revision is a branch, a tag, a commit or refs/pr/N.
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_REVISION = r"[\w][\w./+@-]*"
_ID = rf"(?P<owner>{_PART})/(?P<name>{_PART})"
_NAME = re.compile(rf"{_ID}(?::(?P<revision>{_REVISION}))?", re.ASCII)
_URL = re.compile(rf"https?://[^/]+/{_ID}(?:/tree/(?P<revision>{_REVISION}))?/?", re.ASCII)
_LONGEST = 96


@dataclass(frozen=True)
class Repository:
    """A model repository at a revision: a branch, a tag or a commit."""

    owner: str
    name: str
    revision: str = "main"

    @property
    def id(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def folder(self) -> str:
        """The name of its folder: the notebook's `owner_name`, with `@revision` for anything but main."""
        suffix = "" if self.revision == "main" else "@" + self.revision.replace("/", "_")
        return f"{self.owner}_{self.name}{suffix}"

    def __str__(self) -> str:
        return self.id if self.revision == "main" else f"{self.id}:{self.revision}"


def parse(text: str, revision: str | None = None) -> Repository | None:
    """The repository that a text names, as `owner/name[:revision]` or as the address of its page; None for neither.

    Raises:
        UsageError: `revision` is none, or another than the text's.
    """
    match = _NAME.fullmatch(text) or _URL.fullmatch(text)
    if match is None or len(match["owner"]) + len(match["name"]) >= _LONGEST or ".." in match[0]:
        return None
    if "--" in match["owner"] + match["name"] or match["name"].endswith(".git"):
        return None
    inside = match["revision"]
    if inside and revision and inside != revision:
        raise UsageError(f"{text} names revision {inside}, but {param('revision')} is {revision}", "give one revision")
    chosen = revision or inside or "main"
    if len(chosen) > _LONGEST:
        raise UsageError(f"a revision cannot have {len(chosen):,} characters", "give a branch, a tag or a commit")
    if not re.fullmatch(_REVISION, chosen, re.ASCII) or ".." in chosen:
        raise UsageError(f"{chosen!r} is not a revision", "give a branch, a tag or a commit of the repository")
    return Repository(match["owner"], match["name"], chosen)


def require(text: str, revision: str | None = None) -> Repository:
    """Like `parse`, but UsageError if the text names no repository."""
    if repository := parse(text, revision):
        return repository
    raise UsageError(f"{text!r} is not a repository name", "write it as owner/name or owner/name:revision")
