"""Which models the fused pass takes, and their matrices in the groups that one product takes together.

The environment variable EXL_KERNELS=exllamav2 leaves all models to exllamav2's own kernels, for comparison.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from exl_cli.engines.exllamav2.kernels import compiler, quantized_linear
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product, QuantizedMatrix, from_exllamav2
from exl_cli.errors import EngineError

VARIABLE = "EXL_KERNELS"


def why_not(model: Any) -> str:
    """Why a model cannot take this pass, in a few words; empty where it can.

    Raises:
        EngineError: EXL_KERNELS says something unknown.
    """
    from exllamav2.attn import ExLlamaV2Attention
    from exllamav2.linear import ExLlamaV2Linear
    from exllamav2.mlp import ExLlamaV2MLP
    from exllamav2.moe_mlp import ExLlamaV2MoEMLP
    from exllamav2.rmsnorm import ExLlamaV2RMSNorm

    modules = model.modules
    chosen = os.environ.get(VARIABLE, "exl")
    if chosen not in ("exl", "exllamav2"):
        raise EngineError(f"{VARIABLE}={chosen} is not known", "choose exl or exllamav2")
    if chosen == "exllamav2":
        return f"{VARIABLE}={chosen}"
    if reason := compiler.why_not(torch.device("cuda", modules[1].device_idx)):
        return reason
    if len({module.device_idx for module in modules[1:]}) > 1:
        return "the model is spread over several GPUs"
    params = model.config.arch.lm
    if params.residual_stream_fp32:
        return "its hidden states are float32"
    if params.clamp_hidden_states:
        return "its hidden states are clamped"
    if not (isinstance(modules[-1], ExLlamaV2Linear) and isinstance(modules[-2], ExLlamaV2RMSNorm)):
        return "its head is not a norm and a matrix"
    for module in modules[1:-2]:
        if type(module) is ExLlamaV2Attention:
            reason = _attention_why_not(module, params)
        elif type(module) is ExLlamaV2MLP:
            reason = _mlp_why_not(module, params)
        elif type(module) is ExLlamaV2MoEMLP:
            continue  # computed by exllamav2, between our own attention
        else:
            reason = f"it has a layer of {type(module).__name__}"
        if reason or not isinstance(module.pre_layernorm, ExLlamaV2RMSNorm):
            return reason or "its norm is not RMS norm"
        if module.post_layernorm is not None or not module.has_residual:
            return "it has norms behind its layers"
    return ""


def _attention_why_not(attention: Any, params: Any) -> str:
    if params.rope_style.name != "NEOX":
        return "its rotary embedding is of another kind"
    if attention.q_norm is not None and (params.headnorm != "rmsnorm" or attention.q_norm.bias is not None):
        return "its head norm is not RMS norm"
    return _linears_why_not([attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj])


def _mlp_why_not(mlp: Any, params: Any) -> str:
    if mlp.gate_proj is None or params.mlp_act_func not in quantized_linear.ACTIVATIONS:
        return "its MLP has no gate"
    return _linears_why_not([mlp.gate_proj, mlp.up_proj, mlp.down_proj])


def _linears_why_not(linears: Sequence[Any]) -> str:
    if any(not linear.q_tensors for linear in linears):
        return "its layers are not quantized"
    if any(linear.in_features % 32 or linear.out_features % 32 for linear in linears):
        return "its layers have odd sizes"
    return ""


class Group:
    """Matrices that one product takes together.

    Args:
        linears: exllamav2's linear layers, quantized.
        paired: they are a gate and what it gates.
        reorders: whether their input comes in the model's order.

    Attributes:
        product: of the matrices.
        permutations: in which they want their input: places in it, or None for as it is.
        chosen: for each matrix, which of the permutations.

    Raises:
        EngineError: the kernels cannot take one of them.
    """

    def __init__(self, linears: Sequence[Any], *, paired: bool = False, reorders: bool = True) -> None:
        self.permutations: list[torch.Tensor | None] = []
        self.chosen: list[int] = []
        matrices = []
        for linear in linears:
            matrix = _matrix(linear)
            same = (index for index, perm in enumerate(self.permutations) if _equal(matrix.perm, perm))
            index = next(same, len(self.permutations))
            if index == len(self.permutations):
                self.permutations.append(matrix.perm)
            self.chosen.append(index)
            matrices.append(replace(matrix, perm=self.permutations[index]))
        self.product = Product(tuple(matrices), paired, reorders)
        self._linears = linears

    def original(self) -> Callable[[], None]:
        """A call of exllamav2's kernels that multiplies a row with each of the matrices; what comes out is lost."""
        from exllamav2.ext import exllamav2_ext

        def row(linear: Any, width: int) -> torch.Tensor:
            return torch.zeros((1, width), dtype=torch.half, device=linear.device())

        calls = [(it, row(it, it.in_features), row(it, it.out_features)) for it in self._linears]

        def work() -> None:
            for linear, x, out in calls:
                exllamav2_ext.gemm_half_q_half(x, linear.q_handle, out, False)

        return work


def _matrix(linear: Any) -> QuantizedMatrix:
    matrix = from_exllamav2(linear.q_tensors)
    if matrix is None:
        raise EngineError(f"{linear.key} has groups of a size that the kernels do not know")
    return matrix


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


class Layer:
    """The groups of a layer: exllamav2's attention and MLP modules.

    Attributes:
        mlp: None where the layer is a mixture of experts.
        experts: exllamav2's module of the mixture, which computes it; None where there is none.
    """

    def __init__(self, attention: Any, mlp: Any) -> None:
        from exllamav2.mlp import ExLlamaV2MLP

        self.attention = attention
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Group([attention.o_proj])
        self.groups = [self.qkv, self.o]
        is_mixture = not isinstance(mlp, ExLlamaV2MLP)
        self.mlp = None if is_mixture else Mlp(mlp)
        self.experts = mlp if is_mixture else None
        if self.mlp is not None:
            self.groups += [self.mlp.gate_up, self.mlp.down]


class Mlp:
    """The groups of exllamav2's MLP module."""

    def __init__(self, mlp: Any) -> None:
        self.norm = mlp.pre_layernorm
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj], paired=True)
        # What it takes is written in its order.
        self.down = Group([mlp.down_proj], reorders=False)
