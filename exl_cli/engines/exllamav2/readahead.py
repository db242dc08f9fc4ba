"""Reads pieces of files ahead of whoever wants them, in threads, and copies them to where they are wanted.

The buffers between are pinned memory, from which a GPU reads several times as fast as from other memory, and there are
few of them: what is read ahead waits until what comes before it is taken.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from exl_cli.system.machine import usable_cores

BLOCK = 4 << 20
# 64 MiB: more than is read while a layer is prepared, and little beside what torch itself takes.
BUFFERS = 16
THREADS = 8


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file: a tensor's."""

    path: str
    offset: int
    size: int


class _Block:
    """What one buffer holds of a piece."""

    __slots__ = ("buffer", "failed", "offset", "path", "size", "start", "unwanted")

    def __init__(self, piece: Piece, start: int) -> None:
        self.path, self.offset, self.start = piece.path, piece.offset + start, start
        self.size = min(BLOCK, piece.size - start)
        self.buffer: torch.Tensor | None = None
        self.failed = self.unwanted = False


class ReadAhead:
    """Reads pieces in the order given.

    Args:
        pieces: what will be wanted, in that order.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._files: dict[str, int] = {}
        try:
            for path in {piece.path for piece in pieces}:
                self._files[path] = os.open(path, os.O_RDONLY)
        except OSError:
            self._close_files()
            raise
        self._blocks: list[_Block] = []
        self._first = [0]
        for piece in pieces:
            self._blocks += [_Block(piece, start) for start in range(0, piece.size, BLOCK)]
            self._first.append(len(self._blocks))
        # All below, and the blocks, change under this lock only. Buffers are handed out in the order of the blocks, so
        # that the block that is waited for always gets one.
        lock = threading.Lock()
        self._read, self._room = threading.Condition(lock), threading.Condition(lock)
        self._taken = 0  # pieces
        self._begun = 0  # blocks
        self._made = 0  # buffers
        # Each with the event of its last copy. First in, first out: that copy is over by the time.
        self._free: deque[tuple[torch.Tensor, Any]] = deque()
        self._closed = False
        cores = usable_cores()
        self._threads = [
            threading.Thread(target=self._work, name="read ahead", daemon=True)
            for _ in range(min(THREADS, max(2, cores), len(self._blocks)))
        ]
        for thread in self._threads:
            thread.start()

    def take(self, index: int, target: torch.Tensor) -> bool:
        """Copy a piece; those before it are given up.

        Args:
            index: which.
            target: bytes, shape (size,), contiguous, on any device. They are there when this returns.

        Returns:
            Whether it could be had: not one given up, nor one whose file could not be read.
        """
        first, end = self._first[index : index + 2]
        with self._room:
            if index < self._taken or self._closed:
                return False
            self._give_up(self._first[self._taken], first)
            self._taken = index + 1
        for number in range(first, end):
            block = self._blocks[number]
            with self._read:
                while block.buffer is None and not block.failed:
                    self._read.wait()
                if block.buffer is None:
                    self._give_up(number, end)
                    return False
                buffer, block.buffer = block.buffer, None
            target[block.start : block.start + block.size].copy_(buffer[: block.size], non_blocking=True)
            copied = torch.cuda.current_stream(target.device).record_event() if target.is_cuda else None
            with self._room:
                self._free.append((buffer, copied))
                self._room.notify()
        if target.is_cuda:
            torch.cuda.current_stream(target.device).synchronize()
        return True

    def close(self) -> None:
        """Stop reading."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        for thread in self._threads:
            thread.join()
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _give_up(self, first: int, end: int) -> None:
        """Leave out these blocks; the buffers of those that are begun are for others, now or when they are read."""
        for block in self._blocks[first : min(end, self._begun)]:
            block.unwanted = True
            if block.buffer is not None:
                self._free.append((block.buffer, None))
                block.buffer = None
        self._begun = max(self._begun, end)
        self._room.notify_all()

    def _work(self) -> None:
        """A thread."""
        while True:
            with self._room:
                while not (self._closed or self._begun == len(self._blocks) or self._free or self._made < BUFFERS):
                    self._room.wait()
                if self._closed or self._begun == len(self._blocks):
                    return
                block = self._blocks[self._begun]
                self._begun += 1
                buffer, copied = self._free.popleft() if self._free else (None, None)
                if buffer is None:
                    self._made += 1
            failed = False
            try:
                if copied is not None:
                    copied.synchronize()
                if buffer is None:
                    buffer = _new_buffer()
                _fill(self._files[block.path], block.offset, buffer.numpy().data[: block.size])
            except Exception:  # whoever wants it reads it in another way, and says what is wrong
                failed = True
            with self._read:
                block.failed = failed
                if buffer is None:
                    self._made -= 1
                elif failed or block.unwanted:
                    self._free.append((buffer, None))
                    self._room.notify()
                else:
                    block.buffer = buffer
                self._read.notify()


def _new_buffer() -> torch.Tensor:
    try:
        return torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # without a GPU, or where little memory can be pinned: any other does, only slower
        return torch.empty(BLOCK, dtype=torch.uint8)


def _fill(file: int, offset: int, view: memoryview) -> None:
    while len(view):
        count = os.preadv(file, [view], offset)
        if not count:
            raise EOFError
        view, offset = view[count:], offset + count
