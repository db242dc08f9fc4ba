"""`exl build`: compile exllamav2's CUDA extension."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exl_cli.cli.options import Json, Quiet
from exl_cli.engines.exllamav2.extension import build as extension
from exl_cli.engines.exllamav2.extension import compiled
from exl_cli.engines.exllamav2.extension.wheel import write_wheel
from exl_cli.errors import UsageError, os_errors
from exl_cli.system.interrupts import insist_on_interrupt
from exl_cli.system.units import clock_time
from exl_cli.ui.console import Console
from exl_cli.ui.progress import Build


def build(
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch", metavar="LIST", help="GPU architectures, e.g. 8.6 or sm_86,sm_90. \\[default: this machine's]"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Also write a wheel to this folder, for machines with the same Python, torch and GPU architecture: "
            "pip install FOLDER/exllamav2_ext-….whl.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            metavar="N",
            min=1,
            help="Compiler processes. \\[default: as many as cores and memory allow]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Recompile everything.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compile exllamav2's CUDA extension for this machine's GPU.

    This takes a few minutes, once per machine. exl run does it automatically if needed.
    """
    console = Console(quiet=quiet)
    archs = _archs(arch)
    torch = extension.torch_for_cuda()
    gpus = compiled.capabilities(ask_torch=not archs)
    if archs and (missing := compiled.uncovered(archs, gpus)):
        if out is None:
            raise UsageError(
                f"--arch {arch} does not include this machine's GPU ({compiled.sm(missing[0])})",
                f"add --out FOLDER to compile for another machine, or {compiled.sm(missing[0])} to the list",
            )
        gpus = []
    made = None if force else compiled.ready(torch, gpus, archs)
    result = extension.Result(*made) if made else None
    if result is None:
        with Build(console) as shown, insist_on_interrupt():
            result = extension.build(shown, archs=archs, max_jobs=jobs, again=force, gpus=gpus)
    library, facts = result.path, result.facts
    if result.compiled:
        where = f", tested on {', '.join(result.gpus)}" if result.gpus else ""
        console.note(
            f"compiled exllamav2's extension for {compiled.spoken(facts.archs)} in {clock_time(facts.seconds)}: "
            f"{result.compiled} files{where}; log: {result.log}"
        )
    else:
        on = f"on {facts.built[:10]} (--force recompiles it)"
        console.note(f"already compiled for {compiled.spoken(facts.archs)}, {on}")
    wheel = None
    if out is not None:
        with os_errors(f"cannot write the wheel to {out}", "choose another folder with --out"):
            wheel = write_wheel(library, facts, out)
        console.note(f"on the other machine: pip install {wheel.name}")
    if as_json:
        console.data({"library": str(library), "wheel": str(wheel) if wheel else None, **facts.to_dict()})
    else:
        console.text(f"{wheel or library}\n")


def _archs(text: str | None) -> tuple[str, ...]:
    try:
        return compiled.parse_archs(text or "")
    except ValueError as error:
        raise UsageError(f"--arch {str(error)!r} is not a GPU architecture", "write it as 8.6 or sm_86") from error
