"""`exl doctor`: check this machine, and say how to fix what is wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from exl_cli.cli.options import Json, ModelsDir
from exl_cli.doctor.doctor import Doctor
from exl_cli.doctor.machine import Terminal
from exl_cli.models import folders
from exl_cli.system.version import installed_version
from exl_cli.ui.console import Console, flags
from exl_cli.ui.doctor import Checklist, spelled


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Also check this model: a folder, a downloaded owner/name[:revision], or fable-7m.",
            autocompletion=folders.complete_model,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=0.1,
            max=86_400,
            help="Seconds per check; loading MODEL gets five times as long.",
        ),
    ] = 60.0,
    models_dir: ModelsDir = None,
    as_json: Json = False,
) -> None:
    """Check this machine and, optionally, a model, and print the commands that fix any problems.

    The exit code is 0 if exl run works on the GPU, 12 if it only works on the CPU, and 13 if it does not work.
    """
    console = Console()
    checklist = Checklist(console)
    err = console.err
    terminal = Terminal(console.out.encoding, err.is_terminal, err.width, err.color_system)
    examination = Doctor(model, models_dir, timeout, terminal, checklist.waiting_for)
    if as_json:
        results = [spelled(result).to_dict() for result in examination.results()]
        console.data(
            {
                "verdict": examination.verdict,
                "exit_code": int(examination.exit_code),
                "summary": flags(examination.summary()),
                "findings": results,
                "exl_version": installed_version(),
            }
        )
    else:
        with checklist.waiting():
            for result in examination.results():
                checklist.show(result)
        checklist.conclude(examination.summary())
    if examination.exit_code:
        raise typer.Exit(examination.exit_code)
