"""Checks of exllamav2, its compiled extension, and what compiling it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from exl_cli.doctor.child import Answer
from exl_cli.doctor.finding import Finding
from exl_cli.engines.exllamav2.extension import compiled, environment, failures, install_hints, jobs, lock
from exl_cli.engines.exllamav2.extension.build import ago
from exl_cli.engines.exllamav2.extension.compiled import Capability, Extension
from exl_cli.engines.exllamav2.extension.toolchain import Tool, Toolchain

_WANTED = "0.3.2"


def exllamav2() -> Finding:
    """The package."""
    version = environment.exllamav2_version()
    if version is None:
        return Finding("exllamav2", "fail", "not installed", install_hints.pip(f"exllamav2=={_WANTED}"), "gpu")
    if version.partition("+")[0] != _WANTED:
        fix = install_hints.pip(f"exllamav2=={_WANTED}")
        return Finding("exllamav2", "warn", f"{version}; exl is made for {_WANTED}, the last release", fix)
    kind = "prebuilt wheel" if "+" in version else "sources, compiled where they run"
    return Finding("exllamav2", "ok", f"{version} ({kind})", details={"version": version})


@dataclass(frozen=True)
class State:
    """The extension and what may be done about it.

    Attributes:
        extension: what is there.
        tried: how loading it in another process ended; None where that was not asked.
        lock: torch's lock on the build folder.
        tools: what compiling takes; None where torch has no CUDA.
        torch: the installed torch.
        capabilities: of the GPUs.
    """

    extension: Extension
    tried: Answer | None
    lock: lock.Lock
    tools: Toolchain | None
    torch: environment.Torch
    capabilities: list[Capability]

    @property
    def ready(self) -> bool:
        """Whether `exl run` can load it as it is."""
        return self.extension.usable and self.tried is not None and self.tried.value is not None

    @property
    def buildable(self) -> bool:
        """Whether `exl run` and `exl build` can compile it."""
        return self.tools is not None and not self.tools.problems and self.lock.state in ("free", "stale", "held")


def finding(state: State) -> Finding:
    """The extension."""
    found = state.extension
    details = {
        "kind": found.kind,
        "path": str(found.path) if found.path else None,
        "made_for": found.facts.to_dict() if found.facts else None,
    }
    if state.ready:
        computes = bool(state.tried and state.tried.value and state.tried.value["gpus"])
        what = _what(found) + (", loads and computes" if computes else ", loads")
        return Finding("Extension", "ok", what, details=details)
    problem = _problem(state)
    if not state.capabilities:
        return Finding("Extension", "skip", f"{problem}; without a GPU it is not needed", "", "gpu", details)
    if state.buildable:
        # `exl run` does it by itself, so that it is no obstacle.
        return Finding("Extension", "warn", f"{problem}; exl run compiles it first", _build(state), "", details)
    missing = install_hints.joined([tool.fix for tool in state.tools.problems]) if state.tools else ""
    fix = install_hints.joined([missing, failures.BUILD])
    return Finding("Extension", "fail", problem, fix, "gpu", details)


def _what(found: Extension) -> str:
    if found.kind == "compiled" and found.facts:
        return f"compiled here on {found.facts.built[:10]} for {compiled.spoken(found.facts.archs)}"
    made = f" for {compiled.spoken(found.facts.archs)}" if found.facts and found.facts.archs else ""
    return f"prebuilt{made} ({found.path})"


def _problem(state: State) -> str:
    found = state.extension
    if found.kind == "missing":
        return "not compiled yet" + (f" ({found.problem})" if found.problem else "")
    if found.kind == "unproven":
        return f"compiled by exllamav2 itself, to be checked by a build ({found.path})"
    if found.problem:
        return f"{found.path} was {found.problem}"
    if state.tried is None:
        return f"{found.path} was not tried"
    known = failures.explain(state.tried.problem, state.torch) if state.tried.kind == "error" else None
    return f"{known.what} ({found.path})" if known else f"{found.path}: loading it {_ended(state.tried)}"


def _ended(tried: Answer) -> str:
    return f"fails: {tried.said}" if tried.kind == "error" else tried.problem


def _build(state: State) -> str:
    plan = jobs.plan()
    archs = tuple(f"{major}.{minor}" for major, minor in dict.fromkeys(state.capabilities))
    seconds = jobs.expected_seconds(_TYPICAL, plan.jobs, max(len(archs), 1))
    return f"{failures.BUILD} (about {max(1, round(seconds / 60))} min with {plan.jobs} jobs)"


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


def lock_finding(state: State) -> Finding | None:
    """The build folder's lock, where it is worth a line."""
    found = state.lock
    details = {"path": str(found.path), "state": found.state, "holder": found.holder, "age_seconds": round(found.age)}
    if found.state == "held":
        return Finding(
            "Build lock",
            "warn",
            f"{found.holder} is compiling the extension since {ago(found.age)}",
            "wait for it",
            "",
            details,
        )
    if found.state == "stale":
        whose = f"of {found.holder}" if found.holder else "that no process holds"
        what = f"a stale one {whose}, made {ago(found.age)}: a plain import of exllamav2 would wait for ever"
        return Finding("Build lock", "warn", what, f"rm {found.path} (exl build does it too)", "", details)
    if found.state == "unclear":
        what = f"made {ago(found.age)} by no process that can be seen here"
        fix = f"if nothing elsewhere is compiling: rm {found.path}"
        return Finding(
            "Build lock", "fail" if not state.ready else "warn", what, fix, "" if state.ready else "gpu", details
        )
    return None


def tool(found: Tool, *, needed: bool) -> Finding:
    """One of the tools of compiling.

    Args:
        found: the tool.
        needed: whether something is to be compiled here at all.
    """
    details = {"path": str(found.path) if found.path else None, "version": found.version or None}
    if not found.problem:
        version = f"{found.version}, " if found.version else ""
        return Finding(found.name, "ok", f"{version}{found.path}", details=details)
    if not needed:
        return Finding(found.name, "skip", f"{found.problem}; nothing has to be compiled here", details=details)
    where = f" ({found.path})" if found.path and found.name != "Python headers" else ""
    return Finding(found.name, "fail", found.problem + where, found.fix, "gpu", details)


def folder_finding(folder: Path) -> Finding | None:
    """The folder to compile in, where it cannot be used."""
    standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if os.access(standing, os.W_OK | os.X_OK):
        return None
    fix = "export TORCH_EXTENSIONS_DIR=FOLDER, one that can be written"
    return Finding("Build folder", "fail", f"{folder} cannot be written", fix, "gpu")
