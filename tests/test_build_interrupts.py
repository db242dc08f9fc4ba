"""A build that is stopped, killed or not alone leaves neither lock nor half a library nor compilers behind."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from fakecuda import HAS_COMPILERS, Machine

from exl_cli.engines.exllamav2.extension import lock

pytestmark = pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")
SECONDS = 20.0


class Hanging:
    """A process that never ends by itself: a compiler, or whoever loads a library. It says who it is through a pipe."""

    def __init__(self, pipe: Path) -> None:
        # Opening it waits for that process to open its end.
        self.pid = int(pipe.read_text())
        self._handle = os.pidfd_open(self.pid)

    def wait(self) -> None:
        """Until it has ended."""
        ended(self._handle)


def ended(handle: int) -> None:
    """Wait for the end of a process, given by its handle."""
    assert select.select([handle], [], [], SECONDS)[0], "it did not end"
    os.close(handle)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # The compiler of the second file never ends.
    made.variables = {"FAKE_HANG": "one.cu", "FAKE_PID": str(pipe)}
    return made


def hanging(machine: Machine) -> Hanging:
    return Hanging(Path(machine.variables["FAKE_PID"]))


def start(machine: Machine, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "exl_cli", "build", "--arch", "9.0", *arguments],
        env={**machine.environment, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def nothing_left(machine: Machine, compiler: Hanging) -> None:
    compiler.wait()
    assert not machine.lock.exists()
    assert not machine.built.exists()


def test_ctrl_c_on_a_terminal_stops_everything(machine: Machine) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "exl_cli", "build", "--arch", "9.0", "--jobs", "1"],
        env=machine.environment,
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(30, 110),
    )
    child.expect("for sm_90: 4 files, about .* with 1 job \\(as asked\\)")
    compiler = hanging(machine)
    child.expect(r"Compiling .*1/4")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert "Traceback" not in str(child.before)
    assert "1 of 4 files are kept" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", str(child.before))
    nothing_left(machine, compiler)


def test_what_was_compiled_before_ctrl_c_is_not_compiled_again(machine: Machine) -> None:
    process = start(machine, "--jobs", "1")
    compiler = hanging(machine)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    nothing_left(machine, compiler)
    result = machine.run("build", "--arch", "9.0", FAKE_HANG="")
    assert result.returncode == 0, result.stderr
    assert "sm_90: 3 files" in result.stderr
    assert re.search(r"for sm_90 in 0:0\d: 3 files", result.stderr), result.stderr


def test_a_killed_exl_takes_its_build_with_it(machine: Machine) -> None:
    process = start(machine)
    compiler = hanging(machine)
    worker = os.pidfd_open(json.loads(machine.lock.read_text())["pid"])
    process.kill()
    process.wait()
    ended(worker)
    nothing_left(machine, compiler)


def test_the_good_library_comes_back_when_its_replacement_is_stopped(machine: Machine) -> None:
    assert machine.run("build", "--arch", "9.0", FAKE_HANG="").returncode == 0
    before = machine.built.read_bytes()
    # Compiling goes well this time, and then loading the library hangs.
    machine.write(
        "exllamav2/exllamav2_ext/two.cpp",
        """
        #include <cstdio>
        #include <cstdlib>
        #include <unistd.h>
        int two() {
            FILE* pipe = fopen(getenv("FAKE_PID"), "w");
            fprintf(pipe, "%d", getpid());
            fclose(pipe);
            return sleep(600);
        }
        """,
    )
    process = start(machine, "--force", FAKE_HANG="")
    loading = hanging(machine)
    assert machine.built.read_bytes() != before
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    loading.wait()
    assert machine.built.read_bytes() == before
    assert "already compiled" in machine.run("build", "--arch", "9.0", FAKE_HANG="").stderr


def test_two_builds_take_turns_and_the_second_has_nothing_to_do(machine: Machine, tmp_path: Path) -> None:
    machine.folder.mkdir(parents=True)
    waiting: list[bool] = []
    with lock.ours(machine.folder, lambda: waiting.append(True)):
        second = start(machine, FAKE_HANG="")
        assert second.stderr is not None
        assert "another exl is compiling" in second.stderr.readline()
        assert not machine.built.exists()
    assert second.wait(SECONDS) == 0
    assert waiting == []
    assert machine.built.exists()


# --- torch's lock -----------------------------------------------------------------------------------------------------


def abandoned(folder: Path) -> None:
    """A lock of exl's whose process was killed."""
    code = f"""
import os, pathlib, signal
from exl_cli.engines.exllamav2.extension import lock
with lock.torchs(pathlib.Path({str(folder)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)


def made_by_torch(folder: Path, *, minutes: float) -> Path:
    """A lock as torch leaves one, so long ago; nothing was written since."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    path.touch()
    then = time.time() - 60 * minutes
    for entry in (path, *folder.iterdir()):
        os.utime(entry, (then, then))
    return path


def test_no_lock(tmp_path: Path) -> None:
    assert lock.look(tmp_path).state == "free"
    assert lock.look(tmp_path / "nowhere").state == "free"


def test_a_lock_that_a_process_has_open_is_held_however_old(tmp_path: Path) -> None:
    path = made_by_torch(tmp_path, minutes=600)
    with path.open():
        found = lock.look(tmp_path)
        assert found.state == "held"
        assert str(os.getpid()) in found.holder
    assert lock.look(tmp_path).state == "stale"


def test_a_lock_of_a_killed_exl_is_stale_at_once(tmp_path: Path) -> None:
    abandoned(tmp_path)
    found = lock.look(tmp_path)
    assert found.state == "stale"
    assert "which is gone" in found.holder
    assert found.age < 60


def test_a_fresh_lock_of_nobody_seen_is_unclear_and_a_quiet_one_stale(tmp_path: Path) -> None:
    path = made_by_torch(tmp_path, minutes=3)
    assert lock.look(tmp_path).state == "unclear"
    # An old lock, but a compiler that cannot be seen from here has just written its result.
    then = time.time() - 7200
    os.utime(path, (then, then))
    (tmp_path / "one.o").touch()
    assert lock.look(tmp_path).state == "unclear"
    assert lock.look(tmp_path, now=time.time() + 601).state == "stale"


def test_a_stale_lock_is_said_and_removed(machine: Machine) -> None:
    made_by_torch(machine.folder, minutes=185)
    result = machine.run("build", "--arch", "9.0", FAKE_HANG="")
    assert result.returncode == 0, result.stderr
    assert f"removing a stale lock, made 3 hours ago: no process has it open ({machine.lock})" in result.stderr


def test_an_unclear_lock_is_left_and_the_command_to_remove_it_said(machine: Machine) -> None:
    made_by_torch(machine.folder, minutes=2)
    result = machine.run("build", "--arch", "9.0", FAKE_HANG="")
    assert result.returncode == 8
    assert f"rm {machine.lock}" in result.stderr
    assert machine.lock.exists()


def test_a_held_lock_is_waited_for(machine: Machine) -> None:
    machine.folder.mkdir(parents=True)
    code = f"import os, sys; path = {str(machine.lock)!r}; lock = open(path, 'x'); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code + "; os.remove(path)"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert lock.look(machine.folder).state == "held"
        process = start(machine, FAKE_HANG="")
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"process {holder.pid} " in line
        assert "waiting for it" in line
    finally:
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait()
    assert process.wait(SECONDS) == 0
