"""A pass of few tokens through kernels of our own, seven a layer besides attention, for models built like Llama.

It reads exllamav2's modules and weights where they are, and adds to the same stream of float16 hidden states. A layer
is: norm; query, key and value in one product; head norms, rotary embedding and the cache; attention; output product
added to the stream; norm; gate and up with the activation in one product; down product added to the stream. Sums are
float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from exl_cli.engines.exllamav2.kernels import products, small
from exl_cli.engines.exllamav2.kernels.compiler import Kernel, Launch
from exl_cli.engines.exllamav2.kernels.matrices import Products
from exl_cli.engines.exllamav2.kernels.tuning import Tuner
from exl_cli.engines.exllamav2.layers import Group, Layer
from exl_cli.engines.exllamav2.paged_attention import attend_paged

# A piece of a pass: runs on a stream, by its handle, with a bound of the keys of any row.
Work = Callable[[int, int], None]


def _norm_first(argument: Products, group: Group, module: Any) -> None:
    """Have a product of one row norm it, as this module does; nothing where there is none."""
    if module is not None:
        for target in argument.matrix[: len(group.matrices)]:
            target.norm, target.epsilon = module.weight.data_ptr(), module.variance_epsilon


class FusedPass:
    """Runs passes of up to `products.MOST_ROWS` tokens.

    Args:
        model, cache: exllamav2's; `layers.why_not` of the model is empty.
        page_size: positions in a page.
        hidden: the stream, float16, shape (most tokens, hidden), as `Inputs` has it.
        lengths, table: as `Inputs` has them, of all rows.

    Raises:
        EngineError: the kernels cannot be compiled here.
    """

    name = "kernels of exl's own"

    def __init__(
        self, model: Any, cache: Any, page_size: int, hidden: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor
    ) -> None:
        self._model, self._cache, self._page_size = model, cache, page_size
        self._hidden, self._lengths, self._table = hidden, lengths, table
        self._device = hidden.device
        config = model.config
        self._layers = [
            Layer(attention, mlp) for attention, mlp in zip(model.modules[1:-2:2], model.modules[2:-2:2], strict=True)
        ]
        head = model.modules[-1]
        self._head = Group([head]) if head.q_tensors else None
        self._groups = [group for layer in self._layers for group in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if self._head is not None:
            self._groups.append(self._head)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._widths = (heads, kv_heads, config.head_dim)
        rows = len(hidden)

        def buffer(width: int) -> torch.Tensor:
            return torch.empty((rows, width), dtype=torch.half, device=self._device)

        self._normed = [buffer(hidden.shape[1]) for _ in range(3)]
        self._qkv = buffer((heads + 2 * kv_heads) * config.head_dim)
        self._attended = buffer(heads * config.head_dim)
        self._inner = buffer(max(layer.down.matrices[0].k for layer in self._layers))
        self._after = torch.empty_like(lengths)
        self._logits = buffer(head.out_features)
        self._tuner = Tuner(self._device)
        self._layouts: dict[tuple[Any, ...], products.Layout] = {}
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        # Decoding one sequence, which everyone will want; and so it shows now whether the kernels can be had.
        self._programs = {(1, 1): self._program(1, 1)}

    def run(
        self, hidden: torch.Tensor, lengths: torch.Tensor, table: torch.Tensor, tokens: int, most_keys: int
    ) -> torch.Tensor:
        """See `ModulesPass.run`; the tensors are the first rows of those of `__init__`."""
        key = (len(lengths), tokens)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._program(*key)
        torch.add(lengths, tokens, out=self._after[: len(lengths)])
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for work in program:
            work(stream, most_keys)
        if self._head is None:
            logits: torch.Tensor = self._model.modules[-1].forward(self._normed[0][: len(hidden)])
            return logits
        return self._logits[: len(hidden)]

    def prepare(self, rows: int) -> None:
        """Nothing to do: see `ModulesPass.prepare`."""

    # --- the parts of a pass --------------------------------------------------------------------------------------

    def _program(self, batch: int, tokens: int) -> list[Work]:
        rows = batch * tokens
        program: list[Work] = []

        def add(launch: Launch) -> None:
            program.append(lambda stream, _: launch(stream))

        for layer in self._layers:
            normed, norm = self._norm(layer.attention.pre_layernorm, layer.qkv, rows, add)
            starts = itertools.accumulate((matrix.n for matrix in layer.qkv.matrices), initial=0)
            add(self._product(layer.qkv, rows, normed, [self._qkv[:, start:] for start in starts], norm=norm))
            output = self._product(layer.o, rows, [self._attended], [self._hidden], residual=True)
            program.append(self._attention(layer, batch, tokens, output))
            add(output)
            normed, norm = self._norm(layer.mlp.pre_layernorm, layer.gate_up, rows, add)
            add(self._gated(layer, rows, normed, norm))
            add(self._product(layer.down, rows, [self._inner], [self._hidden], residual=True))
        normed, norm = self._norm(self._model.modules[-2], self._head, rows, add)
        if self._head is not None:
            add(self._product(self._head, rows, normed, [self._logits], norm=norm))
        return program

    def _norm(
        self, module: Any, group: Group | None, rows: int, add: Callable[[Launch], None]
    ) -> tuple[list[torch.Tensor], Any]:
        """Norm the stream in the order of each matrix of a group; where the normed rows are, for each.

        A product of one row norms it itself: then the stream as it is, and the norm's module. Not where the row is
        wanted in another order, which one kernel makes faster than all blocks of the product.
        """
        if rows == 1 and group is not None and group.orders == [None]:
            return [self._hidden] * len(group.matrices), module
        dim = self._hidden.shape[1]
        kernel = self._kernel(("norm", dim), lambda: small.norm_kernel(self._device, dim))
        outs = list(zip(self._normed, group.orders if group else [None], strict=False))
        add(small.norm(kernel, rows, self._hidden, module.weight, module.variance_epsilon, outs))
        return ([self._normed[place] for place in group.places] if group else []), None

    def _product(
        self,
        group: Group,
        rows: int,
        xs: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        *,
        norm: Any = None,
        residual: bool = False,
    ) -> Launch:
        matrices = group.matrices
        argument = products.argument(matrices, rows)
        _norm_first(argument, group, norm)
        products.connect(argument, xs, outs)
        if residual:
            for target, out in zip(argument.matrix, outs, strict=False):
                target.add = out.data_ptr()
        layout = self._layout(group, rows)
        return self._bind(products.variant(matrices, rows, layout), products.blocks(matrices), layout, argument)

    def _gated(self, layer: Layer, rows: int, xs: Sequence[torch.Tensor], norm: Any) -> Launch:
        """Gate and up, with the activation; in the order in which the down matrix wants them."""
        matrices, (down,) = layer.gate_up.matrices, layer.down.matrices
        argument = products.argument(matrices, rows, self._model.config.arch.lm.mlp_act_func)
        _norm_first(argument, layer.gate_up, norm)
        products.connect(argument, xs, [self._inner] * len(matrices))
        # Both halves of a block write one output, and take its order from the first.
        argument.matrix[0].scatter = None if down.inverse is None else down.inverse.data_ptr()
        layout = self._layout(layer.gate_up, rows, paired=True)
        variant = products.variant(matrices, rows, layout, paired=True, two_xs=len(layer.gate_up.orders) > 1)
        return self._bind(variant, products.blocks(matrices, paired=True), layout, argument)

    def _layout(self, group: Group, rows: int, *, paired: bool = False) -> products.Layout:
        """The layout for a group and all that are like it."""
        key = (group.kind, products.most_rows(rows), paired)
        if key not in self._layouts:
            alike = [other.matrices for other in self._groups if other.kind == group.kind]
            self._layouts[key] = self._tuner.layout(alike, rows, paired=paired, two_xs=len(group.orders) > 1)
        return self._layouts[key]

    def _bind(self, variant: products.Variant, blocks: int, layout: products.Layout, argument: Any) -> Launch:
        def make() -> Kernel:
            return Kernel(products.FILE, products.NAME, variant.defines, self._device, variant.shared_bytes)

        key = (tuple(sorted(variant.defines.items())), variant.shared_bytes)
        return self._kernel(key, make).bind((blocks,), 32 * layout.warps, argument)

    def _attention(self, layer: Layer, batch: int, tokens: int, output: Launch) -> Work:
        """Head norms, rotary embedding, cache and attention; its result becomes the input of `output`, in its order."""
        heads, kv_heads, head_dim = self._widths
        module, cache, index = layer.attention, self._cache, layer.attention.layer_idx
        rows, page_size = batch * tokens, self._page_size
        lengths, table = self._lengths[:batch], self._table[:batch]
        constants = self._model.get_device_context(self._device.index)
        sine, cosine = constants.sin[module.rope_index], constants.cos[module.rope_index]
        keys, values = cache.get_kv_state(index, batch, 0, 0, page_size, lengths, table)
        argument = small.RopeArgument(
            qkv=self._qkv.data_ptr(), sine=sine.data_ptr(), cosine=cosine.data_ptr(), lengths=lengths.data_ptr(),
            table=table.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
            q_weight=None if module.q_norm is None else module.q_norm.weight.data_ptr(),
            k_weight=None if module.k_norm is None else module.k_norm.weight.data_ptr(),
            epsilon=0.0 if module.q_norm is None else module.q_norm.variance_epsilon,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, turned=sine.shape[-1], tokens=tokens,
            stride=self._qkv.stride(0), table_stride=table.stride(0), page_size=page_size,
        )  # fmt: skip
        kernel = self._kernel(("rotate",), lambda: small.rotate_kernel(self._device))
        rotate = kernel.bind((rows, heads + 2 * kv_heads), -(-head_dim // 2 // 32) * 32, argument)
        q = self._qkv[:rows, : heads * head_dim].view(batch, tokens, heads, head_dim)
        paged = (-1, page_size, kv_heads, head_dim)
        k_pages, v_pages = keys.view(paged), values.view(paged)
        after, attended = self._after[:batch], self._attended[:rows]
        softcap = self._model.config.attn_logit_softcapping or 0.0
        (perm,) = layer.o.orders
        reorder = None
        if perm is not None and rows == 1:
            output.argument.matrix[0].perm = perm.data_ptr()
        elif perm is not None:
            width = heads * head_dim
            gather = self._kernel(("norm", width), lambda: small.norm_kernel(self._device, width))
            reorder = small.norm(gather, rows, attended, None, 0.0, [(attended, perm)])

        def work(stream: int, most_keys: int) -> None:
            if cache.has_scales:
                cache.get_kv_state(index, batch, 0, most_keys, page_size, lengths, table)
            rotate(stream)
            out = attend_paged(
                q, k_pages, v_pages, cache_seqlens=after, block_table=table, scale=module.scaling,
                window=module.sliding_window or 0, softcap=softcap, max_len=most_keys,
            )  # fmt: skip
            if cache.has_scales:
                cache.store_kv_state(index, batch, 0, tokens, page_size, lengths, table)
            if reorder is None:
                output.argument.matrix[0].x = out.data_ptr()
            else:
                reorder.argument.x = out.data_ptr()
                reorder(stream)

        return work

    def _kernel(self, key: tuple[Any, ...], make: Callable[[], Kernel]) -> Kernel:
        if key not in self._kernels:
            self._kernels[key] = make()
        return self._kernels[key]
