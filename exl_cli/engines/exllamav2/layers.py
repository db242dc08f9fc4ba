"""Which models the fused forward pass supports, and their matrices grouped by kernel launch.

EXL_KERNELS=exllamav2 in the environment disables it, for comparison.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from exl_cli.engines.exllamav2.kernels import compiler, experts, quantized_linear
from exl_cli.engines.exllamav2.kernels.quantized_linear import Product, QuantizedMatrix, from_exllamav2
from exl_cli.errors import EngineError

VARIABLE = "EXL_KERNELS"


def why_not(model: Any) -> str:
    """Why the fused forward pass does not support a model; empty if it does.

    Raises:
        EngineError: EXL_KERNELS has an unknown value.
    """
    from exllamav2.attn import ExLlamaV2Attention
    from exllamav2.linear import ExLlamaV2Linear
    from exllamav2.mlp import ExLlamaV2MLP
    from exllamav2.moe_mlp import ExLlamaV2MoEMLP
    from exllamav2.rmsnorm import ExLlamaV2RMSNorm

    modules = model.modules
    chosen = os.environ.get(VARIABLE, "exl")
    if chosen not in ("exl", "exllamav2"):
        raise EngineError(f"unknown value {VARIABLE}={chosen}", "choose exl or exllamav2")
    if chosen == "exllamav2":
        return f"{VARIABLE}={chosen}"
    for device in dict.fromkeys(module.device_idx for module in modules[1:]):
        if reason := compiler.why_not(torch.device("cuda", device)):
            return reason
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
            continue  # see `experts_why_not`
        else:
            reason = f"it has a layer of {type(module).__name__}"
        if reason or not isinstance(module.pre_layernorm, ExLlamaV2RMSNorm):
            return reason or "its norm is not RMS norm"
        if module.post_layernorm is not None or not module.has_residual:
            return "it has norms after its layers"
    return ""


def experts_why_not(model: Any) -> str:
    """Why exl's kernels do not support a model's mixtures of experts; empty if they do, or if it has none."""
    from exllamav2.moe_mlp import ExLlamaV2MoEMLP
    from exllamav2.rmsnorm import ExLlamaV2RMSNorm

    params, config = model.config.arch.lm, model.config
    for module in model.modules:
        if type(module) is not ExLlamaV2MoEMLP:
            continue
        count, chosen = config.num_experts, config.num_experts_per_token
        if count > experts.MOST_EXPERTS or not 0 < chosen <= min(count, experts.MOST_CHOSEN):
            return f"each token takes {chosen} of its {count} experts"
        if not isinstance(module.post_attention_layernorm, ExLlamaV2RMSNorm):
            return "its norm is not RMS norm"
        if module.gate.q_tensors or module.gate.linear.bias is not None:
            return "its router is not a matrix of floats"
        if params.mlp_act_func not in quantized_linear.ACTIVATIONS:
            return f"its activation is {params.mlp_act_func}"
        if reason := _linears_why_not([*module.w1, *module.w2, *module.w3]):
            return reason
    return ""


def _attention_why_not(attention: Any, params: Any) -> str:
    if params.rope_style.name != "NEOX":
        return "its RoPE rotates interleaved pairs, or it has none"
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
        return "its layers have unsupported sizes"
    return ""


class Group:
    """Matrices with the same input, multiplied in one kernel launch.

    Args:
        linears: exllamav2's quantized linear layers.
        paired: whether they are gate and up projection of an MLP.
        reorders: whether the input is in the model's order and has to be permuted.

    Attributes:
        product: the fused matmul.
        permutations: distinct permutations of the input; None for the identity.
        chosen: for each matrix, the index of its permutation.

    Raises:
        EngineError: the kernels do not support one of them.
    """

    def __init__(self, linears: Sequence[Any], *, paired: bool = False, reorders: bool = True) -> None:
        self.permutations: list[torch.Tensor | None] = []
        self.chosen: list[int] = []
        matrices = _matrices(linears)
        for matrix in matrices:
            same = (index for index, perm in enumerate(self.permutations) if matrix.perm is perm)
            index = next(same, len(self.permutations))
            if index == len(self.permutations):
                self.permutations.append(matrix.perm)
            self.chosen.append(index)
        self.product = Product(tuple(matrices), paired, reorders)
        self._linears = linears

    def original(self) -> Callable[[], None]:
        """A call of exllamav2's kernels on one row for each matrix, for timing."""
        from exllamav2.ext import exllamav2_ext

        def row(linear: Any, width: int) -> torch.Tensor:
            return torch.zeros((1, width), dtype=torch.half, device=linear.device())

        calls = [(it, row(it, it.in_features), row(it, it.out_features)) for it in self._linears]

        def work() -> None:
            for linear, x, out in calls:
                exllamav2_ext.gemm_half_q_half(x, linear.q_handle, out, False)

        return work


def _matrices(linears: Sequence[Any]) -> list[QuantizedMatrix]:
    matrices = []
    for linear, matrix in zip(linears, from_exllamav2([linear.q_tensors for linear in linears]), strict=True):
        if matrix is None:
            raise EngineError(f"{linear.key} has a group size that the kernels do not support")
        matrices.append(matrix)
    return matrices


class Layer:
    """The groups of a transformer layer.

    Args:
        attention, mlp: exllamav2's modules.
        own_experts: whether exl's kernels compute a mixture of experts.

    Attributes:
        mlp, mixture, experts: one of them is not None. `experts` is exllamav2's MoE module, which runs as it is.
    """

    def __init__(self, attention: Any, mlp: Any, *, own_experts: bool = False) -> None:
        from exllamav2.mlp import ExLlamaV2MLP

        self.attention = attention
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = Group([attention.o_proj])
        self.groups = [self.qkv, self.o]
        is_mixture = not isinstance(mlp, ExLlamaV2MLP)
        self.mlp = None if is_mixture else Mlp(mlp)
        self.mixture = Mixture(mlp) if is_mixture and own_experts else None
        self.experts = mlp if is_mixture and not own_experts else None
        if self.mlp is not None:
            self.groups += [self.mlp.gate_up, self.mlp.down]

    @property
    def products(self) -> list[Product]:
        """All of its products."""
        of_experts = [self.mixture.gate_up, self.mixture.down] if self.mixture else []
        return [*(group.product for group in self.groups), *of_experts]


class Mlp:
    """The groups of exllamav2's MLP module."""

    def __init__(self, mlp: Any) -> None:
        self.norm = mlp.pre_layernorm
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj], paired=True)
        # The activation kernel already writes its output in this matrix's order.
        self.down = Group([mlp.down_proj], reorders=False)


class Mixture:
    """The products of exllamav2's MoE module.

    Attributes:
        norm: its norm.
        router: float16, shape (experts, hidden).
        gate_up, down: of all experts.
        normalized: whether a token's weights are to sum to 1.

    Raises:
        EngineError: the kernels do not support one of the matrices.
    """

    def __init__(self, module: Any) -> None:
        self.norm, self.router = module.post_attention_layernorm, module.gate.linear.weight.detach()
        self.normalized: bool = module.model.config.exl_architecture.experts.normalized
        pairs = [linear for pair in zip(module.w1, module.w3, strict=True) for linear in pair]
        matrices = _matrices([*pairs, *module.w2])
        both, downs = matrices[: len(pairs)], matrices[len(pairs) :]
        count, chosen = module.num_experts, module.num_experts_per_token
        for alike in (both, downs):
            if len({(matrix.exl2, matrix.k, matrix.n) for matrix in alike}) > 1:
                raise EngineError("its experts differ in format or size")
        self.gate_up = Product(tuple(both), paired=True, experts=count, chosen=chosen)
        self.down = Product(tuple(downs), experts=count, chosen=chosen)
