"""`exl doctor`: what stands between this machine and the first token, and the command that mends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from exl_cli.cli.options import Json, ModelsDir
from exl_cli.doctor.examine import Examination
from exl_cli.doctor.machine import Terminal
from exl_cli.models import folders
from exl_cli.system.version import installed_version
from exl_cli.ui.console import Console, flags
from exl_cli.ui.doctor import Checklist


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
            min=0.1,
            max=86_400,
            help="Seconds that a check may take; loading MODEL has five times that.",
        ),
    ] = 60.0,
    models_dir: ModelsDir = None,
    as_json: Json = False,
) -> None:
    """Check this machine, and MODEL if given: what was found, and the command that mends what is not well.

    The exit code is 0 where exl run works on the GPU, 12 where it works on the CPU only, 13 where it does not work.
    """
    console = Console()
    checklist = Checklist(console)
    err = console.err
    terminal = Terminal(console.out.encoding, err.is_terminal, err.width, err.color_system)
    visit = Examination(model, models_dir, timeout, terminal, checklist.telling)
    if as_json:
        found = [
            replace(finding, found=flags(finding.found), fix=flags(finding.fix)).to_dict()
            for finding in visit.findings()
        ]
        console.data(
            {
                "verdict": visit.verdict,
                "exit_code": int(visit.exit_code),
                "summary": visit.summary(),
                "findings": found,
                "exl_version": installed_version(),
            }
        )
    else:
        with checklist.waiting():
            for finding in visit.findings():
                checklist.show(finding)
        checklist.conclude(visit.summary())
    if visit.exit_code:
        raise typer.Exit(visit.exit_code)
