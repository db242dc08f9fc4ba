"""Work done ahead of being asked for: by whom, how often, and what errors and the interpreter's end do."""

from __future__ import annotations

import gc
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import python

from exl_cli.engines.exllamav2.kernels.ahead import Ahead

LONG = 20.0  # seconds; nothing here takes so long unless it failed


class Work:
    """Doubles numbers, and knows which and by whom.

    Args:
        held: numbers that take until `release`.
        bad: numbers that cannot be doubled.
    """

    def __init__(self, *held: int, bad: int | None = None) -> None:
        self.release = threading.Event()
        self._held, self._bad = held, bad
        self._tester = threading.current_thread()
        self._done: list[tuple[int, bool]] = []
        self._begun: dict[int, threading.Event] = {}

    def __call__(self, key: int) -> int:
        self._done.append((key, threading.current_thread() is self._tester))
        self._event(key).set()
        if key in self._held:
            assert self.release.wait(LONG)
        if key == self._bad:
            raise ValueError(f"no {key}")
        return 2 * key

    def _event(self, key: int) -> threading.Event:
        return self._begun.setdefault(key, threading.Event())

    def await_begun(self, key: int) -> None:
        assert self._event(key).wait(LONG)

    @property
    def here(self) -> list[int]:
        """What was worked on by the test's own thread."""
        return [key for key, here in self._done if here]

    @property
    def behind(self) -> list[int]:
        """What was worked on in the background."""
        return [key for key, here in self._done if not here]


@pytest.fixture
def askers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "work ahead"]


def test_the_asker_and_all_threads_work_at_the_same_time() -> None:
    together = threading.Barrier(4)

    def work(key: int) -> int:
        together.wait(LONG)
        return 2 * key

    ahead = Ahead(work, threads=3)
    ahead.begin([1, 2, 3, 4])
    # None of the four ends before all have begun.
    assert [ahead.get(key) for key in (4, 3, 2, 1)] == [8, 6, 4, 2]


def test_there_are_no_more_threads_than_told() -> None:
    pairs, at_once, seen = threading.Barrier(2), set(), []
    over = threading.Event()

    def work(key: int) -> int:
        at_once.add(key)
        pairs.wait(LONG)
        seen.append(len(at_once))
        pairs.wait(LONG)
        at_once.remove(key)
        if len(seen) == 20:
            over.set()
        return key

    ahead = Ahead(work, threads=2)
    for key in range(20):
        ahead.begin([key])
    assert over.wait(LONG)
    assert max(seen) == 2


def test_every_key_is_worked_on_once(askers: ThreadPoolExecutor) -> None:
    work, start = Work(), threading.Barrier(8)
    ahead = Ahead(work, threads=2)

    def ask(number: int) -> list[int]:
        start.wait(LONG)
        ahead.begin(range(50))
        return [ahead.get((key + 7 * number) % 50) for key in range(50)]

    for number, found in enumerate(askers.map(ask, range(8))):
        assert found == [2 * ((key + 7 * number) % 50) for key in range(50)]
    assert sorted(work.behind) == list(range(50))


def test_what_is_still_queued_is_done_by_who_asks() -> None:
    work = Work(1)
    ahead = Ahead(work, threads=1)
    ahead.begin([1, 2, 3])
    work.await_begun(1)
    assert ahead.get(3) == 6
    assert ahead.get(4) == 8
    work.release.set()
    work.await_begun(2)
    assert [ahead.get(key) for key in (1, 2)] == [2, 4]
    assert (work.here, work.behind) == ([3, 4], [1, 2])


def test_what_was_begun_last_comes_first() -> None:
    work = Work(1)
    ahead = Ahead(work, threads=1)
    ahead.begin([1])
    work.await_begun(1)
    ahead.begin([2, 3, 4])
    ahead.begin([5, 3, 1])
    work.release.set()
    work.await_begun(4)
    assert work.behind == [1, 5, 3, 2, 4]


def test_threads_end_with_the_queue_and_come_again() -> None:
    work = Work(1, 2)
    ahead = Ahead(work, threads=1)
    for key in (1, 2):
        # As threads inherit it, unless told otherwise.
        daemon = threading.Thread(target=ahead.begin, args=([key],), daemon=True)
        daemon.start()
        daemon.join(LONG)
        work.await_begun(key)
        (worker,) = workers()
        assert not worker.daemon
        work.release.set()
        worker.join(LONG)
        assert not worker.is_alive()
        work.release.clear()
    assert work.behind == [1, 2]


@pytest.mark.parametrize("begun", [True, False])
def test_an_error_is_raised_to_each_who_asks(
    begun: bool, askers: ThreadPoolExecutor, capfd: pytest.CaptureFixture[str]
) -> None:
    work = Work(7, bad=7)
    ahead = Ahead(work, threads=1)
    if begun:
        ahead.begin([7, 8])
        work.await_begun(7)
    asked = [askers.submit(ahead.get, 7) for _ in range(3)]
    work.release.set()
    for each in asked:
        assert str(each.exception(LONG)) == "no 7"
    with pytest.raises(ValueError, match="no 7"):
        ahead.get(7)
    assert ahead.get(8) == 16
    assert capfd.readouterr().err == ""


def test_what_failed_is_done_again_for_who_asks_later() -> None:
    tries = []

    def work(key: int) -> int:
        tries.append(key)
        if len(tries) == 1:
            raise MemoryError("for now")
        return 2 * key

    ahead = Ahead(work, threads=1)
    with pytest.raises(MemoryError, match="for now"):
        ahead.get(3)
    assert [ahead.get(3), ahead.get(3)] == [6, 6]
    assert tries == [3, 3]


@pytest.mark.parametrize("begun", [True, False])
def test_an_error_keeps_nothing_alive(begun: bool) -> None:
    """A traceback holds what the functions of those who asked held: a model, say."""
    work = Work(bad=7)
    ahead = Ahead(work, threads=1)

    def fail() -> weakref.ref[Callable[[], None]]:
        def large() -> None:
            """Something that is to go with its function."""

        with pytest.raises(ValueError, match="no 7"):
            ahead.get(7)
        return weakref.ref(large)

    if begun:
        ahead.begin([7])
        work.await_begun(7)
    for _ in range(2):
        gone = fail()
        gc.collect()
        assert gone() is None


def test_what_is_forgotten_is_left_undone_and_can_be_begun_again() -> None:
    work = Work(1)
    ahead = Ahead(work, threads=1)
    ahead.begin([1, 2, 3, 4])
    work.await_begun(1)
    ahead.forget([1, 2, 4, 5])
    ahead.begin([4])
    work.release.set()
    work.await_begun(3)
    assert work.behind == [1, 4, 3]
    assert [ahead.get(key) for key in (1, 2)] == [2, 4]
    assert work.here == [2]


def run(script: str) -> subprocess.CompletedProcess[str]:
    start = "from exl_cli.engines.exllamav2.kernels.ahead import Ahead\nimport threading\n"
    return python(start + script, timeout=LONG)


def test_the_end_of_the_interpreter_waits_for_what_threads_are_at_and_for_no_more() -> None:
    done = run("""
begun = threading.Event()
def work(key):
    begun.set()
    threading.main_thread().join()
    print("done", key)
ahead = Ahead(work, threads=1)
ahead.begin([1, 2, 3, 4, 5])
begun.wait()
print("over")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\ndone 1\n", "")
