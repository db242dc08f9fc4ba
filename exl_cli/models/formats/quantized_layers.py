"""Validate quantized layers, and detect GPTQ's parameters from the tensors.

The GPTQ parameters in config.json are often wrong, because tools converted the tensors without updating the file.
Whatever the tensors show takes precedence.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from exl_cli.errors import DamagedModelError, UnsupportedModelError, brief
from exl_cli.models.formats.headers import TensorHeader

Parts = Mapping[str, TensorHeader]

_PARTS = {"exl2": ("q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm"), "gptq": ("qweight", "qzeros")}
_SCALES = ("F16", "BF16", "F32")
# Number of layers sampled, and bytes read of each of their tensors.
_SAMPLED = 8
_MOST_BYTES = 1 << 18
# By zero_offset.
_FORMATS: dict[int | None, str] = {1: "gptq", 0: "gptq_v2"}
_SHARP, _LARGEST_VARIANCE = 0.2, 14


def damaged(name: str, part: str, problem: str) -> DamagedModelError:
    """The error for a bad tensor of layer `name`."""
    where = f"{name}.{part}" if name else part
    return DamagedModelError(f"{where}: {problem}", "download or convert the model again")


def quantized_layers(tensors: Mapping[str, TensorHeader], format_: str) -> Mapping[str, Parts]:
    """Group the tensors of quantized layers: layer name to part name ("qweight", …) to header. Validates each layer.

    Args:
        tensors: all of a model's headers, by name.
        format_: "exl2" or "gptq".

    Raises:
        DamagedModelError: a part is missing, or the types or shapes of the parts do not match.
        UnsupportedModelError: a GPTQ layer that is not 4-bit.
    """
    check = {"exl2": _check_exl2, "gptq": _check_gptq}[format_]
    parts: dict[str, dict[str, TensorHeader]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        parts.setdefault(layer, {})[part] = tensor
    layers = {layer: those for layer, those in parts.items() if any(part in those for part in _PARTS[format_])}
    for layer, those in layers.items():
        check(layer, those)
    return layers


def _check_exl2(layer: str, parts: Parts) -> None:
    _, columns = _require(layer, parts, "q_weight", 2, ("I32",)).shape
    _require_eights(layer, "q_weight", columns)
    (groups,) = _require(layer, parts, "q_scale_max", 1, ("F16",)).shape
    _require(layer, parts, "q_scale", 2, ("I32",), (groups, columns // 8))
    _require(layer, parts, "q_groups", 1, ("I16",), (2 * groups,))
    _require(layer, parts, "q_invperm", 1, ("I16", "I32"))


def _check_gptq(layer: str, parts: Parts) -> None:
    words, columns = _require(layer, parts, "qweight", 2, ("I32",)).shape
    groups, _ = _require(layer, parts, "scales", 2, _SCALES).shape
    _require(layer, parts, "scales", 2, _SCALES, (groups, columns))
    # Only the width of qzeros, N * bits / 32, shows how many bits a code has.
    bits = 32 * _require(layer, parts, "qzeros", 2, ("I32",)).shape[1] / columns
    if bits in (2, 3, 8):
        raise UnsupportedModelError(
            f"{layer} is {bits:g}-bit GPTQ; exllamav2 only supports 4-bit GPTQ",
            "look for an EXL2, GPTQ 4-bit or float16 version of the same model",
        )
    _require_eights(layer, "qweight", columns)
    _require(layer, parts, "qzeros", 2, ("I32",), (groups, columns // 8))
    if "g_idx" in parts:
        _require(layer, parts, "g_idx", 1, ("I32", "I64"), (8 * words,))


def _require(
    layer: str, parts: Parts, part: str, dims: int, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None
) -> TensorHeader:
    if part not in parts:
        raise damaged(layer, part, "the tensor is missing")
    tensor = parts[part]
    if tensor.dtype not in dtypes:
        raise damaged(layer, part, f"expected {' or '.join(dtypes)}, found {tensor.dtype}")
    if len(tensor.shape) != dims or not all(tensor.shape):
        raise damaged(layer, part, f"expected {dims} dimensions, none of them 0, found shape {list(tensor.shape)}")
    if shape is not None and tensor.shape != shape:
        raise damaged(layer, part, f"expected shape {list(shape)}, found {list(tensor.shape)}")
    return tensor


def _require_eights(layer: str, part: str, columns: int) -> None:
    if columns % 8:
        raise damaged(layer, part, f"expected a multiple of 8 columns, found {columns}")


class GptqSettings(NamedTuple):
    """A GPTQ model's actual parameters.

    Attributes:
        group_size: rows per group; -1 for one group, None if layers differ (see `group_size_of`).
        desc_act: act-order: `g_idx` is unordered.
        symmetric: all zero points are equal.
        zero_offset: added to stored zero points: 1 for "gptq", 0 for "gptq_v2".
        notes: one line for each contradiction of config.json.
    """

    group_size: int | None
    desc_act: bool
    symmetric: bool
    zero_offset: int
    notes: tuple[str, ...]


def gptq_settings(file: Path, declared: Mapping[str, Any], layers: Mapping[str, Parts]) -> GptqSettings:
    """Detect the parameters from a sample of layers, falling back to those declared.

    Args:
        file: path of config.json, for messages.
        declared: its `quantization_config`.
        layers: from `quantized_layers`.

    Raises:
        DamagedModelError: the tensors are ambiguous or inconsistent.
    """
    differences: list[str] = []
    if declared.get("bits") not in (None, 4):
        differences.append(f"bits {declared['bits']}, but the weights have 4")
    symmetric, zero_offset = _zero_points(file, declared, layers, differences)
    group_size = _group_size(declared.get("group_size"), layers, differences)
    desc_act = _act_order(file, declared, layers, differences)
    notes = tuple(
        f"config.json declares {brief(difference)}; using the weights as stored" for difference in differences
    )
    return GptqSettings(group_size, desc_act, symmetric, zero_offset, notes)


def group_size_of(rows: int, groups: int) -> int:
    """Rows per group, if all groups but the last are equal; 0 if that is impossible.

    Several sizes can give the same number of groups. Prefer a power of two, which nearly all quantizers use and
    exllamav2 assumes; otherwise take the smallest.
    """
    least = -(-rows // groups)
    return next((size for size in (1 << (least - 1).bit_length(), least) if -(-rows // size) == groups), 0)


def rows_and_groups(parts: Parts) -> tuple[int, int]:
    """Rows and groups of a GPTQ layer."""
    return 8 * parts["qweight"].shape[0], parts["scales"].shape[0]


def stored_groups(parts: Parts) -> list[int] | None:
    """A GPTQ layer's `g_idx`; None if it is absent or all zero (see `gptq`), so that groups are consecutive."""
    if "g_idx" not in parts:
        return None
    tensor = parts["g_idx"]
    groups = array("i" if tensor.dtype == "I32" else "q", tensor.read(tensor.nbytes)).tolist()
    return groups if any(groups) else None


def sample(layers: Mapping[str, Parts]) -> dict[str, Parts]:
    """Up to eight layers, evenly spaced through the model."""
    names = list(layers)
    return {name: layers[name] for i in range(_SAMPLED) for name in names[i * len(names) // _SAMPLED :][:1]}


def _group_size(declared: Any, layers: Mapping[str, Parts], differences: list[str]) -> int | None:
    shapes = {rows_and_groups(parts) for parts in layers.values()}
    if type(declared) is int and all(-(-rows // (declared if declared > 0 else rows)) == n for rows, n in shapes):
        return declared
    sizes = sorted({group_size_of(*shape) for shape in shapes if shape[1] > 1} or {-1})
    if declared is not None:
        weights = "one group" if sizes == [-1] else f"groups of {' and '.join(map(str, sizes))} rows"
        differences.append(f"group_size {declared}, but the weights have {weights}")
    return sizes[0] if len(sizes) == 1 else None


def _act_order(file: Path, declared: Mapping[str, Any], layers: Mapping[str, Parts], differences: list[str]) -> bool:
    said = declared.get("desc_act") is True
    stored = {name: stored_groups(parts) for name, parts in sample(layers).items()}
    silent = [name for name, parts in layers.items() if "g_idx" not in parts or stored.get(name, parts) is None]
    silent = [name for name in silent if rows_and_groups(layers[name])[1] > 1]
    if said and silent:
        raise DamagedModelError(
            f"{file} declares act-order (desc_act), but {silent[0]}.g_idx, which has the order of the rows, "
            f"is {'all zero' if 'g_idx' in layers[silent[0]] else 'missing'}",
            "download the model again; if its rows are in order after all, set desc_act to false",
        )
    told = [groups for groups in stored.values() if groups is not None]
    mixed = any(groups != sorted(groups) for groups in told)
    if mixed and not said:
        differences.append("no act-order, but the weights have it (g_idx)")
    if said and told and not mixed and declared.get("static_groups") is not True:
        differences.append("act-order, but the weights' groups are in order (g_idx)")
    return mixed or (said and not told)


def _zero_points(
    file: Path, declared: Mapping[str, Any], layers: Mapping[str, Parts], differences: list[str]
) -> tuple[bool, int]:
    """Whether all zero points are equal, and the zero offset."""
    zeros = {name: _codes(parts["qzeros"]) for name, parts in sample(layers).items()}
    constants = {code for counts in zeros.values() if len(counts) == 1 for code in counts}
    # A symmetric quantizer has zero point 8 throughout, stored as 8 (gptq_v2) or 7 (gptq). An asymmetric one fits it to
    # each group and never gives the same value throughout a layer.
    if len(constants) > 1 or not constants <= {7, 8}:
        stored_as = " in some layers, and ".join(f"{code} for every zero point" for code in sorted(constants))
        raise DamagedModelError(
            f"{file.parent} stores {stored_as}, where gptq stores 7 and gptq_v2 stores 8",
            "download or convert the model again",
        )
    offsets: set[int | None] = {8 - code for code in constants}
    offsets = offsets or {_offset_by_means(_codes(layers[name]["qweight"]), counts) for name, counts in zeros.items()}
    symmetric = all(len(counts) == 1 for counts in zeros.values())
    format_ = str(declared.get("checkpoint_format") or "gptq").lower()
    stored = _FORMATS.get(offsets.pop()) if len(offsets) == 1 else None
    if stored not in (None, format_):
        differences.append(f"checkpoint_format {format_}, but the zero points are stored as {stored}")
    if declared.get("sym") is True and not symmetric:
        differences.append("symmetric weights, but their zero points vary")
    return symmetric, int((stored or format_) == "gptq")


def _codes(tensor: TensorHeader) -> Counter[int]:
    """Histogram of the 4-bit codes in the first 256 KiB of a tensor."""
    counts: Counter[int] = Counter()
    for byte, count in Counter(tensor.read(_MOST_BYTES)).items():
        counts[byte & 15] += count
        counts[byte >> 4] += count
    return counts


def _offset_by_means(codes: Counter[int], zeros: Counter[int]) -> int | None:
    """The zero offset that makes the mean weight 0; None if it is not clear."""
    # The mean weight of a trained layer is near 0, so mean code - mean stored zero point is 0 or 1, within 0.05 over
    # this many codes. Random codes would show nothing: their variance is 21, that of trained layers 6 to 10.
    mean = sum(code * count for code, count in codes.items()) / codes.total()
    if sum((code - mean) ** 2 * count for code, count in codes.items()) > _LARGEST_VARIANCE * codes.total():
        return None
    difference = mean - sum(code * count for code, count in zeros.items()) / zeros.total()
    return next((offset for offset in (1, 0) if abs(difference - offset) < _SHARP), None)
