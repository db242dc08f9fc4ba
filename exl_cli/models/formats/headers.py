"""Read safetensors headers without torch: names, dtypes, shapes and byte ranges of a file's tensors.

Format (https://huggingface.co/docs/safetensors): the header's length as a little-endian uint64; the header, JSON that
maps tensor names to `dtype`, `shape` and `data_offsets` relative to the header's end; then the data, without gaps.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_cli.errors import DamagedModelError, brief
from exl_cli.models.config import refuse_pointer

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# The limit of the safetensors library; a larger number means another kind of file.
_MAX_HEADER = 100_000_000
# The largest real files, MoE models quantized into one shard, have about 100,000 tensors. Bounds time and memory.
_MAX_TENSORS = 150_000
_MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in a safetensors header.

    Attributes:
        name: the tensor's name.
        dtype: safetensors' name, such as "F16" or "I32".
        shape: its dimensions.
        nbytes: size of its data.
        file: the file it is in.
        offset: position of its data, from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, most: int) -> bytes:
        """Read at most `most` bytes of its data; raises DamagedModelError if the file cannot be read."""
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.offset)
                return stream.read(min(most, self.nbytes))
        except OSError as error:
            raise _unreadable(self.file, error) from error


def read_header(file: Path) -> list[TensorHeader]:
    """Read and validate a file's header.

    Raises:
        DamagedModelError: unreadable, not a regular file, not safetensors, or not as long as its header says.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe may block, and a device never ends.
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
                raise _damaged(file, f"is truncated: it has {size:,} bytes, but its header alone takes {8 + length:,}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "has an unreadable header") from error
    if not isinstance(header, dict):
        raise _damaged(file, "has an unreadable header")
    if len(header) > _MAX_TENSORS:
        raise _damaged(file, f"describes {len(header):,} tensors, far more than any model has")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, 8 + length, name, entry) for name, entry in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            state = "overlap" if tensor.offset < end else "have a gap"
            raise _damaged(file, f"is not a safetensors file: its tensors {state} at {brief(tensor.name)!r}")
        end += tensor.nbytes
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise _damaged(file, f"is {state}: {end:,} bytes expected, {size:,} found")
    return tensors


def _tensor(file: Path, start: int, name: str, entry: Any) -> TensorHeader:
    """Parse a header entry; the file's data section starts at byte `start`."""
    try:
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        counts = all(type(number) is int and number >= 0 for number in (*shape, begin, end - begin))
        if not counts or len(shape) > _MAX_DIMENSIONS:
            raise ValueError
        bits = _BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"has an invalid entry for tensor {brief(name)!r}") from error
    tensor = TensorHeader(name, dtype, shape, end - begin, file, start + begin)
    if bits * tensor.numel != 8 * tensor.nbytes:
        size = f"{tensor.nbytes:,} bytes, which does not match {brief(str(list(shape)))} of {dtype}"
        raise _damaged(file, f"gives tensor {brief(name)!r} {size}")
    return tensor


def _damaged(file: Path, what: str) -> DamagedModelError:
    return DamagedModelError(f"{file} {what}", "download the file again")


def _unreadable(file: Path, error: OSError) -> DamagedModelError:
    return DamagedModelError(f"cannot read {file}: {error.strerror or error}", "check the file's permissions")
