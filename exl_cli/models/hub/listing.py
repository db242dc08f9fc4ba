"""Which files of a revision to fetch: by default what inference needs, and never a pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from exl_cli.errors import DownloadError, UnsupportedModelError, UsageError, param
from exl_cli.models.hub.client import Hub, Listing
from exl_cli.models.hub.store import File
from exl_cli.models.info import refuse_method

# Files in the repository's root; engines read no others.
_NEEDED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*.txt",
    "merges*.txt",
    "license*",
    "licence*",
    "copying*",
    "notice*",
    "use_policy*",
    "readme.md",
)
_NEEDED_BELOW = ("additional_chat_templates/*.jinja",)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill")


@dataclass(frozen=True)
class Choice:
    """Which files are wanted.

    Attributes:
        include: patterns that replace exl's own choice; empty for that.
        exclude: patterns of files to leave out.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)


def is_pickle(name: str) -> bool:
    """Whether a file is of a kind that can run code when it is opened."""
    return _matches(name.lower(), _PICKLES)


def select(files: Sequence[File], choice: Choice) -> list[File]:
    """The files of a listing that are wanted, those pickled left out whatever the choice says."""
    safe = [file for file in files if not is_pickle(file.name) and not _matches(file.name, choice.exclude)]
    if choice.include:
        return [file for file in safe if _matches(file.name, choice.include)]
    chosen = [file for file in safe if _is_needed(file.name)]
    # Mistral's repositories carry the same weights twice, once in its own naming.
    weights = [file for file in chosen if file.name.endswith(".safetensors")]
    twins = [file for file in weights if file.name.startswith("consolidated")]
    return [file for file in chosen if file not in twins] if len(twins) < len(weights) else chosen


def _is_needed(name: str) -> bool:
    if "/" in name:
        return _matches(name, _NEEDED_BELOW)
    return _matches(name.lower(), _NEEDED)


def left_out_pickles(files: Sequence[File], choice: Choice) -> list[str]:
    """Names of the pickled files that the user asked for with `include`."""
    return [file.name for file in files if is_pickle(file.name) and _matches(file.name, choice.include)]


def weight_bytes(files: Sequence[File]) -> int:
    """Bytes of the safetensors files."""
    return sum(file.size for file in files if file.name.endswith(".safetensors"))


def read_config(hub: Hub, listing: Listing) -> dict[str, Any]:
    """config.json of a revision, with `quantization_config` filled in from quantize_config.json where only that has it.

    Empty where the revision has no config.json.

    Raises:
        DownloadError: it is not a JSON object.
    """
    config = _read_json(hub, listing, "config.json")
    if config and not isinstance(config.get("quantization_config"), dict):
        older = _read_json(hub, listing, "quantize_config.json")
        if older:
            config["quantization_config"] = {"quant_method": "gptq", **older}
    return config


def _read_json(hub: Hub, listing: Listing, name: str) -> dict[str, Any]:
    file = next((file for file in listing.files if file.name == name), None)
    if file is None:
        return {}
    content = hub.read(listing, file)
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DownloadError(f"{name} of {listing.repository} is not a JSON object", "do not use this revision")
    return value


def check_runnable(listing: Listing, chosen: Sequence[File], choice: Choice, config: dict[str, Any]) -> None:
    """Refuse, before anything large is fetched, what exl could not run afterwards.

    Raises:
        UnsupportedModelError: other weights than exl runs.
        UsageError: the patterns choose nothing.
        DownloadError: a revision without weights.
    """
    where = str(listing.repository)
    if not chosen:
        raise UsageError(
            f"no file of {where} matches", f"look at its files with {param('include')} '*' {param('dry_run')}"
        )
    if choice.include:
        return
    refuse_method(Path(where), config.get("quantization_config") or {})
    if weight_bytes(chosen):
        if not config:
            raise DownloadError(
                f"{where} holds no config.json, without which its weights cannot be run",
                f"{param('include')} '*' downloads it all the same",
            )
        return
    names = [file.name.lower() for file in listing.files]
    if any(name.endswith(".gguf") for name in names):
        raise UnsupportedModelError(f"{where} holds GGUF weights, which exl does not run", "use llama.cpp or ollama")
    if any(is_pickle(name) for name in names):
        raise UnsupportedModelError(
            f"{where} holds pickled weights only; a pickle can run code when it is opened, so exl never fetches one",
            "look for a safetensors version of the model",
        )
    look = f"exl download {listing.repository.id} --branches"
    raise DownloadError(f"{where} holds no weights", f"they may be in its branches: {look}")
