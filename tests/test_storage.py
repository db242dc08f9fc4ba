"""Atomic writes, and bounded reads."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exl_cli.system.files import read_file, write_atomically


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a device or a pipe"):
        write_atomically(pipe, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [*tmp_path.iterdir()] == [pipe]


def test_what_a_killed_write_left_is_removed_at_the_next(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running, other = (
        tmp_path / name
        for name in (f".session.json.{ended.pid}.tmp", f".session.json.{os.getpid()}.tmp", ".not-ours.tmp")
    )
    for file in (left, running, other):
        file.write_text("half")
        os.utime(file, (time.time() - 60, time.time() - 60))
    write_atomically(tmp_path / "another.json", "text")
    assert sorted(tmp_path.iterdir()) == sorted([running, other, tmp_path / "another.json"])


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert read_file(file, limit=100) == b"x" * 100
    with pytest.raises(OSError, match="larger"):
        read_file(file, limit=99)
