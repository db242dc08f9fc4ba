"""CUDA graphs of forward passes, and the fallback when capture fails."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from exl_cli.engines.exllamav2.graphs import Graphs


def nothing() -> None:
    pass


def in_thread(work: Callable[[], None]) -> None:
    """Run to its end in a new thread, on a new stream, once all GPU work so far is done."""
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_the_second_use_is_captured_and_the_third_replays_it() -> None:
    graphs = Graphs(True)
    x, out = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    seen = []

    def work() -> None:
        out.copy_(x + 1)

    def uses() -> None:
        for value in (1.0, 2.0, 3.0):
            x.fill_(value)
            replayed = graphs.replay("pass")
            if not replayed:
                graphs.run("pass", work, nothing)
            graphs.capture()
            seen.append((replayed, out.tolist()))

    in_thread(uses)
    assert seen == [(False, [2.0] * 4), (False, [3.0] * 4), (True, [4.0] * 4)]
    assert graphs.usable


def test_a_thread_that_has_not_multiplied_before_captures_a_product() -> None:
    graphs = Graphs(True)
    x = torch.randn((8, 64), device="cuda").half()
    out = torch.zeros((8, 8), device="cuda").half()

    def work() -> None:
        torch.matmul(x, x.T, out=out)

    done, end = threading.Event(), threading.Event()

    def first() -> None:
        graphs.run("pass", work, nothing)
        done.set()
        end.wait()  # a thread that ends leaves cuBLAS's handle to the next

    def second() -> None:
        graphs.run("pass", work, nothing)
        graphs.capture()
        out.zero_()
        assert graphs.replay("pass")
        torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=in_thread, args=(first,))
    thread.start()
    try:
        assert done.wait(20)
        # As where threads follow streams: whichever comes next does the pass.
        in_thread(second)
    finally:
        end.set()
        thread.join()
    assert graphs.why_not == ""
    torch.testing.assert_close(out, x @ x.T)


@pytest.mark.parametrize("when", ["at once", "late"])
def test_what_cannot_be_captured_runs_without_and_leaves_torch_as_it_was(when: str) -> None:
    graphs = Graphs(True)
    x, out = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")

    def work() -> None:
        if when == "late":
            out.copy_(x + 1)
        torch.cuda.current_stream().synchronize()
        out.copy_(x + 2)

    def uses() -> None:
        for value in (1.0, 2.0, 3.0):
            x.fill_(value)
            assert not graphs.replay("pass")
            graphs.run("pass", work, nothing)
            graphs.capture()
            assert out.tolist() == [value + 2] * 4

    in_thread(uses)
    assert not graphs.usable
    assert "captur" in graphs.why_not
    # All that a capture that failed leaves as it is, but for what `capture` does about it.
    assert torch.randn(8, device="cuda").isfinite().all()
    before = torch.cuda.memory_reserved()
    large = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_reserved() > before
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_work_that_fails_is_not_captured() -> None:
    graphs = Graphs(True)
    out = torch.zeros(4, device="cuda")
    fails = [False, True, False]

    def work() -> None:
        if fails.pop(0):
            raise RuntimeError("out of memory")
        out.fill_(1)

    def uses() -> None:
        graphs.run("pass", work, nothing)
        with pytest.raises(RuntimeError, match="out of memory"):
            graphs.run("pass", work, nothing)
        graphs.capture()
        assert graphs.usable
        assert not graphs.replay("pass")

    in_thread(uses)
