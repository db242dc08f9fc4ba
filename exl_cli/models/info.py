"""Describe a model from its JSON files and safetensors headers, without loading weights."""

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
    extended_length_of,
    in_layer,
    quantization_of,
    read_json,
    value_of,
    with_quantization,
)
from exl_cli.models.formats.headers import TensorHeader, read_header
from exl_cli.models.formats.quantized_layers import gptq_settings, quantized_layers
from exl_cli.system.files import is_there

Format = Literal["exl2", "gptq", "float"]


@dataclass(frozen=True)
class ModelInfo:
    """A model folder that exl can run.

    Attributes:
        name: the name the user gave.
        path: its folder.
        format: how its weights are stored.
        architecture: class name in transformers, such as "LlamaForCausalLM".
        parameters: number of weights; a head tied to the embeddings counts once.
        bits_per_weight: stored bits per weight of the linear layers, including scales and zero points.
        context_length: context length stated in config.json, in tokens.
        extended_length: context length after RoPE scaling, in tokens; at least `context_length`.
        size_bytes: size of the weight files.
        tensors: tensor headers by name.
        has_chat_template: whether the folder has a chat template.
        group_size, desc_act, symmetric, zero_offset: GPTQ parameters; see `GptqSettings`.
        head_bits: bits per weight of an EXL2 model's head.
        notes: one line for each point on which the tensors contradict config.json.
        config, generation_config: the parsed files; {} if missing.
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
    extended_length: int = 0
    has_chat_template: bool = False
    group_size: int | None = None
    desc_act: bool = False
    symmetric: bool = False
    zero_offset: int = 1
    head_bits: int | None = None
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    generation_config: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extended_length", max(self.extended_length, self.context_length))

    @property
    def format_name(self) -> str:
        """Format and bits in the usual notation: "EXL2 5.0 bpw", "GPTQ 4-bit g128", "float16"."""
        if self.format == "exl2":
            bits = quantization_of(self.config).get("bits")
            return f"EXL2 {float(bits) if isinstance(bits, (int, float)) else self.bits_per_weight:.1f} bpw"
        if self.format == "gptq":
            group = f" g{self.group_size}" if self.group_size and self.group_size > 0 else ""
            return f"GPTQ 4-bit{group}{' act-order' if self.desc_act else ''}"
        return f"float{self.bits_per_weight:.0f}"

    def text_config(self, key: str, default: Any = None) -> Any:
        """See `config.value_of`."""
        return value_of(self.config, key, default)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.path),
            "format": self.format,
            "format_name": self.format_name,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "context_length": self.context_length,
            "extended_length": self.extended_length,
            "size_bytes": self.size_bytes,
            "chat_template": self.has_chat_template,
        }


def inspect(path: Path, name: str | None = None) -> ModelInfo:
    """Inspect the model in a folder.

    Raises:
        DamagedModelError: files are missing, truncated, unreadable, or contradict each other.
        ModelNotFoundError: the folder does not hold a model.
        UnsupportedModelError: exl does not run this weight format; the message names it.
    """
    if not (path / "config.json").exists():
        _refuse_other_kinds(path)
        _refuse_no_model(path)
    config = read_json(path / "config.json", required=True)
    config = with_quantization(config, lambda: read_json(path / "quantize_config.json"))
    quantization = quantization_of(config)
    refuse_method(path, {**quantization, "bits": 4})  # not the declared bits: GPTQ tensors show their real width
    check_values(path, config)
    files = weight_files(path)
    tensors = _read_headers(files)
    format_ = _detect_format(path, tensors)
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else ""
    if not isinstance(architecture, str) or not architecture:
        raise DamagedModelError(
            f"{path / 'config.json'} does not name an architecture",
            'add the name of its transformers class, e.g. "architectures": ["LlamaForCausalLM"]',
        )
    check_layers(path, config, tensors)
    extra: dict[str, Any] = {}
    if format_ == "gptq":
        layers = quantized_layers(tensors, format_)
        extra = gptq_settings(path / "config.json", quantization, layers)._asdict()
    else:
        refuse_method(path, quantization)
    if format_ == "exl2":
        quantized_layers(tensors, format_)
        extra = {"head_bits": quantization.get("head_bits")}
    parameters, bits = _count(config, tensors)
    return ModelInfo(
        name=name or str(path),
        path=path,
        format=format_,
        architecture=architecture,
        parameters=parameters,
        bits_per_weight=bits,
        context_length=context_length_of(config),
        extended_length=extended_length_of(config),
        size_bytes=sum(file.stat().st_size for file in files),
        tensors=tensors,
        has_chat_template=_has_chat_template(path),
        config=config,
        generation_config=read_json(path / "generation_config.json"),
        **extra,
    )


def _read_headers(files: list[Path]) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        for tensor in read_header(file):
            if tensors.setdefault(tensor.name, tensor) is not tensor:
                raise DamagedModelError(
                    f"{file.parent} has the tensor {brief(tensor.name)} twice, in {tensors[tensor.name].file.name} "
                    f"and in {file.name}",
                    "remove the file that does not belong to the model",
                )
    return tensors


def weight_files(path: Path) -> list[Path]:
    """The model's safetensors files, sorted by name.

    Raises:
        DamagedModelError: a shard is missing.
        UnsupportedModelError: the weights are in another format.
    """
    index = read_json(path / "model.safetensors.index.json").get("weight_map")
    if isinstance(index, dict):
        if not all(isinstance(file, str) for file in index.values()):
            raise DamagedModelError(
                f"{path}/model.safetensors.index.json has a file name that is not a string", "download it again"
            )
        files = [path / file for file in sorted(set(index.values()))]
        if any(file.parent != path for file in files):
            raise DamagedModelError(
                f"{path}/model.safetensors.index.json points outside the folder", "do not use this model"
            )
    else:
        files = sorted(path.glob("*.safetensors"))
        # Mistral's repositories contain the weights twice; the consolidated file uses Mistral's own tensor names.
        files = [f for f in files if not f.name.startswith("consolidated")] or files
    if not files:
        _refuse_other_kinds(path)
        raise DamagedModelError(f"no .safetensors file in {path}", "download the model again")
    wanted = {file.name for file in files}
    for file in files:
        if match := re.fullmatch(r"(.+)-([0-9]{1,5})-of-([0-9]{1,5})\.safetensors", file.name):
            stem, width, total = match[1], len(match[2]), int(match[3])
            wanted |= {f"{stem}-{i:0{width}d}-of-{match[3]}.safetensors" for i in range(1, total + 1)}
    missing = sorted(name for name in wanted if not is_there(path / name))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DamagedModelError(f"{path / brief(missing[0])}{more} missing", "run exl download again to resume")
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
    return UnsupportedModelError(f"{path} has {what} weights, which exl does not support", hint)


def refuse_method(path: Path, quantization: dict[str, Any]) -> None:
    """Raise UnsupportedModelError if `quantization_config` names a method or layout that exl does not run."""
    method = str(quantization.get("quant_method", "")).lower()
    if method in _OTHER_METHODS:
        hint = "run EXL3 models with exllamav3" if method == "exl3" else _ADVICE
        raise _unsupported(path, _OTHER_METHODS[method], hint)
    if method == "gptq":
        bits = quantization.get("bits")
        if isinstance(bits, (int, float)) and bits != 4:
            raise UnsupportedModelError(f"{path} is {bits:g}-bit GPTQ; exllamav2 only supports 4-bit GPTQ", _ADVICE)
        layout = str(quantization.get("checkpoint_format") or "gptq").lower()
        if layout not in ("gptq", "gptq_v2"):
            raise _unsupported(path, f"GPTQ repacked as {layout}")


def _refuse_other_kinds(path: Path) -> None:
    if not path.is_dir():
        raise DamagedModelError(f"{path} is not a folder", "give the folder with config.json")
    if any(path.glob("*.gguf")):
        raise _unsupported(path, "GGUF", "run GGUF models with llama.cpp or ollama, or " + _ADVICE)
    if (path / "adapter_config.json").exists():
        raise _unsupported(path, "LoRA adapter", "merge the adapter into its base model first")
    if any(file for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern)):
        raise UnsupportedModelError(
            f"{path} has only pickled weights, which exl never loads because they can run code when opened",
            "look for a safetensors version, or convert it with transformers' save_pretrained",
        )


def _refuse_no_model(path: Path) -> None:
    """Raise ModelNotFoundError unless the folder looks like a model that lost its config.json."""
    if any(path.glob("*.safetensors")) or (path / "tokenizer.json").exists():
        return
    inside = sorted(file.parent.name for file in path.glob("*/config.json"))
    if not inside:
        raise ModelNotFoundError(f"{path} is not a model folder", "give the folder with config.json and the weights")
    more = f" or {len(inside) - 3} more" if len(inside) > 3 else ""
    raise ModelNotFoundError(
        f"{path} is not a model folder, but contains model folders",
        f"give one of them: {', '.join(str(path / name) for name in inside[:3])}{more}",
    )


def _detect_format(path: Path, tensors: dict[str, TensorHeader]) -> Format:
    if any(name.endswith(".q_weight") for name in tensors):
        return "exl2"
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            # GPTQ packs codes along the inputs, so qweight is as wide as scales; AWQ packs along the outputs.
            scales = tensors.get(name[: -len("qweight")] + "scales")
            if scales is not None and scales.shape[-1:] != tensor.shape[-1:]:
                raise _unsupported(path, "AWQ")
            return "gptq"
        if name.endswith(".trellis"):
            raise _unsupported(path, "EXL3", "run EXL3 models with exllamav3")
        if tensor.dtype.startswith("F8"):
            raise _unsupported(path, "FP8")
        if name.endswith(".weight") and tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise _unsupported(path, tensor.dtype)
        if ".quant_state" in name or name.endswith(".absmax"):
            raise _unsupported(path, "bitsandbytes")
    return "float"


_QUANTIZED_PART = re.compile(r"\.(q_weight|q_scale|q_scale_max|q_groups|q_invperm|q_perm|qweight|qzeros|scales|g_idx)$")


def _count(config: dict[str, Any], tensors: dict[str, TensorHeader]) -> tuple[int, float]:
    """Number of parameters, and stored bits per weight of the linear layers (2-D weights inside transformer layers)."""
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
            weights = tensor.numel * 8  # eight 4-bit codes per int32
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
