"""Work done ahead of time in threads: order, errors, interpreter exit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fakecuda import Machine

from exl_cli.engines.exllamav2.kernels.compiler import Ahead

LONG = 20.0  # seconds; nothing here takes so long unless it failed


class Doubling:
    """Doubles numbers, and knows which and by whom. 1 takes until `release`; 7 fails the first time."""

    def __init__(self) -> None:
        self.begun, self.release, self.over = (threading.Event() for _ in range(3))
        self.here: list[int] = []
        self.behind: list[int] = []
        self._tester = threading.current_thread()

    def __call__(self, key: int) -> int:
        done = self.here if threading.current_thread() is self._tester else self.behind
        done.append(key)
        if key == 1:
            self.begun.set()
            assert self.release.wait(LONG)
        if key == 4:
            self.over.set()
        if key == 7 and (self.here + self.behind).count(7) == 1:
            raise MemoryError("for now")
        return 2 * key


@pytest.fixture
def work() -> Doubling:
    return Doubling()


def busy(work: Callable[[int], int], *keys: int) -> Ahead[int, int]:
    """One thread, which is at 1, and has these in its queue."""
    ahead = Ahead(work, threads=1)
    ahead.begin([1, *keys])
    assert isinstance(work, Doubling)
    assert work.begun.wait(LONG)
    return ahead


def test_at_most_the_given_number_of_threads_run() -> None:
    together, over, at_once, seen = threading.Barrier(3), threading.Event(), set(), []

    def work(key: int) -> int:
        at_once.add(key)
        together.wait(LONG)  # none goes on before three have begun
        seen.append(len(at_once))
        together.wait(LONG)
        at_once.remove(key)
        if len(seen) == 9:
            over.set()
        return 2 * key

    ahead = Ahead(work, threads=3)
    for key in range(9):
        ahead.begin([key])
    assert over.wait(LONG)
    assert max(seen) == 3


def test_what_is_still_queued_is_done_by_who_asks_and_once(work: Doubling) -> None:
    ahead = busy(work, 2, 3, 4)
    assert [ahead.get(key) for key in (3, 5, 3)] == [6, 10, 6]
    work.release.set()
    assert work.over.wait(LONG)
    assert [ahead.get(key) for key in (1, 2, 4)] == [2, 4, 8]
    assert (work.here, work.behind) == ([3, 5], [1, 2, 4])


def test_the_latest_work_comes_first(work: Doubling) -> None:
    ahead = busy(work, 2, 3, 4)
    ahead.begin([5, 3, 6])
    work.release.set()
    assert work.over.wait(LONG)
    assert work.behind == [1, 5, 3, 6, 2, 4]


def test_what_is_forgotten_is_left_undone_and_can_be_begun_again(work: Doubling) -> None:
    ahead = busy(work, 2, 3, 4)
    ahead.forget([1, 2, 4])
    ahead.begin([4])
    work.release.set()
    assert work.over.wait(LONG)
    assert [ahead.get(key) for key in (2, 3)] == [4, 6]
    assert work.here == [2]


def test_what_failed_is_done_again_for_who_asks(work: Doubling) -> None:
    ahead = busy(work, 7, 4)
    work.release.set()
    assert work.over.wait(LONG)
    assert ahead.get(7) == 14
    other = Ahead(Doubling(), threads=1)
    with pytest.raises(MemoryError, match="for now"):
        other.get(7)
    assert other.get(7) == 14


def test_interpreter_exit_waits_for_running_work_only(tmp_path: Path) -> None:
    done = Machine(tmp_path).python(  # its torch is imported at once
        "-c",
        """
import threading
from exl_cli.engines.exllamav2.kernels.compiler import Ahead
begun = threading.Event()
def work(key):
    begun.set()
    threading.main_thread().join()
    print("done", key)
ahead = Ahead(work, threads=1)
ahead.begin([1, 2, 3, 4, 5])
begun.wait()
print("over")
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\ndone 1\n", "")
