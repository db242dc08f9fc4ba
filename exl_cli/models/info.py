"""What is known of a model before any weight is read: from its JSON files and safetensors headers alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from exl_cli.errors import DamagedModelError, ModelNotFoundError, UnsupportedModelError, brief
from exl_cli.models.config import (
    check_layers,
    check_values,
    context_length_of,
    in_layer,
    quantization_of,
    read_json,
    value_of,
    with_quantization,
)
from exl_cli.models.formats.headers import TensorHeader, read_header
from exl_cli.system.files import is_there

Format = Literal["exl2", "gptq", "float"]


@dataclass(frozen=True)
class ModelInfo:
    """A model folder that `exl` can run.

    Attributes:
        name: what the user calls it.
        path: its folder.
        format: how its weights are stored.
        architecture: transformers' class name, e.g. "LlamaForCausalLM".
        parameters: weights of the network; a head tied to the embeddings counts once.
        bits_per_weight: stored bits per weight of the linear layers, scales and zero points included.
        context_length: the longest context the model was made for, in tokens.
        size_bytes: bytes of its weight files.
        tensors: every tensor's header, by name.
        has_chat_template: whether it says how to format a conversation.
        group_size, desc_act, symmetric, zero_offset, head_bits: the quantization's parameters, where there are any;
            `zero_offset` is 1 where GPTQ zero points are stored minus one (the original convention), 0 for "gptq_v2".
        config, generation_config: the parsed files; the latter is empty where there is none.
    """

    name: str
    path: Path
    format: Format
    architecture: str
    parameters: int
    bits_per_weight: float
    context_length: int
    size_bytes: int
    tensors: dict[str, TensorHeader] = field(repr=False)
    has_chat_template: bool = False
    group_size: int | None = None
    desc_act: bool = False
    symmetric: bool = False
    zero_offset: int = 1
    head_bits: int | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    generation_config: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def format_name(self) -> str:
        """The format and its bits, as people write it: "EXL2 5.0 bpw", "GPTQ 4-bit g128", "float16"."""
        if self.format == "exl2":
            bits = quantization_of(self.config).get("bits")
            return f"EXL2 {float(bits) if isinstance(bits, (int, float)) else self.bits_per_weight:.1f} bpw"
        if self.format == "gptq":
            group = f" g{self.group_size}" if self.group_size and self.group_size > 0 else ""
            return f"GPTQ 4-bit{group}{' act-order' if self.desc_act else ''}"
        return f"float{self.bits_per_weight:.0f}"

    def text_config(self, key: str, default: Any = None) -> Any:
        """A value of config.json; see `configs.value_of`."""
        return value_of(self.config, key, default)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; sizes in bytes and tokens."""
        return {
            "name": self.name,
            "path": str(self.path),
            "format": self.format,
            "format_name": self.format_name,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "context_length": self.context_length,
            "size_bytes": self.size_bytes,
            "chat_template": self.has_chat_template,
        }


def inspect(path: Path, name: str | None = None) -> ModelInfo:
    """Everything about the model in a folder.

    Raises:
        DamagedModelError: files missing, truncated, unreadable, or at odds with one another.
        ModelNotFoundError: the folder is none of a model.
        UnsupportedModelError: a format that `exl` does not run, named.
    """
    if not (path / "config.json").exists():
        _refuse_other_kinds(path)
        _refuse_no_model(path)
    config = read_json(path / "config.json", required=True)
    config = with_quantization(config, lambda: read_json(path / "quantize_config.json"))
    quantization = quantization_of(config)
    refuse_method(path, quantization)
    check_values(path, config)
    files = weight_files(path)
    tensors = {tensor.name: tensor for file in files for tensor in read_header(file)}
    format_ = _detect_format(path, tensors)
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(architecture, str) or not architecture:
        raise DamagedModelError(
            f"{path / 'config.json'} names no architecture",
            'add the name of its class in transformers, as "architectures": ["LlamaForCausalLM"]',
        )
    check_layers(path, config, tensors)
    parameters, bits = _count(config, tensors)
    extra: dict[str, Any] = {}
    if format_ == "gptq":
        extra = _gptq_parameters(path, quantization, tensors)
    elif format_ == "exl2":
        extra = {"head_bits": quantization.get("head_bits")}
    return ModelInfo(
        name=name or str(path),
        path=path,
        format=format_,
        architecture=architecture,
        parameters=parameters,
        bits_per_weight=bits,
        context_length=context_length_of(config),
        size_bytes=sum(file.stat().st_size for file in files),
        tensors=tensors,
        has_chat_template=_has_chat_template(path),
        config=config,
        generation_config=read_json(path / "generation_config.json"),
        **extra,
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up the model, shards in order.

    Raises:
        DamagedModelError: a shard is missing.
        UnsupportedModelError: the weights are of another kind.
    """
    index = read_json(path / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict):
        if not all(isinstance(file, str) for file in index.values()):
            raise DamagedModelError(
                f"{path}/model.safetensors.index.json names files by something else than text", "download it again"
            )
        files = [path / file for file in sorted(set(index.values()))]
        if any(file.parent != path for file in files):
            raise DamagedModelError(
                f"{path}/model.safetensors.index.json points outside the folder", "do not use this model"
            )
    else:
        files = sorted(path.glob("*.safetensors"))
        # Mistral's repositories carry the same weights twice, once in its own naming.
        files = [f for f in files if not f.name.startswith("consolidated")] or files
    if not files:
        _refuse_other_kinds(path)
        raise DamagedModelError(f"no .safetensors file in {path}", "download the model again")
    wanted = {file.name for file in files}
    for file in files:
        if match := re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", file.name):
            stem, width, total = match[1], len(match[2]), int(match[3])
            wanted |= {f"{stem}-{i:0{width}d}-of-{match[3]}.safetensors" for i in range(1, total + 1)}
    missing = sorted(name for name in wanted if not is_there(path / name))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DamagedModelError(
            f"{path / brief(missing[0])}{more} missing", "download the model again: it goes on where it stopped"
        )
    return files


_OTHER_METHODS = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "exl3": "EXL3",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quip": "QuIP#",
    "eetq": "EETQ",
    "torchao": "torchao",
    "mxfp4": "MXFP4",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "quark": "Quark",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
}
_ADVICE = "look for an EXL2, GPTQ 4-bit or float16 version of the same model"


def _unsupported(path: Path, what: str, hint: str = _ADVICE) -> UnsupportedModelError:
    return UnsupportedModelError(f"{path} holds {what} weights, which exl does not run", hint)


def refuse_method(path: Path, quantization: dict[str, Any]) -> None:
    """Raise UnsupportedModelError where config.json's quantization settings name a method that exl does not run."""
    method = str(quantization.get("quant_method", "")).lower()
    if method in _OTHER_METHODS:
        hint = "run EXL3 models with exllamav3" if method == "exl3" else _ADVICE
        raise _unsupported(path, _OTHER_METHODS[method], hint)
    if method == "gptq":
        bits = quantization.get("bits")
        if isinstance(bits, (int, float)):
            _refuse_gptq_bits(path, bits)
        layout = str(quantization.get("checkpoint_format") or "gptq").lower()
        if layout not in ("gptq", "gptq_v2"):
            raise _unsupported(path, f"GPTQ repacked as {layout}")


def _refuse_gptq_bits(path: Path, bits: float) -> None:
    if bits != 4:
        raise UnsupportedModelError(f"{path} is GPTQ at {bits:g} bits; exllamav2 computes GPTQ at 4 bits only", _ADVICE)


def _refuse_other_kinds(path: Path) -> None:
    if not path.is_dir():
        raise DamagedModelError(f"{path} is not a folder", "give the folder that holds config.json")
    if any(path.glob("*.gguf")):
        raise _unsupported(path, "GGUF", "run GGUF models with llama.cpp or ollama, or " + _ADVICE)
    if (path / "adapter_config.json").exists():
        raise _unsupported(path, "LoRA adapter", "merge the adapter into its base model first")
    if any(file for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern)):
        raise UnsupportedModelError(
            f"{path} holds pickled weights only; a pickle can run code when it is opened, so exl never loads one",
            "look for a safetensors version, or convert it with transformers' save_pretrained",
        )


def _refuse_no_model(path: Path) -> None:
    """Tell a folder that never was a model from one that has lost its config.json."""
    if any(path.glob("*.safetensors")) or (path / "tokenizer.json").exists():
        return
    inside = sorted(file.parent.name for file in path.glob("*/config.json"))
    if not inside:
        raise ModelNotFoundError(f"{path} holds no model", "give the folder that holds config.json and the weights")
    more = f" or {len(inside) - 3} more" if len(inside) > 3 else ""
    raise ModelNotFoundError(
        f"{path} holds no model itself, but folders with models",
        f"give one of them: {', '.join(str(path / name) for name in inside[:3])}{more}",
    )


def _detect_format(path: Path, tensors: dict[str, TensorHeader]) -> Format:
    if any(name.endswith(".q_weight") for name in tensors):
        return "exl2"
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            scales = tensors.get(name[: -len("qweight")] + "scales")
            if scales is not None and scales.shape[-1] == tensor.shape[-1]:
                return "gptq"
            raise _unsupported(path, "AWQ")
        if name.endswith(".trellis"):
            raise _unsupported(path, "EXL3", "run EXL3 models with exllamav3")
        if tensor.dtype.startswith("F8"):
            raise _unsupported(path, "FP8")
        if ".quant_state" in name or name.endswith(".absmax"):
            raise _unsupported(path, "bitsandbytes")
    return "float"


def _gptq_parameters(path: Path, quantization: dict[str, Any], tensors: dict[str, TensorHeader]) -> dict[str, Any]:
    first = next(name for name in tensors if name.endswith(".qweight"))
    qweight, qzeros = tensors[first], tensors.get(first[: -len("qweight")] + "qzeros")
    if qzeros is None or not qzeros.shape or not qweight.shape[-1]:
        raise DamagedModelError(f"{path}: {first} has no qzeros beside it", "download the model again")
    bits = 32 * qzeros.shape[-1] / qweight.shape[-1]
    _refuse_gptq_bits(path, bits)
    group = quantization.get("group_size")
    return {
        "group_size": group if isinstance(group, int) else -(-qweight.shape[0] * 8 // qzeros.shape[0]),
        "desc_act": bool(quantization.get("desc_act", False)),
        "symmetric": bool(quantization.get("sym", False)),
        "zero_offset": 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1,
    }


_QUANTIZED_PART = re.compile(r"\.(q_weight|q_scale|q_scale_max|q_groups|q_invperm|q_perm|qweight|qzeros|scales|g_idx)$")


def _count(config: dict[str, Any], tensors: dict[str, TensorHeader]) -> tuple[int, float]:
    """Parameters, and stored bits per weight of the linear layers (those with two dimensions inside the layers)."""
    tied = bool(value_of(config, "tie_word_embeddings"))
    parameters = linear_weights = linear_bits = 0
    for name, tensor in tensors.items():
        part = _QUANTIZED_PART.search(name)
        weights = 0
        if part is None:
            weights = tensor.numel
        elif part[1] == "q_weight":
            rows = tensors.get(name[: part.start()] + ".q_invperm")
            weights = (rows.numel if rows else 0) * tensor.shape[-1]
        elif part[1] == "qweight":
            weights = tensor.numel * 8
        if part is not None or (len(tensor.shape) == 2 and in_layer(name)):
            linear_weights += weights
            linear_bits += 8 * tensor.nbytes
        if not (tied and "lm_head" in name):
            parameters += weights
    return parameters, linear_bits / linear_weights if linear_weights else 0.0


def _has_chat_template(path: Path) -> bool:
    if any(
        (path / name).exists() for name in ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    ):
        return True
    return bool(read_json(path / "tokenizer_config.json").get("chat_template"))
