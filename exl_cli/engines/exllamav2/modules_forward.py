"""Forward passes through exllamav2's own modules, over pages: of every model that it can load, on as many GPUs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from exl_cli.engines.exllamav2.attention.paged import at_most

# exllamav2 0.3.2, q_gemm_autotune.cuh: so many calls of each shape are timed, by events that no graph can hold.
_TIMED_CALLS = 200


@cache
def _params_class() -> type[Any]:
    """Made on first use: exllamav2 cannot be imported on every machine that imports this module."""
    from exllamav2.attn_params import PagedParams, Params

    class StaticParams(PagedParams):  # type: ignore[misc]  # untyped, and known only here
        """`PagedParams` of tensors that are on a device already.

        Stands for a defect of exllamav2 0.3.2: its class wants them on the CPU, and copies them for every pass, which a
        graph cannot.
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
        self._timed: set[tuple[int, int, int]] = set()

    def prefill(
        self,
        states: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
        most_keys: int,
        rope_offsets: torch.Tensor | None = None,
    ) -> None:
        """Put the keys and values of one sequence's next tokens into the cache.

        Args:
            states: embeddings on the first device, shape (1, tokens, hidden); overwritten.
            lengths: int32 on the device, shape (1,): positions before them.
            block_table: int32 on the device, shape (1, pages).
            most_keys: positions with them.
            rope_offsets: as of `Inputs`.
        """
        self._through(self._model.last_kv_layer_idx + 1, states, lengths, block_table, most_keys, rope_offsets)

    def run(
        self,
        hidden: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
        tokens: int,
        most_keys: int,
        rope_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All layers and the head.

        Args:
            hidden: embeddings on the first device, shape (batch * tokens, hidden); overwritten.
            lengths, block_table: as of `Inputs`, of `batch` rows.
            tokens: of each row.
            most_keys: no row has more, the new ones included.
            rope_offsets: as of `Inputs`, of `batch` rows; None where the model has no `rope_switches`.

        Returns:
            Logits, shape (batch * tokens, padded vocabulary), on the last device.
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
        """What comes out of the modules behind the embeddings, up to an index."""
        params = _params_class()(lengths, block_table, most_keys, self._page_size, rope_offsets)
        with at_most(most_keys):
            for module in self._model.modules[1:end]:
                index = module.device_idx
                if index is not None and index >= 0 and index != states.device.index:
                    states = states.to(torch.device("cuda", index))
                states = module.forward(states, cache=self._cache, attn_params=params, past_len=0, loras=None)
        return states

    def prepare(self, rows: int) -> None:
        """Make passes of so many tokens fit for capture: have exllamav2 choose its kernels for EXL2 now.

        Stands for a defect of exllamav2 0.3.2: the choice is made by the clock, and ends any capture.
        """
        from exllamav2.ext import exllamav2_ext
        from exllamav2.linear import ExLlamaV2Linear

        for linear in _all(self._model.modules):
            if not isinstance(linear, ExLlamaV2Linear) or "q_weight" not in (linear.q_tensors or {}):
                continue
            shape = (rows, linear.in_features, linear.out_features)
            if shape in self._timed:
                continue
            x = torch.zeros(shape[:2], dtype=torch.half, device=linear.device())
            out = torch.empty((rows, shape[2]), dtype=torch.half, device=linear.device())
            for _ in range(_TIMED_CALLS + 1):
                exllamav2_ext.gemm_half_q_half(x, linear.q_handle, out, False)
            self._timed.add(shape)

    def compile_ahead(self) -> None:
        """Nothing to do: see `FusedForward.compile_ahead`."""

    def close(self) -> None:
        """Nothing to do: see `FusedForward.close`."""


def _all(modules: Any) -> Any:
    """Modules with those inside of them."""
    for module in modules:
        yield module
        yield from _all(getattr(module, "submodules", None) or ())
