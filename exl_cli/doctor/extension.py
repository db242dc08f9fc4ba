"""Checks of exllamav2, its compiled extension, and the tools to compile it with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from exl_cli.doctor.check_result import CheckResult
from exl_cli.doctor.probes import Answer
from exl_cli.engines.exllamav2.extension import build, compiled, environment, failures, install_hints, jobs
from exl_cli.engines.exllamav2.extension.compiled import Capability, Extension
from exl_cli.engines.exllamav2.extension.toolchain import Tool, Toolchain

_WANTED = "0.3.2"

# The files of exllamav2 0.3.2's extension by the kinds that `jobs.weight` knows; the build itself counts the real ones.
_TYPICAL = (
    *["ext_bindings.o"] * 14,
    "quantize_func.o",
    *["sampling.o"] * 4,
    *["rope.cuda.o"] * 22,
    *["unit_exl2_1a.cuda.o"] * 3,
    *["unit_exl2_1b.cuda.o"] * 3,
    "exllamav2_ext.so",
)


def exllamav2() -> CheckResult:
    """The package."""
    version = environment.exllamav2_version()
    fix = install_hints.pip(f"exllamav2=={_WANTED}")
    if version is None:
        return CheckResult("exllamav2", "fail", "not installed", fix, "gpu")
    if version.partition("+")[0] != _WANTED:
        return CheckResult("exllamav2", "warn", f"{version}; exl is made for {_WANTED}, the last release", fix)
    kind = "prebuilt wheel" if "+" in version else "sources, compiled where they run"
    return CheckResult("exllamav2", "ok", f"{version} ({kind})", details={"version": version})


@dataclass(frozen=True)
class State:
    """The extension, and what it takes to compile it.

    Attributes:
        extension: as `compiled.find` returns it.
        tried: how loading it in another process ended; None where that was not asked.
        tools: to compile it with.
        torch: the installed torch.
        capabilities: of the GPUs.
    """

    extension: Extension
    tried: Answer | None
    tools: Toolchain
    torch: environment.Torch
    capabilities: list[Capability]

    @property
    def ready(self) -> bool:
        """Whether `exl run` can load it as it is."""
        return self.extension.usable and self.tried is not None and self.tried.value is not None


def extension(state: State) -> CheckResult:
    """The extension."""
    here = state.extension
    made_for = here.facts.to_dict() if here.facts else None
    details = {"kind": here.kind, "path": str(here.path) if here.path else None, "made_for": made_for}
    if state.ready:
        computes = bool(state.tried and state.tried.value and state.tried.value["gpus"])
        message = _origin(here) + (", loads and computes" if computes else ", loads")
        return CheckResult("Extension", "ok", message, details=details)
    problem = _problem(state)
    if not state.capabilities:
        return CheckResult("Extension", "skip", f"{problem}; without a GPU it is not needed", "", "gpu", details)
    if not state.tools.problems:
        # No obstacle: `exl run` does it by itself.
        return CheckResult("Extension", "warn", f"{problem}; exl run compiles it first", _build(state), "", details)
    fix = install_hints.joined([state.tools.fix, failures.BUILD])
    return CheckResult("Extension", "fail", problem, fix, "gpu", details)


def _origin(here: Extension) -> str:
    archs = compiled.spoken(here.facts.archs) if here.facts and here.facts.archs else ""
    if here.kind == "compiled" and here.facts:
        return f"compiled here on {here.facts.built[:10]} for {archs}"
    return f"prebuilt{' for ' + archs if archs else ''} ({here.path})"


def _problem(state: State) -> str:
    here, tried = state.extension, state.tried
    if here.kind == "missing":
        return "not compiled yet" + (f" ({here.problem})" if here.problem else "")
    if here.kind == "unproven":
        return f"compiled by exllamav2 itself, to be checked by a build ({here.path})"
    if here.problem:
        return f"{here.path} was {here.problem}"
    if tried is None:
        return f"{here.path} was not tried"
    known = failures.explain(tried.problem, state.torch) if tried.kind == "error" else None
    return f"{known.what} ({here.path})" if known else f"{here.path}: loading it {tried.failure}"


def _build(state: State) -> str:
    plan = jobs.plan()
    seconds = jobs.expected_seconds(_TYPICAL, plan.jobs, len(set(state.capabilities)))
    return f"{failures.BUILD} (about {max(1, round(seconds / 60))} min with {plan.jobs} jobs)"


def build_lock(root: Path) -> CheckResult | None:
    """The lock on exl's builds, while one is running."""
    holder = build.holder(root)
    if holder is None:
        return None
    name, age = holder
    details = {"path": str(root), "state": "held", "holder": name, "age_seconds": round(age)}
    message = f"{name} is compiling the extension since {_ago(age)}"
    return CheckResult("Build lock", "warn", message, "wait for it", "", details)


def _ago(seconds: float) -> str:
    """ "5 minutes ago"."""
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return f"{int(seconds)} seconds ago"


def tool(tool: Tool, *, needed: bool) -> CheckResult:
    """One of the tools to compile with.

    Args:
        tool: as `toolchain` returns it.
        needed: whether there is anything to compile here.
    """
    details = {"path": str(tool.path) if tool.path else None, "version": tool.version or None}
    if not tool.problem:
        version = f"{tool.version}, " if tool.version else ""
        return CheckResult(tool.name, "ok", f"{version}{tool.path}", details=details)
    if not needed:
        message = f"{tool.problem}; nothing has to be compiled here"
        return CheckResult(tool.name, "skip", message, details=details)
    where = f" ({tool.path})" if tool.path and tool.name != "Python headers" else ""
    return CheckResult(tool.name, "fail", tool.problem + where, tool.fix, "gpu", details)


def build_folder(folder: Path) -> CheckResult | None:
    """The folder to compile in, where it cannot be written."""
    standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if os.access(standing, os.W_OK | os.X_OK):
        return None
    fix = "export TORCH_EXTENSIONS_DIR=FOLDER, one that can be written"
    return CheckResult("Build folder", "fail", f"{folder} cannot be written", fix, "gpu")
