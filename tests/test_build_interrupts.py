"""Builds that are stopped, killed or concurrent leave no partial library and no running compilers."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from fakecuda import HAS_COMPILERS, Machine

pytestmark = pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")
SECONDS = 20.0


class Hanging:
    """A process that never ends by itself: a compiler, or one that loads a library. It writes its id to a pipe."""

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


def test_ctrl_c_stops_all_compilers_and_keeps_finished_files(machine: Machine) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "exl_cli", "build", "--arch", "9.0", "--jobs", "1"],
        env=machine.environment,
        encoding="utf-8",
        timeout=SECONDS,
        dimensions=(30, 110),
    )
    child.expect("for sm_90: 4 files, about .* with 1 job \\(as requested\\)")
    compiler = hanging(machine)
    child.expect(r"Compiling .*1/4")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert "Traceback" not in str(child.before)
    assert "1 of 4 files kept" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", str(child.before))
    compiler.wait()
    assert not machine.built.exists()
    result = machine.run("build", "--arch", "9.0", FAKE_HANG="")
    assert result.returncode == 0, result.stderr
    assert "sm_90: 3 files" in result.stderr
    assert re.search(r"for sm_90 in 0:0\d: 3 files", result.stderr), result.stderr


def test_the_good_library_stays_while_its_replacement_is_tried(machine: Machine) -> None:
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
    assert (machine.folder() / "build").exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    loading.wait()
    assert machine.built.read_bytes() == before
    assert "already compiled" in machine.run("build", "--arch", "9.0", FAKE_HANG="").stderr


@pytest.mark.slow  # several builds at the same time
def test_concurrent_builds_take_turns_and_compile_once(machine: Machine) -> None:
    first = start(machine, "--jobs", "1")
    compiler = hanging(machine)
    second = start(machine, FAKE_HANG="")
    assert second.stderr is not None
    holder = f"process {first.pid} (exl build)"
    assert second.stderr.readline() == f"{holder} is compiling exllamav2's extension; waiting for it to finish\n"
    checked = machine.run("doctor", "--json", FAKE_HANG="")
    assert f"{holder} has been compiling the extension for 0:" in checked.stdout
    # The first one gets its file after all.
    os.kill(compiler.pid, signal.SIGUSR1)
    assert first.wait(SECONDS) == second.wait(SECONDS) == 0
    assert "already compiled for sm_90" in second.stderr.read()


@pytest.mark.slow  # several builds at the same time
def test_a_killed_build_ends_its_compilers_and_the_next_begins_beside_its_locks(machine: Machine) -> None:
    first = start(machine)
    compiler = hanging(machine)
    second = start(machine, FAKE_HANG="")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    assert machine.lock.exists()  # torch's, which nobody removes
    first.kill()
    first.wait()
    compiler.wait()
    assert second.wait(SECONDS) == 0
    assert machine.built.exists()
