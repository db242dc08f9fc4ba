"""The quantizations in a repository's branches, as its small JSON files and lists of files show them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl_cli.errors import ExlError
from exl_cli.models import memory, placement
from exl_cli.models.config import context_length_of, quantization_of
from exl_cli.models.hub.client import Hub
from exl_cli.models.hub.files import Choice, Listing, check_runnable, select, weight_bytes
from exl_cli.models.hub.names import Repository
from exl_cli.models.hub.transfer import run_all
from exl_cli.models.info import Format, ModelInfo
from exl_cli.models.load_options import CacheType
from exl_cli.system.units import GIB, gib

if TYPE_CHECKING:
    from exl_cli.models.hub.download import Plan

_USUAL_CONTEXT = 4096
# Raised where the values in a config.json have other types, or other magnitudes, than a model's.
_ODD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Branch:
    """One branch as `--json` lists it; None where a value is unknown or the quantization has none.

    Attributes:
        format_name: format and bits in words; empty where there is a problem.
        bits: bits per weight.
        vram_bytes: estimated.
        fits: whether that fits the GPUs here.
        problem: why exl would not run it; empty where it would.
    """

    name: str
    commit: str
    format_name: str = ""
    bits: float | None = None
    head_bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    context_length: int | None = None
    download_bytes: int = 0
    vram_bytes: int | None = None
    fits: bool | None = None
    problem: str = ""


def describe(hub: Hub, repository: Repository, context: int, cache: CacheType, cards: Sequence[int]) -> list[Branch]:
    """All branches, main first.

    Memory is estimated for `context` tokens, or the model's own context where that is less; `cards` are the bytes of
    each GPU, none where that is not known. Errors: see `failures.explain`.
    """
    described: dict[str, Branch] = {}

    def describe_branch(name: str, commit: str) -> None:
        place = replace(repository, revision=name)
        try:
            described[name] = _describe(hub, hub.listing(place, commit=commit), context, cache, cards)
        except ExlError as error:  # one bad branch is no reason to hide the others
            described[name] = Branch(name, commit, problem=error.message.replace(f" of {place}", ""))

    with hub.explained(repository):
        branches = hub.branches(repository)
        run_all([partial(describe_branch, *branch) for branch in branches], threading.Event())
    return [described[name] for name, _ in branches]


def _describe(hub: Hub, listing: Listing, context: int, cache: CacheType, cards: Sequence[int]) -> Branch:
    chosen = select(listing.files, Choice())
    weights = weight_bytes(chosen)
    config = hub.read_config(listing)
    branch = Branch(
        listing.repository.revision, listing.commit, download_bytes=sum(file.size for file in chosen) if weights else 0
    )
    try:
        check_runnable(listing, chosen, Choice(), config)
        info = from_config(listing, config, weights)
        needed = memory.estimate(info, min(context, info.context_length), cache)
    except ExlError as error:
        return replace(branch, problem=error.message.removeprefix(f"{listing.repository} "))
    except _ODD:
        return replace(branch, problem="config.json does not describe a model")
    return replace(
        branch,
        format_name=info.format_name,
        bits=info.bits_per_weight or None,
        head_bits=info.head_bits,
        group_size=info.group_size,
        desc_act=info.desc_act if info.format == "gptq" else None,
        context_length=info.context_length,
        vram_bytes=needed.total if needed else None,
        fits=placement.fits(needed, cards) if needed and cards else None,
    )


def from_config(listing: Listing, config: dict[str, Any], size_bytes: int) -> ModelInfo:
    """A model whose weights are not here, from its config.json and the bytes of its weights."""
    quantization = quantization_of(config)
    method = str(quantization.get("quant_method", "")).lower()
    format_: Format = "gptq" if method == "gptq" else "float"
    if method == "exl2" or (not method and _looks_like_exl2(listing)):
        format_ = "exl2"
    stored = 32.0 if "float32" in (config.get("torch_dtype"), config.get("dtype")) else 16.0
    bits = quantization.get("bits", stored if format_ == "float" else None)
    group, head = quantization.get("group_size"), quantization.get("head_bits")
    architectures = config.get("architectures")
    info = ModelInfo(
        name=str(listing.repository),
        path=Path(listing.repository.folder),
        format=format_,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        parameters=0,
        bits_per_weight=float(bits) if isinstance(bits, (int, float)) else 0.0,
        context_length=context_length_of(config),
        size_bytes=size_bytes,
        tensors={},
        group_size=group if isinstance(group, int) else None,
        desc_act=bool(quantization.get("desc_act", False)),
        head_bits=head if isinstance(head, int) else None,
        config=config,
    )
    return info if info.bits_per_weight else replace(info, bits_per_weight=_bits_from_size(info))


def _looks_like_exl2(listing: Listing) -> bool:
    """Files made before exllamav2 0.0.12 say nothing in config.json; its converter calls its output so."""
    return any(file.name.startswith("output") and file.name.endswith(".safetensors") for file in listing.files)


def _bits_from_size(info: ModelInfo) -> float:
    """Bits per weight of the layers, computed from the size of the files; 0 where the dimensions are unknown."""
    shape = memory.shape_of(info)
    if shape is None:
        return 0.0
    embeddings = shape.vocabulary * shape.hidden
    layer = shape.hidden * (2 * shape.queries + 2 * shape.keys + 3 * shape.inner)
    # The embeddings are float16, the head has 6 bits unless someone chose otherwise.
    return max(0.0, 8 * info.size_bytes - 22 * embeddings) / (shape.layers * layer)


def fit_warning(plan: Plan, gpus: Sequence[memory.Gpu]) -> str:
    """A line, before the download, about a model that will not fit the GPUs here; else empty."""
    if not gpus or not plan.config:
        return ""
    try:
        info = from_config(plan.listing, plan.config, weight_bytes([item.file for item in plan.items]))
        needed = memory.estimate(info, min(_USUAL_CONTEXT, info.context_length))
    except (ExlError, *_ODD):
        return ""
    if needed is None or placement.fits(needed, [gpu.total for gpu in gpus]):
        return ""
    have = " + ".join(f"{gpu.total / GIB:.0f}" for gpu in gpus)
    return (
        f"{plan.wanted.repository} will need about {gib(needed.total)} of GPU memory, but this machine has {have} GiB; "
        f"exl download {plan.wanted.repository.id} --branches shows what fits"
    )
