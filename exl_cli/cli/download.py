"""`exl download`: a model from the Hub, or a look at what there is."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from exl_cli.api import records
from exl_cli.api.download import fetch
from exl_cli.cli.options import Json, ModelsDir, Quiet
from exl_cli.errors import UsageError
from exl_cli.models import folders, memory
from exl_cli.models.hub import names
from exl_cli.models.hub.download import Wanted, prepare
from exl_cli.models.hub.files import Choice
from exl_cli.models.load_options import CacheType, parse_gpu_split
from exl_cli.system import units
from exl_cli.ui import models
from exl_cli.ui.console import Console
from exl_cli.ui.progress import finished, transfers

_files = partial(typer.Option, rich_help_panel="Files")
_branches_option = partial(typer.Option, rich_help_panel="With --branches")


def download(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="owner/name or owner/name:revision.")],
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit.")] = None,
    include: Annotated[
        list[str] | None, _files("--include", help="Files that match, instead of exl's choice; repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, _files("--exclude", help="Leave out files that match; repeatable.")] = None,
    token: Annotated[str | None, typer.Option("--token", help="Access token, instead of hf auth login's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch everything anew, from the newest commit.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read what is here again and compare hashes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and what of them is here.")] = False,
    branches: Annotated[
        bool, _branches_option("--branches", help="Show the branches: bits, bytes, GPU memory.")
    ] = False,
    context: Annotated[int, _branches_option("--context", min=1, help="Tokens to estimate GPU memory for.")] = 4096,
    cache: Annotated[CacheType, _branches_option("--cache", help="KV cache to estimate GPU memory for.")] = "fp16",
    vram: Annotated[
        str | None, _branches_option("--vram", metavar="GIB", help="GPU memory to fit, as 24 or 24,24 [the GPUs here].")
    ] = None,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Download a model from the Hub: the files that inference needs, resumed wherever it stopped.

    Prints the folder on stdout.
    """
    console = Console(quiet=quiet)
    repository = names.require(model, revision)
    if branches:
        _branches(console, repository, token, context, cache, vram, as_json)
        return
    choice = Choice(tuple(include or ()), tuple(exclude or ()))
    wanted = Wanted(repository, folders.models_dir(models_dir), choice, force, verify)
    if dry_run:
        _dry_run(console, wanted, token, as_json)
        return
    outcome = fetch(wanted, transfers(console), token)
    finished(console, outcome)
    if as_json:
        console.data(records.outcome(outcome))
    else:
        console.text(f"{outcome.wanted.folder}\n")


def _branches(
    console: Console,
    repository: names.Repository,
    token: str | None,
    context: int,
    cache: CacheType,
    vram: str | None,
    as_json: bool,
) -> None:
    from exl_cli.models.hub.branches import describe
    from exl_cli.models.hub.client import Hub

    if vram is None:
        gpus = memory.gpus()
        cards = [gpu.total for gpu in gpus]
        where = " + ".join(f"{gpu.name}, {units.gib(gpu.total)}" for gpu in gpus)
        note = f"fits: on {where}" if gpus else "no NVIDIA GPU is here to fit; say --vram 24 for one of 24 GiB"
    else:
        cards = _cards(vram)
        note = f"fits: in {' + '.join(units.gib(card) for card in cards)}"
    described = describe(Hub(token, console.note), repository, context, cache, cards)
    if as_json:
        console.data([asdict(branch) for branch in described])
        return
    models.show_branches(console, described, context, cache)
    console.note(note)


def _cards(text: str) -> list[int]:
    try:
        sizes = parse_gpu_split(text)
    except UsageError:
        sizes = None
    if sizes is None:
        raise UsageError(f"--vram {text!r} is not a number of GiB", "write it as 24, or 24,24 for two GPUs")
    return [round(count * units.GIB) for count in sizes]


def _dry_run(console: Console, wanted: Wanted, token: str | None, as_json: bool) -> None:
    from exl_cli.models.hub.client import Hub

    plan = prepare(Hub(token, console.note), wanted)
    if as_json:
        console.data(records.plan(plan))
        return
    models.show_files(console, plan)
    remaining, total = units.size(plan.remaining), units.size(plan.total)
    console.note(f"{len(plan.items)} files, {total}; {remaining} to download to {wanted.folder}")
    if plan.left_out:
        console.note(plan.left_out)
