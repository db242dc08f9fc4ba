"""The build, in a process (and a session) of its own, started by `build`.

It reads a `Job` as JSON, one line, from stdin, and writes events to stdout, one JSON object a line:

- "configured": folder, archs, waiting (the files to be made), slower (than `jobs` reckons with);
- "compiled": name, and done of total; "linking" is a target like the others, the library's;
- "trying": the library is there and is being loaded in another process;
- "done": facts, library, gpus; or "failed": what, fix.

When stdin ends the one who started it is gone: then, as after SIGTERM, it stops the compilers, leaves neither lock nor
half a library, and ends. Everything that a compiler says goes to the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from exl_cli.engines.exllamav2.extension import environment, failures, jobs, lock, ninja
from exl_cli.engines.exllamav2.extension.compiled import LIBRARY, Facts, sm, uncovered, write_facts
from exl_cli.engines.exllamav2.extension.configure import Configured, configure
from exl_cli.engines.exllamav2.extension.failures import Failure
from exl_cli.system import processes

_TRIAL_SECONDS = 300.0
_KEPT = f".{LIBRARY}.before"

# What every .cu file of the extension includes, by way of torch's headers; `jobs` knows how long this takes.
_SMALLEST = """#include <cuda_runtime.h>
#include <cublas_v2.h>
#include <cusparse.h>
#include <cusolverDn.h>
__global__ void f(float* x) { *x = 1; }
"""


@dataclass(frozen=True)
class Job:
    """What to build.

    Attributes:
        archs: for TORCH_CUDA_ARCH_LIST; None for the GPUs that are here.
        jobs: compilers at once.
        log: the log file.
        compilers: their versions, for the record.
        anew: compile everything again.
    """

    archs: str | None
    jobs: int
    log: str
    compilers: str = ""
    anew: bool = False


class _FailedError(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.what)
        self.failure = failure


class _Stopped(BaseException):
    """SIGTERM came, or stdin ended."""


def main() -> None:
    """The process."""
    # What libraries print must not get among the events.
    events, sys.stdout = sys.stdout, sys.stderr
    job = Job(**json.loads(sys.stdin.readline()))

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stopped

    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=_watch_parent, daemon=True).start()
    try:
        with Path(job.log).open("a", encoding="utf-8", errors="replace") as log:
            emit({"event": "done", **_build(job, emit, log)})
    except _FailedError as error:
        emit({"event": "failed", "what": error.failure.what, "fix": error.failure.fix})
    except _Stopped:
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        emit({"event": "failed", "what": f"unexpected {type(error).__name__}: {error}", "fix": "please report it"})


def _watch_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _build(job: Job, emit: Any, log: IO[str]) -> dict[str, Any]:
    begun = time.monotonic()
    torch = environment.torch_here()
    if torch is None:
        raise _FailedError(Failure("torch is not installed", ""))
    try:
        todo = configure(job.archs)
    except Exception as error:
        text = str(error) or type(error).__name__
        known = failures.explain(text, torch)
        raise _FailedError(known or Failure(f"the build cannot be set up: {failures.last_line(text)}", "")) from error
    _check_archs(todo, asked=job.archs is not None)
    if job.anew:
        for name in todo.targets[:-1]:
            (todo.folder / name).unlink(missing_ok=True)
    log.write(f"exl build: {' '.join(todo.archs)}, {job.jobs} jobs, torch {torch.version}, {job.compilers}\n")
    with _lock(todo.folder), _whole_or_nothing(todo.folder / LIBRARY) as keep:
        emit(
            {
                "event": "configured",
                "folder": str(todo.folder),
                "archs": todo.archs,
                "waiting": ninja.waiting(todo.folder),
                "slower": _check_nvcc(todo, torch, log) / jobs.SMALLEST_SECONDS,
            }
        )
        if failed := ninja.run(todo.folder, job.jobs, log, lambda **step: emit({"event": "compiled", **step})):
            raise _FailedError(failures.explain_compiler(failed, torch))
        emit({"event": "trying"})
        gpus = _try(todo.folder / LIBRARY, todo.archs, torch, log)
        facts = Facts(
            exllamav2=(environment.exllamav2_version() or "").partition("+")[0],
            torch=torch.version,
            cuda=torch.cuda or "",
            python=environment.python_tag(),
            archs=todo.archs,
            size=(todo.folder / LIBRARY).stat().st_size,
            built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - begun, 1),
            compilers=job.compilers,
        )
        write_facts(todo.folder / LIBRARY, facts)
        keep()
    return {"facts": facts.to_dict(), "library": str(todo.folder / LIBRARY), "gpus": gpus}


def _check_archs(todo: Configured, *, asked: bool) -> None:
    """Refuse a TORCH_CUDA_ARCH_LIST, left over from something else, that the GPU here is not in."""
    import torch

    gpus = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if not asked and (missing := uncovered(todo.archs, gpus)):
        what = f"TORCH_CUDA_ARCH_LIST={';'.join(todo.archs)} leaves out the GPU here ({sm(missing[0])})"
        raise _FailedError(Failure(what, "unset TORCH_CUDA_ARCH_LIST"))


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        with lock.torchs(folder):
            yield
    except FileExistsError as error:
        raise _FailedError(Failure("another process has just begun to compile it", "run the command again")) from error


@contextlib.contextmanager
def _whole_or_nothing(library: Path) -> Iterator[Any]:
    """A library that was there before comes back unless the new one is declared good; a half one goes."""
    before = library.with_name(_KEPT)
    if library.exists():
        shutil.copy2(library, before)
    good = False

    def keep() -> None:
        nonlocal good
        good = True

    try:
        yield keep
    finally:
        if good:
            before.unlink(missing_ok=True)
        elif before.exists():
            before.replace(library)
        else:
            library.unlink(missing_ok=True)


def _check_nvcc(todo: Configured, torch: environment.Torch, log: IO[str]) -> float:
    """Compile a few lines first: whether nvcc, its headers, this g++ and the GPU go together shows in a second or two.

    Returns the seconds that it took.
    """
    text = (todo.folder / "build.ninja").read_text(encoding="utf-8")
    nvcc, flags = (re.search(rf"^{name} = (.*)$", text, re.MULTILINE) for name in ("nvcc", "cuda_cflags"))
    if nvcc is None or flags is None:
        raise _FailedError(Failure(f"torch {torch.version} writes its build file in a way that exl does not know", ""))
    wanted = re.findall(r"-gencode=\S+|-isystem \S+|-ccbin \S+|-std=\S+", flags[1])
    begun = time.monotonic()
    source = todo.folder / ".exl-check.cu"
    source.write_text(_SMALLEST, encoding="utf-8")
    try:
        command = f"{nvcc[1]} {' '.join(wanted)} -c {source.name} -o .exl-check.o"
        # As ninja does it: the file says a command for the shell.
        done = subprocess.run(  # noqa: S602
            command, shell=True, cwd=todo.folder, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
        output = (done.stdout + done.stderr).decode("utf-8", "replace")
        log.write(f"{command}\n{output}")
        if done.returncode:
            raise _FailedError(failures.explain_compiler(output, torch))
        return time.monotonic() - begun
    finally:
        source.unlink(missing_ok=True)
        (todo.folder / ".exl-check.o").unlink(missing_ok=True)


def _try(library: Path, archs: tuple[str, ...], torch: environment.Torch, log: IO[str]) -> list[str]:
    """Load the library in another process; the GPUs that it computed on."""
    try:
        done = subprocess.run(  # noqa: S603
            processes.command("exl_cli.engines.exllamav2.extension.smoke_test", str(library), *archs),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TRIAL_SECONDS,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise _FailedError(Failure("the compiled extension hangs when it is loaded", "")) from error
    log.write(done.stdout + done.stderr)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise _FailedError(Failure(f"the compiled extension crashes when it is loaded ({name})", ""))
    if done.returncode:
        said = failures.last_line(done.stderr)
        raise _FailedError(
            failures.explain(said, torch) or Failure(f"the compiled extension does not load: {said}", "")
        )
    return list(json.loads(failures.last_line(done.stdout))["gpus"])


if __name__ == "__main__":
    main()
