"""Check exllamav2, its compiled extension, and the tools to compile it."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from exl_cli.doctor.check_result import CheckResult
from exl_cli.engines.exllamav2.extension import build, compiled, hints, toolchain
from exl_cli.engines.exllamav2.extension.compiled import Capability, Extension, Torch
from exl_cli.engines.exllamav2.extension.toolchain import Tool, Toolchain
from exl_cli.system.questions import Answer
from exl_cli.system.units import clock_time


def exllamav2() -> CheckResult:
    """The package."""
    version, wanted = compiled.exllamav2_version(), hints.EXLLAMAV2_RELEASE
    fix = hints.pip(f"exllamav2=={wanted}")
    if version is None:
        return CheckResult("exllamav2", "fail", "not installed", fix, "gpu")
    if version.partition("+")[0] != wanted:
        return CheckResult("exllamav2", "warn", f"{version}; exl needs {wanted}, the last release", fix)
    kind = "prebuilt wheel" if "+" in version else "from source"
    return CheckResult("exllamav2", "ok", f"{version} ({kind})", details={"version": version})


def check(
    torch: Torch | None, gpus: list[Capability], try_out: Callable[[Path], Answer]
) -> Generator[CheckResult, None, bool]:
    """Check the extension, any running build, and the tools.

    Args:
        torch: the installed torch.
        gpus: the GPUs that torch can use.
        try_out: tests an extension in a child process; see `smoke_test.examine`.

    Returns:
        Whether `exl run` can use it without compiling.
    """
    if torch is None or torch.cuda is None:
        yield CheckResult("nvcc", "skip", "not needed: torch is built without CUDA")
        yield from (_tool(t, needed=False) for t in (toolchain.compiler(), toolchain.ninja(), toolchain.headers()))
        return False
    extensions, tools = compiled.extensions(torch, gpus), toolchain.find(torch)
    here = next((each for each in extensions if each.usable), extensions[0] if extensions else None)
    tried = try_out(here.path) if here and here.usable else None
    ready = tried is not None and tried.value is not None
    yield _extension(here, tried, torch, gpus, tools)
    root = compiled.build_root()
    if held := build.holder(root):
        name, age = held
        details = {"path": str(root), "state": "held", "holder": name, "age_seconds": round(age)}
        message = f"{name} has been compiling the extension for {clock_time(age)}"
        yield CheckResult("Build lock", "warn", message, "wait for it", "", details)
    needed = bool(gpus) and not ready
    standing = next(parent for parent in (root, *root.parents) if parent.exists())
    if needed and not os.access(standing, os.W_OK | os.X_OK):
        fix = "export TORCH_EXTENSIONS_DIR=FOLDER (a writable one)"
        yield CheckResult("Build folder", "fail", f"{root} is not writable", fix, "gpu")
    yield from (_tool(tool, needed=needed) for tool in tools)
    return ready


def _extension(
    here: Extension | None, tried: Answer | None, torch: Torch, gpus: list[Capability], tools: Toolchain
) -> CheckResult:
    made_for = here.facts.to_dict() if here and here.facts else None
    details: dict[str, Any] = {"kind": "missing", "path": None, "made_for": made_for}
    if here:
        details |= {"kind": here.kind, "path": str(here.path)}
    if here and tried and tried.value:
        message = f"{_origin(here)}, loads{' and computes' if tried.value['gpus'] else ''}"
        return CheckResult("Extension", "ok", message, details=details)
    problem = _problem(here, tried, torch)
    if not gpus:
        return CheckResult("Extension", "skip", f"{problem}; not needed without a GPU", "", "gpu", details)
    if tools.problems:
        return CheckResult("Extension", "fail", problem, hints.joined([tools.fix, hints.BUILD]), "gpu", details)
    # Only a warning: `exl run` compiles it on first use.
    jobs = build.plan().jobs
    minutes = max(1, round(build.seconds_for(build.all_files(), jobs, len(set(gpus))) / 60))
    fix = f"{hints.BUILD} (about {minutes} min with {jobs} jobs)"
    return CheckResult("Extension", "warn", f"{problem}; the first exl run compiles it", fix, "", details)


def _origin(here: Extension) -> str:
    archs = compiled.spoken(here.facts.archs) if here.facts and here.facts.archs else ""
    if here.kind == "compiled" and here.facts:
        return f"compiled here on {here.facts.built[:10]} for {archs}"
    return f"prebuilt{' for ' + archs if archs else ''} ({here.path})"


def _problem(here: Extension | None, tried: Answer | None, torch: Torch) -> str:
    if here is None:
        return "not compiled yet"
    if here.kind == "unproven":
        return f"compiled by exllamav2 itself; exl build will check it ({here.path})"
    if tried is None:
        return f"{here.path} was {here.problem}"
    known = hints.explain(tried.problem, torch) if tried.kind == "error" else None
    return f"{known.what} ({here.path})" if known else f"{here.path}: loading it {tried.failure}"


def _tool(tool: Tool, *, needed: bool) -> CheckResult:
    """A compiler tool; a problem matters only if something has to be compiled (`needed`)."""
    details = {"path": str(tool.path) if tool.path else None, "version": tool.version or None}
    if not tool.problem:
        version = f"{tool.version}, " if tool.version else ""
        return CheckResult(tool.name, "ok", f"{version}{tool.path}", details=details)
    if not needed:
        message = f"{tool.problem}; not needed, nothing to compile"
        return CheckResult(tool.name, "skip", message, details=details)
    where = f" ({tool.path})" if tool.path else ""
    return CheckResult(tool.name, "fail", tool.problem + where, tool.fix, "gpu", details)
