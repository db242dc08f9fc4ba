"""Gives exllamav2 its weights faster than it reads them itself.

exllamav2 0.3.2 (`stloader.py`, `ext_stloader.cpp`) reads one tensor after the other: into a buffer that is allocated
for it, by threads that are started for it, from there through the driver's own buffer to the GPU, for which it waits
twice. Two of three matrices of an EXL2 MLP it reads to the CPU, to put their columns in order there (`mlp.py`,
`linear.py`). While `read_ahead` lasts, files are read ahead into pinned memory, and columns put in order on the GPU.

It is a matter of speed alone: what is not foreseen here is left to exllamav2, and so is what cannot be read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from exl_cli.engines.exllamav2.readahead import Piece, ReadAhead

# The order of exllamav2's `load` methods: of the modules in a module, of the tensors of one.
_MODULES = (
    "input_layernorm", "post_attention_layernorm", "pre_layernorm", "post_layernorm", "attn", "q_proj", "k_proj",
    "v_proj", "o_proj", "q_norm", "k_norm", "gate", "mlp", "down_proj", "gate_proj", "up_proj",
)  # fmt: skip
_TENSORS = (
    "q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups", "q_perm", "qweight", "qzeros", "scales", "g_idx",
    "weight", "bias",
)  # fmt: skip

_reading: ContextVar[_Weights | None] = ContextVar("_reading", default=None)


class _Weights:
    """A model's tensors, being read ahead.

    Args:
        model: exllamav2's.

    Raises:
        OSError: a file cannot be read.
    """

    def __init__(self, model: Any) -> None:
        from exllamav2.stloader import STFile

        config = model.config
        pieces: list[Piece] = []
        self._index: dict[tuple[str, str], int] = {}
        for key in foreseen(model):
            path = config.tensor_file_map[key]
            file = STFile.open(path, keymap=config.arch.keymap)
            # Twice where a head is tied to the embeddings: read once ahead, in its first place.
            if (path, key) not in self._index:
                begin, end = file.header[key]["data_offsets"]
                self._index[path, key] = len(pieces)
                pieces.append(Piece(path, file.header_size + begin, end - begin))
        self._ahead = ReadAhead(pieces)
        self.close = self._ahead.close

    def tensor(self, file: Any, key: str, device: Any) -> torch.Tensor | None:
        """What `STFile.get_tensor` returns, if it could be had here."""
        from exllamav2.stloader import convert_dtype

        index = self._index.get((file.filename, key))
        if index is None:
            return None
        header = file.header[key]
        tensor = torch.empty(header["shape"], dtype=convert_dtype(header["dtype"])[0], device=device)
        return tensor if self._ahead.take(index, tensor.view(-1).view(torch.uint8)) else None


def foreseen(model: Any) -> Iterator[str]:
    """Names of the tensors that exllamav2's model will ask for, in that order."""
    for module in model.modules:
        for leaf in _leaves(module):
            yield from _tensors(leaf, model.config.tensor_file_map)


def _leaves(module: Any) -> Iterator[Any]:
    """The modules inside of one that have tensors themselves."""
    inner = [part for name in _MODULES if (part := getattr(module, name, None)) is not None]
    experts = (getattr(module, name, None) or () for name in ("w1", "w2", "w3"))
    inner += [matrix for expert in zip(*experts, strict=True) for matrix in expert]
    for part in inner:
        yield from _leaves(part)
    if not inner:
        yield module


def _tensors(module: Any, files: dict[str, str]) -> Iterator[str]:
    for key in filter(None, (module.key, module.alt_key)):
        found = [name for suffix in _TENSORS if (name := f"{key}.{suffix}") in files]
        if found:
            # All from one file before the next.
            for file in dict.fromkeys(files[name] for name in found):
                yield from (name for name in found if files[name] == file)
            return


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """While this lasts, torch's modules on the meta device draw no random numbers for weights that have no memory.

    exllamav2 makes each embedding and matrix so, for its shape. Torch computes on that device in Python, and imports
    its compiler to do so: seconds where files open slowly.
    """
    classes: tuple[Any, ...] = (torch.nn.Embedding, torch.nn.Linear)
    before = [of.reset_parameters for of in classes]

    def leave_out(draw: Any) -> Any:
        return lambda self: None if self.weight.is_meta else draw(self)

    for of, draw in zip(classes, before, strict=True):
        of.reset_parameters = leave_out(draw)
    try:
        yield
    finally:
        for of, draw in zip(classes, before, strict=True):
            of.reset_parameters = draw


@contextlib.contextmanager
def read_ahead(model: Any) -> Iterator[None]:
    """While this lasts, loading exllamav2's model in this thread is fast."""
    _install()
    try:
        weights = _Weights(model) if hasattr(os, "preadv") else None
    except OSError:
        weights = None  # exllamav2 will say what is wrong
    token = _reading.set(weights)
    try:
        yield
    finally:
        _reading.reset(token)
        if weights is not None:
            weights.close()


@cache
def _install() -> None:
    """Put what asks `_reading` first before two of exllamav2's methods, once and for all."""
    from exllamav2.linear import ExLlamaV2Linear
    from exllamav2.stloader import STFile

    get_tensor, load = STFile.get_tensor, ExLlamaV2Linear.load

    def get_tensor_ahead(self: Any, key: str, device: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        weights = _reading.get()
        tensor = weights.tensor(self, key, device) if weights is not None else None
        if tensor is None:
            tensor = get_tensor(self, key, device, out_dtype)
        return tensor if out_dtype is None else tensor.to(out_dtype)

    def load_on_device(
        self: Any,
        w: Any = None,
        device_context: bool = True,
        unmap: bool = False,
        output_map: torch.Tensor | None = None,
    ) -> Any:
        if _reading.get() is not None and w is None and output_map is not None and not self.f_key:
            w = self.load_weight()
            if isinstance(w, dict):
                put_in_order(w, output_map)
                output_map = None
        return load(self, w, device_context, unmap, output_map)

    STFile.get_tensor = get_tensor_ahead
    ExLlamaV2Linear.load = load_on_device


def put_in_order(tensors: dict[str, torch.Tensor], columns: torch.Tensor) -> None:
    """Put the columns of an EXL2 matrix in order, as exllamav2's `tensor_remap` and `tensor_remap_4bit` do on the CPU.

    Args:
        tensors: of the matrix; `q_weight` and `q_scale` are replaced.
        columns: int32, shape (columns,): which old one comes there.
    """
    from exllamav2.util import pack_4bit, unpack_4bit

    old = columns.to(tensors["q_weight"].device)
    tensors["q_weight"] = tensors["q_weight"].index_select(1, old)
    tensors["q_scale"] = pack_4bit(unpack_4bit(tensors["q_scale"]).index_select(1, old))
