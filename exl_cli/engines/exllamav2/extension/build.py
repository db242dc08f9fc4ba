"""Compile exllamav2's extension: run the worker with progress, smoke-test the library, install it into exl's cache.

There is one cache folder for each combination of versions and GPU architectures (`compiled.build_folder`). Object files
stay in its `build` subfolder until the build is complete, so an interrupted build resumes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, Protocol, runtime_checkable

from exl_cli.engines.exllamav2.extension import compiled, hints, smoke_test, toolchain, worker
from exl_cli.engines.exllamav2.extension.compiled import Capability, Facts, Torch, spoken
from exl_cli.errors import EngineError, param
from exl_cli.system import processes
from exl_cli.system.files import locked, user_cache
from exl_cli.system.machine import available_memory, usable_cores
from exl_cli.system.units import GIB, gib

_LOCK, _HOLDER = ".lock", ".holder"
_POLL_SECONDS = 0.2


class Progress(NamedTuple):
    """Progress of a build in files, counting the linked library as one."""

    done: int
    total: int
    seconds: float  # since the start
    left: float  # estimated seconds for the rest
    name: str = ""  # the file finished last


@runtime_checkable
class Observer(Protocol):
    """Receives notes and progress of a build."""

    def note(self, message: str) -> None: ...
    def building(self, progress: Progress) -> None: ...  # once at the start, then after each file


class Notes:
    """An `Observer` that prints a line for each quarter of the files."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note

    def building(self, progress: Progress) -> None:
        done, total = progress.done, progress.total
        if done and 4 * done // total > 4 * (done - 1) // total:
            self.note(f"compiled {done} of {total} files in {progress.seconds:.0f} s")


class Result(NamedTuple):
    """A tested extension, ready for use."""

    path: Path
    facts: Facts
    gpus: Sequence[str] = ()  # names of the GPUs it was tested on
    log: str = ""  # path of the compilers' log
    compiled: int = 0  # files compiled; 0 if an existing build was reused


def torch_for_cuda() -> Torch:
    """The installed torch; EngineError if it is not built for CUDA, or if exllamav2 is not installed."""
    torch = compiled.torch_here()
    if torch is None:
        raise EngineError("torch is not installed", hints.step(hints.pip("torch")))
    if torch.cuda is None:
        built = "for ROCm" if torch.hip else "without CUDA"
        raise EngineError(f"torch {torch.version} is built {built}", hints.step(hints.torch_again(torch)))
    if compiled.exllamav2_version() is None:
        raise EngineError("exllamav2 is not installed", hints.step(hints.pip(f"exllamav2=={hints.EXLLAMAV2_RELEASE}")))
    return torch


def build(
    observer: Observer,
    *,
    archs: tuple[str, ...] = (),
    max_jobs: int | None = None,
    again: bool = False,
    gpus: Sequence[Capability] = (),
) -> Result:
    """Compile exllamav2's extension into exl's cache, or adopt the one that exllamav2 compiled itself.

    Args:
        observer: receives progress.
        archs: GPU architectures from `compiled.parse_archs`; empty for this machine's GPUs.
        max_jobs: parallel compilers; None for as many as cores and memory allow.
        again: recompile everything.
        gpus: this machine's GPUs, as far as known.

    Raises:
        EngineError: it cannot be compiled on this machine, or a compiler failed.
        KeyboardInterrupt: re-raised after all compilers have been stopped.
    """
    torch, root = torch_for_cuda(), compiled.build_root()
    try:
        with _alone(root, observer.note) as waited, _log() as log:
            if waited and not again and (made := compiled.ready(torch, gpus, archs)):
                return Result(*made)
            if not again and not archs and (result := _taken_over(torch, log)):
                return result
            return _compiled(torch, log, observer, _choose_archs(archs, gpus), plan(max_jobs), again)
    except OSError as error:
        raise EngineError(
            f"cannot compile exllamav2's extension: {error.filename or root}: {error.strerror or error}",
            "choose writable folders, e.g. TORCH_EXTENSIONS_DIR=/tmp/extensions XDG_CACHE_HOME=/tmp/cache exl build",
        ) from error


def _choose_archs(asked: tuple[str, ...], gpus: Sequence[Capability]) -> tuple[str, ...]:
    """The requested architectures, else those of TORCH_CUDA_ARCH_LIST, else the GPUs'."""
    if asked:
        return asked
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST", ""):
        named = f"TORCH_CUDA_ARCH_LIST={listed}"
        try:
            archs = compiled.parse_archs(listed)
        except ValueError as error:
            what = f"{named}: {str(error)!r} is not a GPU architecture"
            raise EngineError(what, "write it as 8.6, or unset TORCH_CUDA_ARCH_LIST") from error
        if missing := compiled.uncovered(archs, gpus):  # perhaps left over from another project
            what = f"{named} does not cover this machine's GPU ({compiled.sm(missing[0])})"
            raise EngineError(what, "unset TORCH_CUDA_ARCH_LIST")
        return archs
    if not gpus:
        arch = param("arch")
        raise EngineError("no GPU to compile for on this machine", f"name an architecture, such as {arch} 8.6")
    return tuple(f"{major}.{minor}" for major, minor in sorted(set(gpus)))


def _taken_over(torch: Torch, log: IO[str]) -> Result | None:
    """Adopt the extension in torch's build folder if it is newer than torch and exllamav2 and passes the smoke test."""
    library = compiled.torch_build_folder(torch) / compiled.LIBRARY
    sources = [torch.folder / "version.py", torch.folder.parent / compiled.EXLLAMAV2 / "ext.py"]
    if not library.is_file() or any(s.exists() and s.stat().st_mtime > library.stat().st_mtime for s in sources):
        return None
    try:
        tested = smoke_test.run(library, (), torch, log)
    except EngineError:
        return None
    return Result(*compiled.publish(library, torch, tested.archs), tested.gpus, log.name) if tested.gpus else None


def _compiled(
    torch: Torch, log: IO[str], observer: Observer, archs: tuple[str, ...], plan: Plan, again: bool
) -> Result:
    begun = time.monotonic()
    tools = toolchain.find(torch)
    if tools.problems:
        what = ", ".join(f"{tool.name} {tool.problem}" for tool in tools.problems)
        raise EngineError(f"cannot compile exllamav2's extension: {what}", hints.step(tools.fix))
    root = compiled.build_folder(torch, archs) / "build"
    if again:
        shutil.rmtree(root, ignore_errors=True)
    folder = root / compiled.MODULE
    folder.mkdir(parents=True, exist_ok=True)
    # torch waits for its lock file to disappear. We hold exl's lock, so a lock file here is left from a killed build.
    (folder / "lock").unlink(missing_ok=True)
    variables = toolchain.variables(tools, compiled.build_root() / "lib")
    variables |= {"TORCH_EXTENSIONS_DIR": str(root), "TORCH_CUDA_ARCH_LIST": ";".join(archs)}
    library, start = folder / compiled.LIBRARY, log.tell()
    try:
        slower = toolchain.try_nvcc(archs, variables, log) / _TRIAL_SECONDS
        files = _compile(folder, variables, log, observer, archs, plan, slower)
        tested = smoke_test.run(library, archs, torch, log)
    except (subprocess.CalledProcessError, EngineError) as error:
        what, fix = (error.message, error.hint) if isinstance(error, EngineError) else _failure(log, start, torch)
        hint = "; ".join(filter(None, (fix, f"see {log.name}")))
        raise EngineError(f"compiling exllamav2's extension failed: {what}", hint) from error
    compilers = f"nvcc {tools.nvcc.version}, {tools.compiler.name} {tools.compiler.version}"
    made = compiled.publish(library, torch, archs, time.monotonic() - begun, compilers)
    shutil.rmtree(root, ignore_errors=True)
    return Result(*made, tested.gpus, log.name, files)


def _compile(
    folder: Path,
    variables: dict[str, str],
    log: IO[str],
    observer: Observer,
    archs: tuple[str, ...],
    plan: Plan,
    slower: float,
) -> int:
    """Run the worker, follow ninja's log, and return the number of files compiled; CalledProcessError on failure."""
    expected = partial(seconds_for, jobs=plan.jobs, architectures=len(archs))
    here = _finished(folder)
    waiting = [name for name in all_files() if name not in here]
    if waiting:
        left = slower * expected(waiting)
        observer.note(
            f"compiling exllamav2's extension for {spoken(archs)}: {len(waiting)} files, about "
            f"{_duration(left)} with {plan}; log: {log.name}"
        )
        observer.building(Progress(0, len(waiting), 0.0, left))
    command, begun = processes.command(worker.__name__), time.monotonic()
    environment = {**variables, "MAX_JOBS": str(plan.jobs)}
    done: list[str] = []
    process = subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, text=True, start_new_session=True
    )
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
            before, done = done, [name for name in _finished(folder) if name in waiting]
            if len(done) > len(before):
                seconds, rest = time.monotonic() - begun, [name for name in waiting if name not in done]
                # Extrapolate from the actual over the expected time of the files so far.
                left = expected(rest) * seconds / expected(done)
                observer.building(Progress(len(done), len(waiting), seconds, left, done[-1]))
    finally:
        processes.stop(process)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return len(done)


def all_files() -> list[str]:
    """Object files and library that torch lets ninja build from exllamav2's sources."""
    spec = importlib.util.find_spec(compiled.EXLLAMAV2)
    folders = [Path(place) / compiled.MODULE for place in (spec and spec.submodule_search_locations) or ()]
    objects = {".cpp": ".o", ".cu": ".cuda.o"}
    sources = [path for folder in folders for path in folder.rglob("*.c*") if path.suffix in objects]
    return [*(path.stem + objects[path.suffix] for path in sources), compiled.LIBRARY]


def _finished(folder: Path) -> list[str]:
    """Files that ninja has finished. A line of its log is start, end, mtime, name, hash."""
    try:
        lines = (folder / ".ninja_log").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    names = dict.fromkeys(fields[3] for line in lines if len(fields := line.split("\t")) > 4)
    return [name for name in names if (folder / name).exists()]


def _failure(log: IO[str], start: int, torch: Torch) -> tuple[str, str]:
    """Error and fix, from the compilers' output."""
    text = Path(log.name).read_bytes()[start:].decode("utf-8", "replace")
    if known := hints.explain(text, torch):
        return known.what, hints.step(known.fix)
    return hints.first_error(text) or "the compiler failed", ""


# --- one at a time ----------------------------------------------------------------------------------------------------


def holder(root: Path) -> tuple[str, float] | None:
    """Who is compiling, in words, and for how many seconds; None if nobody is."""
    from filelock import FileLock, Timeout

    if not (root / _LOCK).exists():
        return None
    try:
        with FileLock(root / _LOCK, timeout=0):
            return None
    except Timeout:
        return _read_holder(root)
    except OSError:  # not writable, so nothing can be compiled here anyway
        return None


def _read_holder(root: Path) -> tuple[str, float]:
    path = root / _HOLDER
    with contextlib.suppress(OSError):
        if text := path.read_text(encoding="utf-8"):
            return text, max(0.0, time.time() - path.stat().st_mtime)
    return "another exl process", 0.0


@contextlib.contextmanager
def _alone(root: Path, note: Callable[[str], None]) -> Iterator[bool]:
    """Hold the build lock; yields whether we had to wait for another build."""
    with locked(
        root / _LOCK,
        lambda: note(f"{_read_holder(root)[0]} is compiling exllamav2's extension; waiting for it to finish"),
    ) as waited:
        (root / _HOLDER).write_text(f"process {os.getpid()} (exl build)", encoding="utf-8")
        try:
            yield waited
        finally:
            (root / _HOLDER).unlink(missing_ok=True)


@contextlib.contextmanager
def _log() -> Iterator[IO[str]]:
    """Open a new log, keeping the previous one beside it."""
    path = user_cache() / "logs" / "build.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name("build.previous.log"))
    with path.open("w", encoding="utf-8", buffering=1) as log:  # line-buffered: compilers write to it too
        yield log


# --- how many compilers, and how long ---------------------------------------------------------------------------------

# Measured on a build of exllamav2 0.3.2 for one architecture on one core (torch 2.11, nvcc 13.0, g++ 12, November
# 2026): 48 files, 645 seconds of CPU time. A C++ file that includes torch's headers takes 18 seconds and 1.6 GiB (the
# bindings 26 and 2.1), a CUDA file 7 seconds and 0.6 GiB, the EXL2 kernels 23 or 44 seconds.
_TRIAL_SECONDS = 1.0  # `toolchain.try_nvcc`
_JOB_BYTES = round(1.7 * GIB)
# Slowdown of parallel jobs by hyperthreading and shared caches.
_SHARED = 1.4


class Plan(NamedTuple):
    """Number of parallel compilers, and what limits it."""

    jobs: int
    reason: str

    def __str__(self) -> str:
        return f"{self.jobs} job{'s' if self.jobs > 1 else ''} ({self.reason})"


def plan(asked: int | None = None) -> Plan:
    """The requested number of jobs, else MAX_JOBS, else what cores and memory allow."""
    if asked:
        return Plan(asked, "as requested")
    if (variable := os.environ.get("MAX_JOBS", "")).isdigit() and int(variable):
        return Plan(int(variable), "MAX_JOBS")
    cores, free = usable_cores(), available_memory()
    if free is not None and (by_memory := max(1, (free - GIB) // _JOB_BYTES)) < cores:
        return Plan(by_memory, f"{gib(free)} of free memory")
    return Plan(cores, f"{cores} core{'s' if cores > 1 else ''}")


def seconds_for(names: Iterable[str], jobs: int, architectures: int = 1) -> float:
    """Seconds to compile files on the machine of the measurement: work over jobs, but at least the longest file."""
    weights = [_cpu_seconds(name, architectures) for name in names]
    return (_SHARED if jobs > 1 else 1.0) * max([sum(weights) / jobs, *weights, 0.0])


def _cpu_seconds(name: str, architectures: int) -> float:
    if "unit_exl2" in name:
        return 4.0 + (40.0 if re.search(r"\db\.", name) else 19.0) * architectures
    if ".cu" in name:
        return 5.0 + 2.0 * architectures
    return 18.0 if name.startswith(("ext_", "quantize_func")) else 2.0


def _duration(seconds: float) -> str:
    """A rounded estimate: "40 seconds", "3 minutes"."""
    return f"{max(10, round(seconds, -1)):.0f} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"
