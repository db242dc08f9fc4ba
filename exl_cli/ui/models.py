"""Tables of files, branches and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from exl_cli.models.folders import BUILTIN
from exl_cli.models.memory import CUDA_CONTEXT, Estimate, Gpu, shape_of
from exl_cli.models.placement import Share, fits
from exl_cli.system.units import gib, parameters, size
from exl_cli.ui.console import Console

if TYPE_CHECKING:
    from exl_cli.models.folders import Entry
    from exl_cli.models.hub.branches import Branch
    from exl_cli.models.hub.download import Plan
    from exl_cli.models.info import ModelInfo

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_PREVIEW_LINES, _PREVIEW_WIDTH = 12, 160


def show_files(console: Console, plan: Plan) -> None:
    """Print the files of a download plan."""
    words = {"here": "yes", "staged": "yes", "missing": "no"}
    rows = ((item.file.name, size(item.file.size), words.get(item.state, size(item.bytes_here))) for item in plan.items)
    console.table(console.out, ("File", "Size", "Downloaded"), rows, right=("Size", "Downloaded"), whole=("File",))


def show_branches(console: Console, branches: Sequence[Branch], context: int, cache: str) -> None:
    """Print a repository's branches with format, size and estimated VRAM."""
    titles = "Branch", "Format", "Download", f"VRAM at {context:,}, {cache}", "Fits"
    rows = []
    for branch in branches:
        vram, fits = "-", "-"
        if branch.vram_bytes is not None:
            vram, fits = gib(branch.vram_bytes), {True: "yes", False: "no", None: "?"}[branch.fits]
        download = size(branch.download_bytes) if branch.download_bytes else "-"
        rows.append((branch.name, branch.problem or branch.format_name, download, vram, fits))
    console.table(console.out, titles, rows, right=titles[2:3], whole=titles[:1])


def show_models(console: Console, entries: Sequence[Entry]) -> None:
    """Print the local models."""
    titles = "Name", "Format", "bpw", "Params", "Size", "Context", "Location"
    optional = "Location", "Params", "bpw", "Context", "Size"
    console.table(console.out, titles, map(_model_row, entries), right=titles[2:6], whole=titles[:1], optional=optional)


def _model_row(entry: Entry) -> tuple[object, ...]:
    info, here = entry.info, size(entry.size_bytes)
    if info is None:
        if not entry.complete and entry.marker and entry.marker.total:
            here = f"{here} of {size(entry.marker.total)}"
        return entry.name, entry.problem.removeprefix(f"{entry.path}/"), "", "", here, "", entry.path
    where = "built in" if entry.name == BUILTIN else entry.path
    bits, count, context = f"{info.bits_per_weight:.2f}", parameters(info.parameters), f"{info.context_length:,}"
    return entry.name, info.format_name, bits, count, here, context, where


def show_facts(console: Console, info: ModelInfo, entry: Entry, licence: str, why_not: str) -> None:
    """Print the facts about one model."""
    from rich.text import Text

    shape, source = shape_of(info), entry.marker
    dimensions = (
        f"{shape.layers} layers, hidden size {shape.hidden:,}, MLP size {shape.inner:,}, {shape.heads} heads, "
        f"{shape.kv_heads} KV heads of size {shape.head_dim}, vocabulary {shape.vocabulary:,}"
        if shape
        else ""
    )
    origin = f"{source.repository.id}, revision {source.repository.revision}, commit {source.commit}" if source else ""
    facts = {
        "Name": entry.name,
        "Folder": entry.path,
        "Repository": origin,
        "Format": info.format_name + (f", {info.head_bits}-bit head" if info.head_bits else ""),
        "Bits per weight": f"{info.bits_per_weight:.2f}",
        "Architecture": info.architecture,
        "Parameters": f"{info.parameters:,}",
        "Dimensions": dimensions,
        "Context": _context(info),
        "Weights": size(info.size_bytes),
        "On disk": size(entry.size_bytes),
        "Licence": licence or "unknown",
        "Sampling": ", ".join(f"{key} {value}" for key, value in info.generation_config.items() if key in _SAMPLING),
        "Chat template": "yes" if info.has_chat_template else "no",
        "Engine": f"CPU only: {why_not}" if why_not else "exllamav2 on NVIDIA GPUs, or the CPU",
    }
    rows = [(Text(name, "dim", no_wrap=True), value) for name, value in facts.items() if value]
    console.table(console.out, ("", ""), rows, box=None)


def show_estimates(console: Console, estimates: Mapping[int, Mapping[str, Estimate]], gpus: Sequence[Gpu]) -> None:
    """Print estimated GPU memory by context and cache type, marking what does not fit this machine's GPUs."""
    totals = [gpu.total for gpu in gpus]
    rows = (
        (
            f"{context:,} tokens",
            *(gib(n.total) + ("" if not gpus or fits(n, totals) else " (too large)") for n in row.values()),
        )
        for context, row in estimates.items()
    )
    caches = [f"{kind} cache" for kind in next(iter(estimates.values()))]
    console.table(console.out, ("Estimated VRAM at", *caches), rows, right=caches)


def show_shares(console: Console, shares: Sequence[Share], gpus: Sequence[Gpu], context: int) -> None:
    """Print what each GPU would hold of a model that needs several."""
    rows = (
        (
            f"{share.gpu} {gpus[share.gpu].name}",
            f"{share.layers.start} to {share.layers.stop - 1}",
            f"{gib(share.allocated + CUDA_CONTEXT)} of {gib(gpus[share.gpu].total)}",
        )
        for share in shares
    )
    titles = "GPU", "Layers", f"VRAM at {context:,} tokens, fp16 cache"
    console.table(console.out, titles, rows, right=titles[1:])


def preview(console: Console, title: str, text: str) -> None:
    """Print the first lines of a long text."""
    lines = text.strip().splitlines()
    shown = [
        line if len(line) <= _PREVIEW_WIDTH else f"{line[: _PREVIEW_WIDTH - 1]}…" for line in lines[:_PREVIEW_LINES]
    ]
    more = f"\n… {len(lines) - _PREVIEW_LINES} more lines" if len(lines) > _PREVIEW_LINES else ""
    console.text(f"{title}\n" + "\n".join(f"  {line}".rstrip() for line in shown) + f"{more}\n")


def confirm(console: Console, question: str, *, default: bool = True) -> bool:
    """Ask a yes/no question. An empty answer is the default, EOF is no."""
    choices = "[Y/n]" if default else "[y/N]"
    while True:
        console.line(f"{question} {choices} ", end="")
        try:
            answer = input().strip().lower()
        except EOFError:
            return False
        if answer in ("", "y", "yes", "n", "no"):
            return default if not answer else answer.startswith("y")


def _context(info: ModelInfo) -> str:
    native = f"{info.context_length:,} tokens"
    if info.extended_length == info.context_length:
        return native
    return f"{native}, {info.extended_length:,} with RoPE scaling"
