"""What the commands about models show: tables of files, branches and models, and sizes as people write them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exl_cli.models.folders import BUILTIN
from exl_cli.models.memory import Estimate, Gpu, fits, shape_of
from exl_cli.system.units import gib, parameters, size
from exl_cli.ui.console import Console, harmless

if TYPE_CHECKING:
    from rich.table import Table

    from exl_cli.models.folders import Entry
    from exl_cli.models.hub.branches import Branch
    from exl_cli.models.hub.download import Plan

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_WIDEST = 100_000
_PREVIEW_LINES, _PREVIEW_WIDTH = 12, 160


def table(*titles: str, right: Sequence[str] = ()) -> Table:
    """An empty table with these columns, those in `right` aligned to the right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in titles:
        made.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return made


def show(console: Console, made: Table) -> None:
    """A table as asked-for data: on stdout, fitted to a terminal, and in a pipe as wide as each line needs to be."""
    if console.out.is_terminal:
        console.out.print(made, markup=False)
        return
    from rich.console import Console as RichConsole

    text = io.StringIO()
    RichConsole(file=text, width=_WIDEST).print(made, markup=False)
    console.text("\n".join(line.rstrip(" ") for line in text.getvalue().split("\n")))


def cells(*values: object) -> list[Any]:
    """Cells of a row: text from outside is neither markup nor a command to the terminal."""
    from rich.text import Text

    return [Text(harmless(str(value))) for value in values]


def files_table(plan: Plan) -> Table:
    """What a download would fetch."""
    made = table("File", "Size", "Here", right=("Size", "Here"))
    words = {"here": "yes", "staged": "yes", "missing": "no"}
    for item in plan.items:
        made.add_row(*cells(item.file.name, size(item.file.size), words.get(item.state, size(item.bytes_here))))
    return made


def branches_table(branches: Sequence[Branch], context: int, cache: str) -> Table:
    """The branches of a repository and what each would take."""
    made = table("Branch", "Format", "Download", f"VRAM at {context:,}, {cache}", "Fits", right=("Download",))
    for branch in branches:
        vram = "-" if branch.vram_bytes is None else gib(branch.vram_bytes)
        fits = {True: "yes", False: "no", None: "?"}[branch.fits] if branch.vram_bytes is not None else "-"
        download = size(branch.download_bytes) if branch.download_bytes else "-"
        made.add_row(*cells(branch.name, branch.problem or branch.format_name, download, vram, fits))
    return made


def models_table(entries: Sequence[Entry]) -> Table:
    """The models that are here."""
    made = table(
        "Name", "Format", "bpw", "Params", "Size", "Context", "Where", right=("bpw", "Params", "Size", "Context")
    )
    for entry in entries:
        info = entry.info
        if info is None:
            here = size(entry.size_bytes)
            if not entry.complete and entry.marker and entry.marker.total:
                here = f"{here} of {size(entry.marker.total)}"
            made.add_row(*cells(entry.name, entry.problem, "", "", here, "", entry.path))
            continue
        bits, context = f"{info.bits_per_weight:.2f}", f"{info.context_length:,}"
        row = (
            entry.name,
            info.format_name,
            bits,
            parameters(info.parameters),
            size(entry.size_bytes),
            context,
            "built in" if entry.name == BUILTIN else entry.path,
        )
        made.add_row(*cells(*row))
    return made


def facts_table(entry: Entry, licence: str, why_not: str) -> Table:
    """Everything known of one model, a fact to a row."""
    from rich.table import Table

    info, source = entry.info, entry.marker
    if info is None:
        raise ValueError("only a model that can be run has facts")
    shape = shape_of(info)
    dimensions = (
        f"{shape.layers} layers, hidden {shape.hidden:,}, inner {shape.inner:,}, {shape.heads} heads, "
        f"{shape.kv_heads} key/value heads of {shape.head_dim}, vocabulary {shape.vocabulary:,}"
        if shape
        else ""
    )
    facts = {
        "Name": entry.name,
        "Folder": entry.path,
        "Repository": f"{source.repository}, revision {source.revision}, commit {source.commit}" if source else "",
        "Format": info.format_name + (f", {info.head_bits}-bit head" if info.head_bits else ""),
        "Bits per weight": f"{info.bits_per_weight:.2f}",
        "Architecture": info.architecture,
        "Parameters": f"{info.parameters:,}",
        "Dimensions": dimensions,
        "Context": f"{info.context_length:,} tokens",
        "Weights": size(info.size_bytes),
        "On disk": size(entry.size_bytes),
        "Licence": licence or "not stated",
        "Sampling": ", ".join(f"{key} {value}" for key, value in info.generation_config.items() if key in _SAMPLING),
        "Chat template": "yes" if info.has_chat_template else "no",
        "Engine": f"CPU only: {why_not}" if why_not else "exllamav2 on NVIDIA GPUs, or CPU",
    }
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(no_wrap=True, style="dim")
    made.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            made.add_row(*cells(name, value))
    return made


def estimates_table(estimates: Mapping[int, Mapping[str, Estimate]], gpus: Sequence[Gpu]) -> Table:
    """GPU memory by context and cache type; marked where it does not fit the GPUs here."""
    kinds = list(next(iter(estimates.values())))
    made = table("Estimated VRAM at", *(f"{kind} cache" for kind in kinds), right=[f"{kind} cache" for kind in kinds])
    totals = [gpu.total for gpu in gpus]
    for context, row in estimates.items():
        marks = ("" if not gpus or fits(needed, totals) else " (too much)" for needed in row.values())
        values = (gib(needed.total) + mark for needed, mark in zip(row.values(), marks, strict=True))
        made.add_row(*cells(f"{context:,} tokens", *values))
    return made


def preview(console: Console, title: str, text: str) -> None:
    """The first lines of a long text."""
    lines = text.strip().splitlines()
    shown = [
        line if len(line) <= _PREVIEW_WIDTH else f"{line[: _PREVIEW_WIDTH - 1]}…" for line in lines[:_PREVIEW_LINES]
    ]
    more = f"\n… {len(lines) - _PREVIEW_LINES} more lines" if len(lines) > _PREVIEW_LINES else ""
    console.text(harmless(f"{title}\n" + "\n".join(f"  {line}".rstrip() for line in shown) + f"{more}\n"))


def confirm(console: Console, question: str, *, default: bool = True) -> bool:
    """Ask a person; an empty answer is the default, the end of input a no."""
    choices = "[Y/n]" if default else "[y/N]"
    while True:
        console.err.print(harmless(f"{question} {choices} "), end="", markup=False, highlight=False, soft_wrap=True)
        try:
            answer = input().strip().lower()
        except EOFError:
            return False
        if answer in ("", "y", "yes", "n", "no"):
            return default if not answer else answer.startswith("y")
