"""Forward passes through exllamav2's modules with our paged KV cache: all models that it can load, on several GPUs."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from exl_cli.engines.exllamav2.attention.paged import at_most
from exl_cli.engines.exllamav2.build_model import experts_captured, rope_switches
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.engines.exllamav2.inputs import InputBuffers

# exllamav2 0.3.2 (q_gemm_autotune.cuh) times this many calls of each shape with events, which a graph cannot capture.
_TIMED_CALLS = 200


@cache
def _params_class() -> type[Any]:
    """Defined on first use: this module is also imported on machines without exllamav2."""
    from exllamav2.attn_params import PagedParams, Params

    class StaticParams(PagedParams):  # type: ignore[misc]  # untyped, and known only here
        """`PagedParams` for tensors already on the device.

        exllamav2 0.3.2's class takes CPU tensors and copies them for each pass, which breaks graph capture.
        """

        def __init__(
            self,
            lengths: torch.Tensor,
            block_table: torch.Tensor,
            most_keys: int,
            page_size: int,
            rope_offsets: torch.Tensor | None,
        ) -> None:
            Params.__init__(self, batch_size=len(lengths), paged=True)
            self.block_index, self.cache_seqlens = block_table, lengths
            self.max_cache_seqlen, self.page_size = most_keys, page_size
            self.alt_rope_embed: dict[str, Any] = {}
            self.rope_offsets = rope_offsets
            self.is_sequential = False

        def get_block_index(self, device: int) -> torch.Tensor:
            return self._on(self.block_index, device)

        def get_cache_seqlens(self, device: int) -> torch.Tensor:
            return self._on(self.cache_seqlens, device)

        def get_rope_offsets(self, device: int) -> torch.Tensor | None:
            return None if self.rope_offsets is None else self._on(self.rope_offsets, device)

        @staticmethod
        def _on(tensor: torch.Tensor, device: int) -> torch.Tensor:
            return tensor if tensor.device.index == device else tensor.to(torch.device("cuda", device))

    return StaticParams


class ModulesForward:
    """Runs forward passes of exllamav2's model, with its cache in pages of `page_size` positions."""

    name = "exllamav2's modules"
    attends = False

    def __init__(self, model: Any, cache: Any, page_size: int) -> None:
        self._model = model
        self._cache = cache
        self._page_size = page_size
        self._timed: set[tuple[int, int, int, str]] = set()
        self.most_captured = experts_captured(model)

    def prefill(self, row: ScheduledTokens, inputs: InputBuffers) -> None:
        """Compute the keys and values of any number of tokens of one sequence, in chunks.

        Args:
            row: the tokens.
            inputs: has the embeddings.
        """
        device, offsets = inputs.device, None
        block_table = torch.tensor([row.block_table[:]], dtype=torch.int32, device=device)
        if rope_switches(self._model):
            offsets = torch.tensor([inputs.rope_offsets[row.rope_table]], dtype=torch.int32, device=device)
        tokens, most = np.array(row.ids, dtype=np.int64), self._model.config.max_input_len
        for first in range(0, len(tokens), most):
            states, start = inputs.embeddings.of(tokens[first : first + most]), row.start + first
            lengths = torch.tensor([start], dtype=torch.int32, device=device)
            end, most_keys = self._model.last_kv_layer_idx + 1, start + states.shape[1]
            self._through(end, states, lengths, block_table, most_keys, offsets)

    def run(
        self,
        hidden: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
        tokens: int,
        most_keys: int,
        rope_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run all layers and the head.

        Args:
            hidden: embeddings on the first device, [batch * tokens, hidden]; overwritten.
            lengths, block_table: `batch` rows of `Inputs`.
            tokens: tokens per row.
            most_keys: upper bound on a row's positions, including the new ones.
            rope_offsets: `batch` rows of `Inputs`; None without `rope_switches`.

        Returns:
            Logits [batch * tokens, padded vocabulary], on the last device.
        """
        states = self._through(
            None, hidden.view(len(lengths), tokens, -1), lengths, block_table, most_keys, rope_offsets
        )
        return states.view(len(lengths) * tokens, -1)

    def _through(
        self,
        end: int | None,
        states: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
        most_keys: int,
        rope_offsets: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the modules after the embeddings, up to index `end`."""
        params = _params_class()(lengths, block_table, most_keys, self._page_size, rope_offsets)
        with at_most(most_keys):
            for module in self._model.modules[1:end]:
                index = module.device_idx
                if index is not None and index >= 0 and index != states.device.index:
                    states = states.to(torch.device("cuda", index))
                states = module.forward(states, cache=self._cache, attn_params=params, past_len=0, loras=None)
        return states

    def prepare(self, rows: int) -> None:
        """Let exllamav2 autotune its EXL2 kernels for `rows` tokens, before a graph is captured.

        Its autotuner times kernels during the first calls, which would break the capture.
        """
        from exllamav2.ext import exllamav2_ext
        from exllamav2.linear import ExLlamaV2Linear

        for linear in _all(self._model.modules):
            if not isinstance(linear, ExLlamaV2Linear) or "q_weight" not in (linear.q_tensors or {}):
                continue
            shape = (rows, linear.in_features, linear.out_features, linear.device())
            if shape in self._timed:
                continue
            x = torch.zeros(shape[:2], dtype=torch.half, device=linear.device())
            out = torch.empty((rows, shape[2]), dtype=torch.half, device=linear.device())
            for _ in range(_TIMED_CALLS + 1):
                exllamav2_ext.gemm_half_q_half(x, linear.q_handle, out, False)
            self._timed.add(shape)

    def prefills(self, tokens: int) -> bool:
        """See `FusedForward.prefills`; `prefill` takes single sequences only."""
        return False

    def prefill_blocks(self, lengths: torch.Tensor, tokens: int, most_keys: int) -> None:
        """See `FusedForward.prefill_blocks`; not to be called."""
        raise NotImplementedError

    def compile_ahead(self) -> None:
        """See `FusedForward.compile_ahead`; nothing to do."""

    def close(self) -> None:
        """See `FusedForward.close`; nothing to do."""


def _all(modules: Any) -> Any:
    for module in modules:
        yield module
        yield from _all(getattr(module, "submodules", None) or ())
