"""Starts a build, tells how it is going, and stops it whole."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from exl_cli.engines.exllamav2.extension import environment as here
from exl_cli.engines.exllamav2.extension import install_hints, jobs, lock, toolchain, worker
from exl_cli.engines.exllamav2.extension.compiled import Facts, spoken
from exl_cli.engines.exllamav2.extension.environment import Torch
from exl_cli.engines.exllamav2.extension.jobs import Progress
from exl_cli.errors import EngineError
from exl_cli.system import processes
from exl_cli.system.files import user_cache


@runtime_checkable
class Observer(Protocol):
    """Whoever wants to know how a build is going."""

    def note(self, message: str) -> None:
        """Something worth telling."""
        ...

    def building(self, progress: Progress) -> None:
        """How far it is; called once with nothing done, then for every file."""
        ...


class Notes:
    """An `Observer` for those who can only be told lines: a quarter of the files at a time.

    Args:
        note: where to.
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
    """A build that has ended well.

    Attributes:
        path: the extension.
        facts: what it was made for.
        gpus: on which it has computed something.
        log: what the compilers said.
        compiled: files that had to be.
    """

    path: Path
    facts: Facts
    gpus: tuple[str, ...]
    log: Path
    compiled: int


@dataclass(frozen=True)
class Order:
    """What to build.

    Attributes:
        archs: GPU architectures, as `extension.parse_archs` gives them; empty for the GPUs that are here.
        jobs: compilers at once; None for as many as there are cores and memory for.
        anew: compile everything again.
        folder: the build folder, named `exllamav2_ext`; None for torch's own, where exllamav2 looks.
    """

    archs: tuple[str, ...] = ()
    jobs: int | None = None
    anew: bool = False
    folder: Path | None = None


def require(tools: toolchain.Toolchain) -> None:
    """Refuse to begin what cannot end well.

    Raises:
        EngineError: something is missing, with the commands that install it.
    """
    if problems := tools.problems:
        what = ", ".join(f"{tool.name} {tool.problem}" for tool in problems)
        raise EngineError(
            f"exllamav2's extension cannot be compiled: {what}", install_hints.joined([tool.fix for tool in problems])
        )


def torch_for_cuda() -> Torch:
    """The installed torch, if one can compile for CUDA with it and exllamav2 is there.

    Raises:
        EngineError: it is not.
    """
    torch = here.torch_here()
    if torch is None:
        raise EngineError("torch is not installed", install_hints.pip("torch"))
    if torch.cuda is None:
        built = "for ROCm" if torch.hip else "without CUDA"
        raise EngineError(f"torch {torch.version} is built {built}", install_hints.torch_with_cuda(torch))
    if here.exllamav2_version() is None:
        raise EngineError("exllamav2 is not installed", install_hints.pure_exllamav2())
    return torch


def build(order: Order, observer: Observer) -> Result:
    """Compile exllamav2's extension into torch's build folder, where exllamav2's own import finds it.

    Args:
        order: what.
        observer: is told of all that takes long.

    Raises:
        EngineError: it cannot be compiled here, or the compiler fails, with the way to mend it.
        KeyboardInterrupt: passed on after everything was stopped; neither a lock nor half a library is left.
    """
    torch = torch_for_cuda()
    tools = toolchain.find(torch)
    require(tools)
    folder = order.folder or here.build_folder(torch)
    try:
        with lock.ours(folder, lambda: observer.note("another exl is compiling exllamav2's extension: waiting for it")):
            log = _log_file()
            _pass_lock(folder, observer.note)
            environment = toolchain.environment(tools, folder / ".exl-lib")
            environment["TORCH_EXTENSIONS_DIR"] = str(folder.parent)
            plan = jobs.plan(order.jobs)
            compilers = f"nvcc {tools.nvcc.version}, {tools.compiler.name} {tools.compiler.version}"
            job = worker.Job(";".join(order.archs) or None, plan.jobs, str(log), compilers, order.anew)
            return _Build(folder, environment, job, plan, observer).run()
    except OSError as error:
        where = f"TORCH_EXTENSIONS_DIR={os.path.join('/tmp', 'torch_extensions')}"  # noqa: PTH118, S108 - an example
        raise EngineError(
            f"exllamav2's extension cannot be compiled: {error.filename or folder}: {error.strerror or error}",
            f"choose a folder that can be written: {where} exl build",
        ) from error


def remove_stale_lock(folder: Path, note: Callable[[str], None]) -> None:
    """Remove torch's lock if nobody holds it any more, and say so; see `lock`."""
    found = lock.look(folder)
    if found.state == "stale":
        whose = f" of {found.holder}" if found.holder else ": no process has it open"
        note(f"removing a stale lock, made {ago(found.age)}{whose} ({found.path})")
        found.path.unlink(missing_ok=True)


def _pass_lock(folder: Path, note: Callable[[str], None]) -> None:
    """Get past torch's lock: wait while it is held, remove it if it is stale."""
    found = lock.look(folder)
    if found.state == "held":
        note(f"{found.holder} is compiling exllamav2's extension: waiting for it")
        lock.wait(folder)
    remove_stale_lock(folder, note)
    found = lock.look(folder)
    if found.state == "unclear":
        raise EngineError(
            f"{found.path} says that exllamav2's extension is being compiled since {ago(found.age)}, though by no "
            f"process that can be seen here",
            f"if none in another container or on another machine is, remove it: rm {found.path}",
        )


def ago(seconds: float) -> str:
    """ "5 minutes ago"."""
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return f"{int(seconds)} seconds ago"


def _log_file() -> Path:
    """A new, empty log; the last one is kept beside it."""
    path = user_cache() / "logs" / "build.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name("build.previous.log"))
        path.touch()
    except OSError as error:
        raise EngineError(
            f"the log of the build cannot be written: {path}: {error.strerror}",
            "choose a folder that can be written: XDG_CACHE_HOME=/tmp/cache exl build",
        ) from error
    return path


class _Build:
    """One run of the worker."""

    def __init__(
        self, folder: Path, environment: dict[str, str], job: worker.Job, plan: jobs.Plan, observer: Observer
    ) -> None:
        self._folder, self._environment, self._job, self._plan = folder, environment, job, plan
        self._observer = observer
        self._waiting: list[str] = []
        self._done: list[str] = []
        self._archs = 1
        self._begun = 0.0
        self._result: Result | None = None

    def run(self) -> Result:
        """See `build`."""
        with Path(self._job.log).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(  # noqa: S603
                processes.command("exl_cli.engines.exllamav2.extension.worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                text=True,
                start_new_session=True,
            )
        try:
            self._follow(process)
        finally:
            processes.stop(process)
            lock.release(self._folder)
        if self._result is None:
            raise self._failed(f"the build ended without a word (code {process.returncode})", "")
        return self._result

    def _follow(self, process: subprocess.Popen[str]) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a process without pipes")
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(vars(self._job)) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            event = json.loads(line)
            handle = getattr(self, "_on_" + event.pop("event"))
            handle(**event)

    def _on_configured(self, folder: str, archs: list[str], waiting: list[str], slower: float) -> None:
        if Path(folder).resolve() != self._folder.resolve():
            raise RuntimeError(f"torch builds in {folder}, not in {self._folder}")
        self._waiting, self._archs = waiting, len(archs)
        self._begun = time.monotonic()
        if waiting:
            seconds = jobs.expected_seconds(waiting, self._plan.jobs, self._archs, slower)
            count = self._plan.jobs
            self._observer.note(
                f"compiling exllamav2's extension for {spoken(archs)}: {len(waiting)} files, about "
                f"{duration(seconds)} with {count} job{'s' if count > 1 else ''} ({self._plan.reason}); "
                f"log: {self._job.log}"
            )
            self._observer.building(Progress(0, len(waiting), 0.0, seconds))

    def _on_compiled(self, name: str, done: int, total: int) -> None:
        self._done.append(name)
        seconds = time.monotonic() - self._begun
        rest = [other for other in self._waiting if other not in self._done]
        left = jobs.remaining(self._done, rest, seconds, self._plan.jobs, self._archs)
        self._observer.building(Progress(done, total, seconds, left, name))

    def _on_trying(self) -> None:
        return None

    def _on_done(self, facts: dict[str, Any], library: str, gpus: list[str]) -> None:
        facts.pop("format")
        made = Facts(**{**facts, "archs": tuple(facts["archs"])})
        self._result = Result(Path(library), made, tuple(gpus), Path(self._job.log), len(self._done))

    def _on_failed(self, what: str, fix: str) -> None:
        raise self._failed(what, fix)

    def _failed(self, what: str, fix: str) -> EngineError:
        log = f"see {self._job.log}"
        hint = f"{fix}; {log}" if fix and not fix.startswith("see ") else log
        return EngineError(f"exllamav2's extension was not compiled: {what}", hint)


def duration(seconds: float) -> str:
    """ "40 seconds", "3 minutes": as exact as a guess may be."""
    if seconds < 90:
        return f"{max(10, round(seconds / 10) * 10)} seconds"
    return f"{round(seconds / 60)} minutes"
