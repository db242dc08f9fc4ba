"""`exl download`: fetch a model from the Hub, or list its files and branches."""

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
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REVISION", help="Branch, tag or commit.")
    ] = None,
    include: Annotated[
        list[str] | None,
        _files(
            "--include",
            metavar="PATTERN",
            help="Download only files matching this pattern, instead of exl's selection; repeatable.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, _files("--exclude", metavar="PATTERN", help="Skip files matching this pattern; repeatable.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="TOKEN", help="Access token. \\[default: the one from hf auth login]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Download everything again, at the latest commit.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check the hashes of files already downloaded.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="List the files and how much of each is already downloaded, without downloading anything."
        ),
    ] = False,
    branches: Annotated[
        bool, _branches_option("--branches", help="List the branches with their format, size and GPU memory.")
    ] = False,
    context: Annotated[
        int, _branches_option("--context", metavar="TOKENS", min=1, help="Context length for the memory estimate.")
    ] = 4096,
    cache: Annotated[CacheType, _branches_option("--cache", help="KV cache type for the memory estimate.")] = "fp16",
    vram: Annotated[
        str | None,
        _branches_option(
            "--vram",
            metavar="GIB",
            help="GPU memory in GiB, e.g. 24, or 24,24 for two GPUs. \\[default: this machine's]",
        ),
    ] = None,
    models_dir: ModelsDir = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Download a model from the Hugging Face Hub, resuming an earlier download.

    Only the files needed to run the model are downloaded. Prints the model's folder on stdout.
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
        note = f"GPU memory: {where}" if gpus else "no NVIDIA GPU found; use --vram 24 to check for one with 24 GiB"
    else:
        cards = _cards(vram)
        note = f"GPU memory: {' + '.join(units.gib(card) for card in cards)}"
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
