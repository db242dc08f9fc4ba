"""safetensors headers, read without torch: names, dtypes, shapes and byte ranges of the tensors in a file.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, that many bytes of JSON mapping
each tensor name to `dtype`, `shape` and `data_offsets` (relative to the end of the header), then the data.
"""

from __future__ import annotations

import json
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_cli.errors import DamagedModelError, brief
from exl_cli.models.config import refuse_pointer

# The format's own limit; a larger number is a file of another kind.
_MAX_HEADER = 100_000_000
# A file has some 100,000 where a model of many experts is quantized into one; twice as many keep a computer busy.
_MAX_TENSORS = 150_000


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file describes it.

    Attributes:
        name: the tensor's name.
        dtype: safetensors' dtype name, e.g. "F16", "I32".
        shape: its dimensions.
        nbytes: bytes of data.
        file: the file it is in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(file: Path) -> list[TensorHeader]:
    """The tensors of one safetensors file.

    Raises:
        DamagedModelError: the file is unreadable, no regular one, not safetensors, or shorter than its header says.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            # A pipe would be waited for, a device read without end.
            raise _damaged(file, "is not a regular file")
        size = status.st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            refuse_pointer(file, prefix + stream.read(64))
            stream.seek(8)
            if len(prefix) < 8:
                raise _damaged(file, f"is truncated: {size} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_HEADER:
                raise _damaged(file, "is not a safetensors file")
            if 8 + length > size:
                raise _damaged(file, f"is truncated: {size:,} bytes, its header alone takes {8 + length:,}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise DamagedModelError(
            f"cannot read {file}: {error.strerror or error}", "check the file's permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "has an unreadable header") from error
    if not isinstance(header, dict):
        raise _damaged(file, "has an unreadable header")
    if len(header) > _MAX_TENSORS:
        raise _damaged(file, f"describes {len(header):,} tensors, far more than any model has in a file")
    tensors = [_tensor(file, name, entry) for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + sum(t.nbytes for t in tensors)
    if expected != size:
        state = "truncated" if size < expected else "longer than its header says"
        raise _damaged(file, f"is {state}: {expected:,} bytes expected, {size:,} found")
    return tensors


def _tensor(file: Path, name: str, entry: Any) -> TensorHeader:
    try:
        begin, end = entry["data_offsets"]
        shape = tuple(int(size) for size in entry["shape"])
        return TensorHeader(name, str(entry["dtype"]), shape, int(end) - int(begin), file)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(file, f"describes tensor {brief(name)!r} in a way that cannot be read") from error


def _damaged(file: Path, what: str) -> DamagedModelError:
    return DamagedModelError(f"{file} {what}", "download the file again")
