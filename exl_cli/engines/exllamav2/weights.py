"""Present a model's tensors to exllamav2 under Llama's names, with fused matrices split.

exllamav2's own loader splits fused tensors (Phi 3's `qkv_proj`, GPT 2's `c_attn`) only if they are unquantized. Here
GPTQ matrices are split too, before exllamav2 sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from exl_cli.errors import DamagedModelError, UnsupportedModelError, param
from exl_cli.models.architecture import Architecture, llama_name
from exl_cli.models.formats.headers import TensorHeader
from exl_cli.models.info import ModelInfo

_DTYPES = {"I32": torch.int, "I16": torch.short, "F16": torch.half, "BF16": torch.bfloat16, "F32": torch.float}
# GPTQ packs the zero points of eight columns into a word.
_PACKED_COLUMNS = 8


@dataclass(frozen=True)
class _Source:
    """The stored tensor behind a name, the ranges of its outputs to take (all if empty), and whether to transpose."""

    header: TensorHeader
    outputs: tuple[range, ...] = ()
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        return not self.outputs and not self.transposed


class Weights:
    """Stands in for exllamav2's safetensors reader (`STFile`), as one file with all tensors of the model.

    Args:
        info: the model.
        architecture: its architecture.

    Raises:
        DamagedModelError: a layer's matrix is missing.
        UnsupportedModelError: a fused tensor cannot be split.
    """

    def __init__(self, info: ModelInfo, architecture: Architecture) -> None:
        self._info, self._architecture = info, architecture
        self._sources: dict[str, _Source] = {}
        self._last: tuple[TensorHeader, torch.Tensor] | None = None
        for header in info.tensors.values():
            if name := llama_name(header.name, architecture):
                self._add(name, header)
        self._tie_head()
        self._check()

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return list(self._sources)

    def measure(self, name: str) -> int:
        """Size of a tensor in bytes; part of `STFile`'s interface."""
        source = self._sources[name]
        if not source.outputs:
            return source.header.nbytes
        outputs = source.header.shape[0 if name.endswith(".weight") and not source.transposed else -1]
        return source.header.nbytes * sum(map(len, source.outputs)) // max(1, outputs)

    def get_tensor(self, name: str, device: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a tensor; part of `STFile`'s interface."""
        source = self._sources[name]
        if source.is_whole:
            tensor = self._adjusted(name, _read(source.header, device))
        else:
            tensor = self._read_again(source.header)
            if source.outputs:
                tensor = _outputs(tensor, name, source)
            if source.transposed:
                tensor = tensor.T
            tensor = tensor.contiguous().to(device)
        return tensor if out_dtype is None else tensor.to(out_dtype)

    def _adjusted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Apply scaling that exllamav2 misses.

        It scales quantized output matrices but not their biases, and it normalizes the rows of Index's head with an
        assignment that torch rejects.
        """
        architecture, (layer, _, part) = self._architecture, name.rpartition(".")
        if part == "bias" and f"{layer}.weight" not in self._sources:
            if layer.endswith(("self_attn.o_proj", "mlp.down_proj")) and architecture.residual_scale != 1:
                return tensor * architecture.residual_scale
            if layer == "lm_head" and architecture.logit_scale != 1:
                return tensor * architecture.logit_scale
        if name == "lm_head.weight" and architecture.normalized_head:
            return torch.nn.functional.normalize(tensor.float()).half()
        return tensor

    def _read_again(self, header: TensorHeader) -> torch.Tensor:
        """Read a fused tensor to the CPU, keeping the last one: its parts are requested in succession."""
        if self._last is None or self._last[0] is not header:
            self._last = (header, _read(header, "cpu"))
        return self._last[1]

    def _add(self, name: str, header: TensorHeader) -> None:
        layer, _, part = name.rpartition(".")
        for fused in self._architecture.fused:
            if layer.endswith(fused.name):
                for target, outputs in fused.parts:
                    self._cut(layer.removesuffix(fused.name) + target, part, header, outputs)
                return
        matrix = part == "weight" and len(header.shape) == 2 and ".layers." in layer
        self._sources[name] = _Source(header, transposed=self._architecture.transposed and matrix)

    def _cut(self, layer: str, part: str, header: TensorHeader, outputs: tuple[range, ...]) -> None:
        transposed = self._architecture.transposed and part == "weight"
        if part == "g_idx":  # per input, so shared by all parts
            outputs = ()
        elif part == "qzeros":
            if any(span.start % _PACKED_COLUMNS or span.stop % _PACKED_COLUMNS for span in outputs):
                raise UnsupportedModelError(
                    f"{header.name} cannot be split at multiples of 8 columns", f"use {param('engine')} cpu"
                )
            outputs = tuple(range(span.start // _PACKED_COLUMNS, span.stop // _PACKED_COLUMNS) for span in outputs)
        elif part not in ("weight", "bias", "qweight", "scales"):
            raise UnsupportedModelError(f"{header.name} cannot be split", "look for another quantization of the model")
        self._sources[f"{layer}.{part}"] = _Source(header, outputs, transposed)

    def _tie_head(self) -> None:
        embeddings = self._sources.get("model.embed_tokens.weight")
        quantized = any(f"lm_head.{part}" in self._sources for part in ("q_weight", "qweight"))
        if self._architecture.tied and embeddings and not quantized:
            self._sources["lm_head.weight"] = embeddings

    def _check(self) -> None:
        architecture, path = self._architecture, self._info.path
        matrices = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        mlp = ["up_proj", "down_proj", *(["gate_proj"] if architecture.gated else [])]
        norms = [name for name in architecture.norms if name]
        if architecture.head_norm:
            norms += ["self_attn.q_norm", "self_attn.k_norm"]
        needed = ["model.embed_tokens", "lm_head", "model.norm"]
        if architecture.learned_positions:
            needed.append("model.wpe")
        for layer in range(architecture.layers):
            experts = architecture.experts
            prefixes = ["mlp."]
            if experts and layer not in experts.dense:
                prefixes = [f"mlp.experts.{index}." for index in range(experts.count)]
                needed.append(f"model.layers.{layer}.mlp.gate")
            inner = [prefix + name for prefix in prefixes for name in mlp]
            needed += [f"model.layers.{layer}.{name}" for name in (*matrices, *inner, *norms)]
        for name in needed:
            if not any(f"{name}.{part}" in self._sources for part in ("weight", "q_weight", "qweight")):
                hint = "take the weights and config.json from the same repository"
                if name == "lm_head":
                    hint = (
                        'if its output layer is tied to the embeddings, set "tie_word_embeddings": true in config.json'
                    )
                raise DamagedModelError(f"{path} has no weights for {name}", hint)


def _read(header: TensorHeader, device: Any) -> torch.Tensor:
    from exllamav2.ext import exllamav2_ext

    tensor = torch.empty(header.shape, dtype=_DTYPES[header.dtype], device=device)
    # The reader copies on its own streams, so pending work on this memory must finish first.
    torch.cuda.synchronize(tensor.device if tensor.is_cuda else None)
    exllamav2_ext.stloader_read(str(header.file), header.offset, header.nbytes, tensor)
    return tensor


def _outputs(tensor: torch.Tensor, name: str, source: _Source) -> torch.Tensor:
    """Select a part's outputs of a fused tensor: rows of a float matrix, columns of other tensors."""
    rows = name.endswith(".weight") and not source.transposed
    parts = [tensor[span.start : span.stop] if rows else tensor[..., span.start : span.stop] for span in source.outputs]
    return torch.cat(parts, dim=0 if rows else -1)
