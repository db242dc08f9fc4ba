"""Startup optimizations work, and do nothing where they do not apply."""

from __future__ import annotations

import gc
import subprocess
from pathlib import Path

import pytest
from fakecuda import HAS_COMPILERS, Machine

from exl_cli.engines.exllamav2 import startup

DRIVER = """
#include <stdio.h>
#include <stdlib.h>
static int say(const char* what, int code)
{
    FILE* file = fopen(getenv("FAKE_DRIVER_LOG"), "a");
    fprintf(file, "%s %s\\n", what, getenv("CUDA_MODULE_LOADING"));
    fclose(file);
    return code;
}
int cuInit(unsigned flags) { return say("init", getenv("FAKE_NO_GPU") ? 100 : 0); }
int cuDeviceGet(int* device, int ordinal) { *device = 7; return say(ordinal ? "other" : "first", 0); }
int cuDevicePrimaryCtxRetain(void** context, int device) { return say(device == 7 ? "retain" : "other", 2); }
"""
WAKE = """
import sys, threading
from exl_cli.engines.exllamav2 import startup
exec(sys.argv[1])
startup.wake_gpu()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join()
"""


@pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C compiler here")
def test_the_first_gpus_context_is_made_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    machine, log = Machine(tmp_path / "machine"), tmp_path / "log"

    def asked(first: str = "", **variables: str) -> list[str]:
        """What the driver is asked for."""
        log.write_text("")
        done = machine.python(
            "-c", WAKE, first, LD_LIBRARY_PATH=str(tmp_path), FAKE_DRIVER_LOG=str(log),
            **{"CUDA_MODULE_LOADING": "EAGER", **variables},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return log.read_text().splitlines()

    assert asked("import os; del os.environ['CUDA_MODULE_LOADING']") == ["init LAZY", "first LAZY", "retain LAZY"]
    assert asked() == ["init EAGER", "first EAGER", "retain EAGER"]
    assert asked(FAKE_NO_GPU="1") == ["init EAGER"]
    assert asked("import torch") == []
    (tmp_path / "libcuda.so.1").write_text("no library")
    assert asked() == []
    machine.write("torch/version.py", "__version__ = '2.11.0+cpu'\ncuda = None\n")
    assert asked() == []


def test_the_collector_rests_and_is_as_it_was() -> None:
    assert gc.isenabled()
    with startup.collector_paused():
        assert not gc.isenabled()
        with startup.collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
