"""Compiles exllamav2's extension: follows the worker, tests its library, and puts it into exl's folder.

That folder is one for each combination of versions and GPU architectures (`compiled.build_folder`). Its subfolder
`build` keeps what an interrupted build has finished; only a library that passed the smoke test leaves it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from exl_cli.engines.exllamav2.extension import (
    compiled,
    environment,
    failures,
    install_hints,
    jobs,
    smoke_test,
    toolchain,
    worker,
)
from exl_cli.engines.exllamav2.extension.compiled import Capability, Facts, spoken
from exl_cli.engines.exllamav2.extension.environment import Torch
from exl_cli.engines.exllamav2.extension.jobs import Progress
from exl_cli.errors import EngineError
from exl_cli.system import processes
from exl_cli.system.files import user_cache

_STEP = re.compile(rf"{worker.MARK}(\d+)/(\d+) (.*)")
_LOCK, _HOLDER = ".lock", ".holder"


@runtime_checkable
class Observer(Protocol):
    """Whatever shows how a build is going."""

    def note(self, message: str) -> None:
        """Something worth telling."""
        ...

    def building(self, progress: Progress) -> None:
        """How far it is; called once with nothing done, then for every file."""
        ...


class Notes:
    """An `Observer` that has only lines: a quarter of the files at a time.

    Args:
        note: takes a line.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self._told = 0

    def building(self, progress: Progress) -> None:
        """See `Observer.building`."""
        quarter = 4 * progress.done // max(progress.total, 1)
        if quarter > self._told:
            self._told = quarter
            self.note(f"compiled {progress.done} of {progress.total} files in {progress.seconds:.0f} s")


@dataclass(frozen=True)
class Result:
    """An extension that is ready.

    Attributes:
        path: the library.
        facts: what it was made for.
        gpus: on which it has computed something.
        log: what the compilers said.
        compiled: files that had to be; 0 where another build made it, exl's or exllamav2's own.
    """

    path: Path
    facts: Facts
    gpus: tuple[str, ...] = ()
    log: str = ""
    compiled: int = 0


def torch_for_cuda() -> Torch:
    """The installed torch, if it is built for CUDA and exllamav2 is there.

    Raises:
        EngineError: it is not.
    """
    torch = environment.torch_here()
    if torch is None:
        raise EngineError("torch is not installed", install_hints.pip("torch"))
    if torch.cuda is None:
        built = "for ROCm" if torch.hip else "without CUDA"
        raise EngineError(f"torch {torch.version} is built {built}", install_hints.torch_with_cuda(torch))
    if environment.exllamav2_version() is None:
        raise EngineError("exllamav2 is not installed", install_hints.pure_exllamav2())
    return torch


def build(
    observer: Observer,
    *,
    archs: tuple[str, ...] = (),
    max_jobs: int | None = None,
    again: bool = False,
    gpus: Sequence[Capability] = (),
) -> Result:
    """Compile exllamav2's extension into exl's folder, or take over the one that exllamav2 compiled by itself.

    Args:
        observer: shows how it is going.
        archs: GPU architectures, as `compiled.parse_archs` gives them; empty for the GPUs that are here.
        max_jobs: compilers at once; None for as many as there are cores and memory for.
        again: compile everything, also the files that are there.
        gpus: those it must serve, as far as known.

    Raises:
        EngineError: it cannot be compiled here, or the compiler fails, with the way to mend it.
        KeyboardInterrupt: passed on after every compiler was stopped.
    """
    torch = torch_for_cuda()
    root = environment.build_root()
    try:
        with _alone(root, observer.note) as waited, _log() as log:
            if waited and not again and (made := compiled.ready(torch, gpus, archs)):
                return Result(*made)
            if not again and not archs and (result := _taken_over(torch, log)):
                return result
            return _compiled(torch, log, observer, archs, max_jobs, again)
    except OSError as error:
        where = f"TORCH_EXTENSIONS_DIR={os.path.join('/tmp', 'torch_extensions')}"  # noqa: PTH118, S108 - an example
        raise EngineError(
            f"exllamav2's extension cannot be compiled: {error.filename or root}: {error.strerror or error}",
            f"choose a folder that can be written: {where} exl build",
        ) from error


def holder(root: Path) -> tuple[str, float] | None:
    """The process that is compiling, in words, and for how many seconds; None where none is."""
    from filelock import FileLock, Timeout

    if not (root / _LOCK).exists():
        return None
    try:
        with FileLock(root / _LOCK, timeout=0):
            return None
    except Timeout:
        return _read_holder(root)
    except OSError:  # not ours to write: nothing can be compiled here anyway
        return None


def _read_holder(root: Path) -> tuple[str, float]:
    path = root / _HOLDER
    with contextlib.suppress(OSError):
        if text := path.read_text(encoding="utf-8"):
            return text, max(0.0, time.time() - path.stat().st_mtime)
    return "another exl", 0.0


@contextlib.contextmanager
def _alone(root: Path, note: Callable[[str], None]) -> Iterator[bool]:
    """Be the only build; the value says whether another had to be waited for.

    The kernel gives the lock back however its process ends.
    """
    from filelock import FileLock, Timeout

    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / _LOCK)
    waited = False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"{_read_holder(root)[0]} is compiling exllamav2's extension: waiting for it")
        waited = True
        lock.acquire()
    try:
        (root / _HOLDER).write_text(f"process {os.getpid()} (exl build)", encoding="utf-8")
        yield waited
    finally:
        with contextlib.suppress(OSError):
            (root / _HOLDER).unlink()
        lock.release()


@contextlib.contextmanager
def _log() -> Iterator[IO[str]]:
    """A new log; the last one is kept beside it."""
    path = user_cache() / "logs" / "build.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name("build.previous.log"))
        log = path.open("w", encoding="utf-8")
    except OSError as error:
        raise EngineError(
            f"the log of the build cannot be written: {path}: {error.strerror}",
            "choose a folder that can be written: XDG_CACHE_HOME=/tmp/cache exl build",
        ) from error
    with log:
        yield log


def _taken_over(torch: Torch, log: IO[str]) -> Result | None:
    """The extension in torch's own folder, where it is newer than torch and exllamav2 and computes on the GPUs here."""
    library = environment.torch_build_folder(torch) / compiled.LIBRARY
    sources = [torch.folder / "version.py", torch.folder.parent / environment.EXLLAMAV2 / "ext.py"]
    if not library.is_file() or any(s.exists() and s.stat().st_mtime > library.stat().st_mtime for s in sources):
        return None
    try:
        gpus, archs = smoke_test.run(library, (), torch, log)
    except EngineError:
        return None
    if not gpus:
        return None
    facts = _facts(torch, archs, library)
    return Result(compiled.publish(library, facts, torch), facts, gpus, log.name)


def _compiled(
    torch: Torch, log: IO[str], observer: Observer, archs: tuple[str, ...], max_jobs: int | None, again: bool
) -> Result:
    begun = time.monotonic()
    tools = toolchain.find(torch)
    if tools.problems:
        what = ", ".join(f"{tool.name} {tool.problem}" for tool in tools.problems)
        raise EngineError(f"exllamav2's extension cannot be compiled: {what}", tools.fix)
    plan = jobs.plan(max_jobs)
    variables = toolchain.variables(tools, environment.build_root() / "lib")
    variables |= {"MAX_JOBS": str(plan.jobs), "NINJA_STATUS": worker.STATUS}
    if archs:
        variables["TORCH_CUDA_ARCH_LIST"] = ";".join(archs)
    process = subprocess.Popen(  # noqa: S603
        processes.command(worker.__name__, json.dumps({"asked": bool(archs), "again": again})),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        try:
            library, archs, files = _follow(process, plan, torch, log, observer)
        finally:
            processes.stop(process)
        gpus, _ = smoke_test.run(library, archs, torch, log)
    except EngineError as error:
        see = f"see {log.name}"
        hint = see if error.hint in ("", "see the log") else f"{error.hint}; {see}"
        raise EngineError(f"exllamav2's extension was not compiled: {error.message}", hint) from error
    compilers = f"nvcc {tools.nvcc.version}, {tools.compiler.name} {tools.compiler.version}"
    facts = _facts(torch, archs, library, round(time.monotonic() - begun, 1), compilers)
    path = compiled.publish(library, facts, torch)
    shutil.rmtree(path.parent / "build", ignore_errors=True)
    return Result(path, facts, gpus, log.name, files)


def _follow(
    process: subprocess.Popen[str], plan: jobs.Plan, torch: Torch, log: IO[str], observer: Observer
) -> tuple[Path, tuple[str, ...], int]:
    """Read what the worker prints until it has built the library; that, its architectures, and the files compiled."""
    archs: tuple[str, ...] = ()
    waiting: list[str] = []
    done: list[str] = []
    said: deque[str] = deque(maxlen=200)
    begun = time.monotonic()
    for line in process.stdout or ():
        log.write(line)
        log.flush()
        if step := _STEP.search(line):
            done.append((re.findall(r"-o (\S+)", step[3]) or [""])[-1])
            seconds = time.monotonic() - begun
            rest = [name for name in waiting if name not in done]
            left = jobs.remaining(done, rest, seconds, plan.jobs, len(archs))
            observer.building(Progress(int(step[1]), int(step[2]), seconds, left, done[-1]))
        elif not line.startswith(worker.MARK):
            said.append(line)
        elif "built" in (event := json.loads(line.removeprefix(worker.MARK))):
            return Path(event["built"]), archs, len(done)
        elif "failed" in event:
            raise _failure(event, "".join(said), torch)
        else:
            archs, waiting, begun = tuple(event["archs"]), event["waiting"], time.monotonic()
            said.clear()
            if waiting:
                left = jobs.expected_seconds(waiting, plan.jobs, len(archs), event["slower"])
                observer.note(
                    f"compiling exllamav2's extension for {spoken(archs)}: {len(waiting)} files, about "
                    f"{_duration(left)} with {plan}; log: {log.name}"
                )
                observer.building(Progress(0, len(waiting), 0.0, left))
    raise EngineError(f"the build ended without a word (code {process.wait()})")


def _failure(event: dict[str, str], said: str, torch: Torch) -> EngineError:
    text = event["failed"]
    if "fix" in event:
        return EngineError(text, event["fix"])
    if text.startswith(worker.COMPILER_FAILED):
        failure = failures.explain_compiler(said, torch)
    elif (known := failures.explain(text, torch)) is None:
        return EngineError(f"the build cannot be set up: {failures.last_line(text)}")
    else:
        failure = known
    return EngineError(failure.what, failure.fix)


def _facts(torch: Torch, archs: tuple[str, ...], library: Path, seconds: float = 0.0, compilers: str = "") -> Facts:
    return Facts(
        exllamav2=environment.exllamav2_release(),
        torch=torch.version,
        cuda=torch.cuda or "",
        python=environment.python_tag(),
        archs=archs,
        size=library.stat().st_size,
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=seconds,
        compilers=compilers,
    )


def _duration(seconds: float) -> str:
    """ "40 seconds", "3 minutes": as exact as a guess may be."""
    if seconds < 90:
        return f"{max(10, round(seconds / 10) * 10)} seconds"
    return f"{round(seconds / 60)} minutes"
