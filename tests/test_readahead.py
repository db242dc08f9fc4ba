"""Reading ahead: every piece that can be had is the file's, whatever is asked for and in whatever order."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from exl_cli.engines.exllamav2.readahead import BLOCK, BUFFERS, Piece, ReadAhead

SIZE = (BUFFERS + 3) * BLOCK


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Iterator[Path]:
    path = tmp_path / "weights"
    path.write_bytes(content)
    yield path
    path.unlink()


def cut(path: Path, *sizes: int) -> list[Piece]:
    """The file's first bytes in pieces."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [Piece(str(path), start, size) for start, size in zip(starts, sizes, strict=True)]


def is_right(ahead: ReadAhead, index: int, piece: Piece, content: bytes) -> bool:
    """Whether it could be had; if so it must be the file's."""
    target = torch.zeros(piece.size, dtype=torch.uint8)
    taken = ahead.take(index, target)
    assert not taken or target.numpy().tobytes() == content[piece.offset : piece.offset + piece.size]
    return taken


def test_all_pieces_in_their_order(file: Path, content: bytes) -> None:
    pieces = cut(file, 5, 0, BLOCK, 1, (BUFFERS + 1) * BLOCK - 100, BLOCK - 1)
    with closing(ReadAhead(pieces)) as ahead:
        assert all(is_right(ahead, index, piece, content) for index, piece in enumerate(pieces))


def test_what_is_passed_over_makes_room_and_is_given_up(file: Path, content: bytes) -> None:
    """Pieces that nobody asks for fill all buffers before the one that is wanted."""
    pieces = cut(file, *[BLOCK] * (BUFFERS + 2))
    with closing(ReadAhead(pieces)) as ahead:
        last = len(pieces) - 1
        assert is_right(ahead, last - 1, pieces[last - 1], content)
        assert not is_right(ahead, 3, pieces[3], content)
        assert is_right(ahead, last, pieces[last], content)
        assert not is_right(ahead, last, pieces[last], content)


@pytest.mark.parametrize("seed", range(8))
def test_any_pieces_in_any_order(file: Path, content: bytes, seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.choice((0, 1, 4096, BLOCK // 3, BLOCK, 2 * BLOCK + 7)) for _ in range(rng.randrange(1, 12))]
    pieces = cut(file, *sizes)
    order = rng.sample(range(len(pieces)), len(pieces)) if seed % 2 else sorted(rng.sample(range(len(pieces)), 1))
    latest = -1
    with closing(ReadAhead(pieces)) as ahead:
        for index in order:
            assert is_right(ahead, index, pieces[index], content) == (index > latest)
            latest = max(latest, index)


def test_a_piece_that_cannot_be_read_is_said_and_the_others_are_had(file: Path, content: bytes) -> None:
    """In a file that has been cut off, and with more blocks of it than there are buffers."""
    pieces = cut(file, BLOCK, SIZE - 2 * BLOCK, BLOCK)
    os.truncate(file, BLOCK)
    other = file.with_name("other")
    other.write_bytes(content[:BLOCK])
    pieces.append(Piece(str(other), 0, BLOCK))
    with closing(ReadAhead(pieces)) as ahead:
        had = [is_right(ahead, index, piece, content) for index, piece in enumerate(pieces)]
    assert had == [True, False, False, True]


def test_it_can_be_stopped_at_any_time(file: Path) -> None:
    for taken in range(3):
        pieces = cut(file, *[2 * BLOCK] * 8)
        ahead = ReadAhead(pieces)
        for index in range(taken):
            assert ahead.take(index, torch.empty(2 * BLOCK, dtype=torch.uint8))
        before = set(Path("/proc/self/fd").iterdir())
        ahead.close()
        assert len(before - set(Path("/proc/self/fd").iterdir())) == 1
        assert not ahead.take(7, torch.empty(2 * BLOCK, dtype=torch.uint8))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ReadAhead([Piece(str(tmp_path / "gone"), 0, 1)])
