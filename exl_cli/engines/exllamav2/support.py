"""Which models exllamav2 can run, and whether it runs on this machine, without importing it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from exl_cli.errors import UnsupportedModelError
from exl_cli.models import architecture
from exl_cli.models.formats.quantized_layers import (
    group_size_of,
    quantized_layers,
    rows_and_groups,
    sample,
    stored_groups,
)
from exl_cli.models.info import ModelInfo

if TYPE_CHECKING:
    import torch

_DTYPES = {"I32", "I16", "F16", "BF16", "F32"}
_QUANTIZED_ROUTERS = (".gate.qweight", ".gate.q_weight")


def why_not(info: ModelInfo, context: int = 0) -> str:
    """Why exllamav2 cannot run this model with `context` tokens; empty if it can."""
    try:
        model = architecture.read(info)
    except UnsupportedModelError as error:
        return str(error)
    inner = model.experts.inner if model.experts else model.inner
    if info.format != "float" and -(-inner // 32) % 2:
        # Its activation kernel skips the last 32 columns (q_mlp.cu halves the number of blocks and rounds down).
        return f"exllamav2 only supports MLP widths that are multiples of 64, not {inner:,}"
    if model.experts and (name := next((it for it in info.tensors if it.endswith(_QUANTIZED_ROUTERS)), None)):
        return f"exllamav2 only supports routers that are not quantized ({name})"
    if model.learned_positions and context > model.learned_positions:
        return f"more than {model.learned_positions:,} tokens are not supported on the GPU"
    for tensor in info.tensors.values():
        if tensor.dtype not in _DTYPES:
            return f"exllamav2 cannot read {tensor.dtype} tensors ({tensor.name})"
    if info.format == "gptq" and (reason := _groups_not_computed(info)):
        return reason
    if info.format == "gptq" and info.zero_offset == 0 and not info.symmetric and (name := _zero_point_of_zero(info)):
        return f"exllamav2 cannot represent a zero point of 0 in gptq_v2 ({name})"
    return ""


def _groups_not_computed(info: ModelInfo) -> str:
    layers = quantized_layers(info.tensors, "gptq")
    sizes = {group_size_of(*rows_and_groups(parts)) for parts in layers.values() if rows_and_groups(parts)[1] > 1}
    for size in {info.group_size} if info.group_size is not None else sizes:
        if size & (size - 1) and size > 0:
            return f"exllamav2 only supports GPTQ group sizes that are powers of two, not {size}"
        if 0 <= size < 32:
            # Its kernels switch groups at every 32nd row only. With groups of 16, logits were off by 120 %.
            return f"exllamav2 only supports GPTQ group sizes of 32 and more, not {size}"
    for name, parts in sample(layers).items():
        # It sorts the rows by group and then assumes equal group sizes.
        size = group_size_of(*rows_and_groups(parts))
        if (groups := stored_groups(parts)) and sorted(groups) != [row // size for row in range(len(groups))]:
            return f"exllamav2 only supports GPTQ groups of equal size, but those of {name} differ"
    return ""


def _zero_point_of_zero(info: ModelInfo) -> str:
    """The first gptq_v2 layer with a zero point of 0.

    exllamav2 converts gptq_v2 to gptq by subtracting 1 from all eight zero points of a word at once. A 0 borrows from
    its neighbour, and the kernels read it as 16.
    """
    from safetensors import safe_open

    for name, tensor in info.tensors.items():
        if name.endswith(".qzeros"):
            with safe_open(tensor.file, framework="np") as file:
                words = file.get_tensor(name).view("uint32")
            # The usual zero-in-word test, for nibbles: subtracting 1 sets a top bit that was clear.
            if (((words - 0x11111111) & ~words & 0x88888888) != 0).any():
                return name
    return ""


def why_not_here() -> str:
    """Why exllamav2 cannot run on this machine; empty if it should. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU found" if torch.version.cuda else "torch is a CPU-only build"
    if importlib.util.find_spec("exllamav2") is None:
        return "exllamav2 is not installed"
    return ""


def too_old(device: torch.device) -> str:
    """Why a device lacks the tensor cores (Ampere or later) that exl's kernels need; empty if it has them.

    Imports torch.
    """
    import torch

    if device.type != "cuda":
        return "needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"needs compute capability 8.0 or higher; this GPU has {major}.{minor}"
