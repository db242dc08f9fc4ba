"""What shortens the time until a model answers does its work, and nothing where it cannot."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import threading
import weakref
from pathlib import Path

import pytest
from fakecuda import HAS_COMPILERS, Machine

from exl_cli.engines.exllamav2 import headstart

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
from exl_cli import headstart
exec(sys.argv[1])
headstart.wake_gpu()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join()
print("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1"], cwd=folder, check=True)
    return folder


def wake(machine: Machine, driver: Path, first: str = "", **variables: str) -> list[str]:
    """What the driver is asked for."""
    log = machine.root / "log"
    done = machine.python(
        "-c", WAKE, first, LD_LIBRARY_PATH=str(driver), FAKE_DRIVER_LOG=str(log), CUDA_MODULE_LOADING="", **variables
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str("torch" in first)
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C compiler here")
class TestWaking:
    def test_the_first_gpus_context_is_made_while_torch_is_not_there_yet(self, tmp_path: Path, driver: Path) -> None:
        asked = wake(Machine(tmp_path), driver, "import os; del os.environ['CUDA_MODULE_LOADING']")
        assert asked == ["init LAZY", "first LAZY", "retain LAZY"]

    def test_what_the_user_has_set_stays(self, tmp_path: Path, driver: Path) -> None:
        asked = wake(Machine(tmp_path), driver, "import os; os.environ['CUDA_MODULE_LOADING'] = 'EAGER'")
        assert asked[0] == "init EAGER"

    def test_without_a_gpu_it_ends_there(self, tmp_path: Path, driver: Path) -> None:
        assert [line.split()[0] for line in wake(Machine(tmp_path), driver, FAKE_NO_GPU="1")] == ["init"]

    def test_a_torch_that_is_there_does_so_itself(self, tmp_path: Path, driver: Path) -> None:
        assert wake(Machine(tmp_path), driver, "import torch") == []

    def test_a_torch_without_cuda_needs_no_gpu(self, tmp_path: Path, driver: Path) -> None:
        machine = Machine(tmp_path)
        machine.write("torch/version.py", "__version__ = '2.11.0+cpu'\ncuda = None\n")
        assert wake(machine, driver) == []

    def test_no_driver(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "libcuda.so.1").write_text("no library")
        assert wake(Machine(tmp_path / "machine"), tmp_path / "empty") == []


def is_cached(path: Path, start: int = 0) -> bool:
    """Whether what lies there is in the page cache. To ask can bring it in."""
    with path.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], start, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


@pytest.fixture
def cold(tmp_path: Path) -> list[Path]:
    """Files that are on the disk alone."""
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    for path, size in zip(paths, (9 << 20, 3 << 20, 0), strict=True):
        with path.open("wb") as file:
            file.write(os.urandom(size))
            os.fsync(file.fileno())
            if not hasattr(os, "posix_fadvise"):
                pytest.skip("no page cache to speak of")
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if is_cached(paths[0]):
            pytest.skip("this file system keeps what it is told to forget")
    except OSError:
        pytest.skip("this file system does not tell what is there")
    return paths


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read files"]


def test_files_come_into_the_page_cache(cold: list[Path]) -> None:
    with headstart.files_being_read(cold):
        for thread in readers():
            thread.join()
        for path in cold[:2]:
            assert all(is_cached(path, start) for start in range(0, path.stat().st_size, mmap.PAGESIZE))


def test_reading_ends_with_what_it_was_for(cold: list[Path], tmp_path: Path) -> None:
    # Opening it to read waits for one who writes.
    os.mkfifo(tmp_path / "0")
    with headstart.files_being_read([tmp_path / "0", *cold]):
        threads = readers()
    (tmp_path / "0").open("wb").close()
    assert len(threads) == 1
    threads[0].join()
    assert not is_cached(cold[0], 5 << 20)


def test_what_would_fill_the_memory_is_not_read(cold: list[Path], tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 42)  # of zeros that take no room on the disk
    with headstart.files_being_read([*cold, tmp_path / "huge"]):
        assert readers() == []
    assert not is_cached(cold[0], 5 << 20)


def test_files_that_cannot_be_read_are_left_to_who_wants_them(cold: list[Path], tmp_path: Path) -> None:
    for strange in (tmp_path / "gone", tmp_path):
        with headstart.files_being_read([strange, *cold]):
            for thread in readers():
                thread.join()


def test_the_collector_rests_and_is_as_it_was() -> None:
    class Knot:
        def __init__(self) -> None:
            self.me = self

    assert gc.isenabled()
    with headstart.collector_paused():
        assert not gc.isenabled()
        with headstart.collector_paused():
            pass
        assert not gc.isenabled()
        with headstart.old_objects_set_aside():
            knot = weakref.ref(Knot())
            assert gc.get_freeze_count() > 1000
            gc.collect()
            assert knot() is None
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with headstart.old_objects_set_aside():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
