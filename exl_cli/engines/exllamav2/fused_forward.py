"""Forward passes of few tokens through kernels of our own, seven a layer at most, for models built like Llama.

It reads exllamav2's modules and weights where they are, and adds to the same stream of float16 hidden states. A layer
is: norm; query, key and value in one product; head norms, rotary embedding and the cache; attention; output product
added to the stream; norm; gate and up with the activation in one product; down product added to the stream. Sums are
float32. A mixture of experts in the MLP's place has five kernels (mixtures.py), or is computed by exllamav2.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from exl_cli.engines.exllamav2 import kernel_choice
from exl_cli.engines.exllamav2.attention.paged import attend_paged
from exl_cli.engines.exllamav2.build_model import experts_captured, rope_switches
from exl_cli.engines.exllamav2.inputs import Inputs, Received
from exl_cli.engines.exllamav2.kernels import decode_attention, norm_rope, quantized_linear
from exl_cli.engines.exllamav2.kernels.operation import Operation, Run
from exl_cli.engines.exllamav2.kernels.tuning import Tuner
from exl_cli.engines.exllamav2.layers import Group, Layer, Mlp
from exl_cli.engines.exllamav2.mixtures import Mixtures
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.errors import EngineError

_log = logging.getLogger(__name__)

# Float16 values; the strictest alignment any kernel needs.
_ALIGNED = 512

# A piece of a pass: runs on a stream, by its handle, with a bound of the keys of any row.
Work = Callable[[int, int], None]


class Scratch:
    """Allocates temporary buffers of a pass: from exllamav2's scratch memory while it lasts.

    Of exllamav2's modules only experts run during a pass of exl's kernels, when nothing in the buffers is needed.

    Args:
        memory: exllamav2's scratch memory, float16; None if it has none.
        device: the GPU.
    """

    def __init__(self, memory: torch.Tensor | None, device: torch.device) -> None:
        self._left = memory if memory is not None else torch.empty(0, dtype=torch.half, device=device)

    def take(self, count: int) -> torch.Tensor:
        """Allocate `count` float16 values, uninitialized."""
        size = -(-count // _ALIGNED) * _ALIGNED
        if size > len(self._left):
            return torch.empty(count, dtype=torch.half, device=self._left.device)
        taken, self._left = self._left[:count], self._left[size:]
        return taken


class FusedForward:
    """Runs a stage of forward passes of up to `quantized_linear.MOST_SEQUENCES` tokens, and of more over prompts.

    To be built and run with the stage's GPU and stream as the current ones.

    Args:
        model, cache: exllamav2's; `layers.why_not` of the model is empty.
        page_size: positions in a page.
        inputs: returns the input buffers of a pass of that many tokens; `hidden` is float16.
        modules: the passes of exllamav2's modules.
        layers: the stage's; all by default. The last stage has the head.
        scratch: whether exllamav2's scratch memory of this GPU may be used; that is for one stage.
        why_not_experts: why exllamav2's modules compute mixtures of experts; empty if exl's kernels do.

    Raises:
        EngineError: the kernels cannot be compiled here.
    """

    name = "exl's kernels"

    def __init__(
        self,
        model: Any,
        cache: Any,
        page_size: int,
        inputs: Callable[[int], Inputs | Received],
        modules: ModulesForward,
        layers: range | None = None,
        *,
        scratch: bool = True,
        why_not_experts: str = "",
    ) -> None:
        self._model, self._cache, self._page_size = model, cache, page_size
        self._inputs = inputs
        self._switches_rope = bool(rope_switches(model))
        most = inputs(quantized_linear.MOST_TOKENS)
        self._device = most.hidden.device
        config = model.config
        pairs = [*zip(model.modules[1:-2:2], model.modules[2:-2:2], strict=True)]
        layers = range(len(pairs)) if layers is None else layers
        own = pairs[layers.start : layers.stop]
        self._layers = [Layer(attention, mlp, own_experts=not why_not_experts) for attention, mlp in own]
        # The norm and the head, which the last stage has.
        self._has_head, head = layers.stop == len(pairs), model.modules[-1]
        self._head = Group([head]) if self._has_head and head.q_tensors else None
        self._groups = [group for layer in self._layers for group in layer.groups]
        self._modules = modules
        self._has_experts = any(layer.experts for layer in self._layers)
        if self._has_experts:
            _log.info("exllamav2 computes the experts: %s", why_not_experts)
            self.name += f", exllamav2's for experts ({why_not_experts})"
        if self._head is not None:
            self._groups.append(self._head)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._widths = (heads, kv_heads, config.head_dim)
        rows, width = most.hidden.shape
        memory = model.get_device_context(self._device.index).scratch if scratch else None
        room = Scratch(memory, self._device)
        products = [product for layer in self._layers for product in layer.products]
        products += [self._head.product] if self._head is not None else []
        self._tuner = Tuner(self._device, products, room.take)

        def buffer(columns: int) -> torch.Tensor:
            return room.take(rows * columns).view(rows, columns)

        self._inner = buffer(max((it.mlp.down.product.matrices[0].k for it in self._layers if it.mlp), default=0))
        self._normed = [buffer(width) for _ in range(3)]
        self._qkv = buffer((heads + 2 * kv_heads) * config.head_dim)
        self._attended = buffer(heads * config.head_dim)
        mixtures = [layer.mixture for layer in self._layers if layer.mixture is not None]
        activation = config.arch.lm.mlp_act_func
        self._mixtures = Mixtures(self._device, mixtures, activation, self._tuner, room.take) if mixtures else None
        self._after = torch.empty(quantized_linear.MOST_SEQUENCES, dtype=torch.int32, device=self._device)
        logits = quantized_linear.MOST_SEQUENCES if self._has_head else 0, head.out_features
        self._logits = torch.empty(logits, dtype=torch.half, device=self._device)
        self._norm_weights: dict[tuple[int, int], torch.Tensor] = {}
        self._tuner.begin(1)
        self._decode_attention = self._choose_attention()
        # Decoding one sequence, which everyone will want; and so it shows now whether the kernels work here.
        self._programs = {(1, 1, True): self._program(1, 1)}

    def run(
        self,
        hidden: torch.Tensor,
        lengths: torch.Tensor,
        block_table: torch.Tensor,
        tokens: int,
        most_keys: int,
        rope_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `ModulesForward.run`; the tensors are the first rows of those of `__init__`.

        A stage without the head gives no logits, but leaves the hidden states in `hidden`.
        """
        self._compute(lengths, tokens, most_keys, with_logits=True)
        if self._has_head and self._head is None:
            logits: torch.Tensor = self._model.modules[-1].forward(self._normed[0][: len(hidden)])
            return logits.clamp_(-65504, 65504)  # a float16 product of torch's
        return self._logits[: len(hidden)]

    def _compute(self, lengths: torch.Tensor, tokens: int, most_keys: int, *, with_logits: bool) -> None:
        key = (len(lengths), tokens, with_logits)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._program(*key)
        if not (with_logits and self._attends(tokens)):
            torch.add(lengths, tokens, out=self._after[: len(lengths)])
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for work in program:
            work(stream, most_keys)

    @property
    def most_captured(self) -> float:
        """Most tokens for which a CUDA graph can capture the passes."""
        return experts_captured(self._model) if self._has_experts else math.inf

    def prefills(self, tokens: int) -> bool:
        """Whether `prefill_blocks` can take this many tokens. If kernels are still missing, start compiling them."""
        return not self._has_experts and self._tuner.ready(tokens)

    def prefill_blocks(self, lengths: torch.Tensor, tokens: int, most_keys: int) -> None:
        """Compute keys and values only, of `tokens` tokens per sequence; see `run`."""
        self._compute(lengths, tokens, most_keys, with_logits=False)

    def why_not(self) -> str:
        """Why exllamav2's kernels are the better choice, see `kernel_choice.why_not`; empty where they are not."""
        return kernel_choice.why_not(self._tuner, self._groups, lambda: self._modules.prepare(1))

    def compile_ahead(self) -> None:
        """Begin to compile what passes of several tokens will want, in the background."""
        # Short messages, the ends of long ones, and what is between.
        self._tuner.begin(8, quantized_linear.MOST_ROWS, 16, *quantized_linear.ROWS[4:])

    def prepare(self, rows: int) -> None:
        """See `ModulesForward.prepare`."""
        if self._has_experts:
            self._modules.prepare(rows)

    def close(self) -> None:
        """Compile no further in the background; passes are still possible."""
        self._tuner.close()

    # --- the parts of a pass --------------------------------------------------------------------------------------

    def _program(self, batch: int, tokens: int, with_logits: bool = True) -> list[Work]:
        rows = batch * tokens
        inputs, hidden = self._inputs(rows), self._inputs(rows).hidden
        self._tuner.begin(rows)
        program: list[Work] = []

        def add(launch: Run) -> None:
            program.append(lambda stream, _: launch(stream))

        last = self._layers[-1] if self._has_head else None
        for layer in self._layers:
            normed, norm = self._norm(hidden, layer.attention.pre_layernorm, layer.qkv, rows, add)
            starts = itertools.accumulate((matrix.n for matrix in layer.qkv.product.matrices), initial=0)
            add(self._product(layer.qkv, rows, normed, [self._qkv[:, start:] for start in starts], norm=norm))
            if layer is last and not with_logits:
                # Nothing after the last layer's keys and values is needed.
                program.append(self._attention(inputs, layer, batch, tokens, stores_only=True))
                return program
            program.append(self._attention(inputs, layer, batch, tokens))
            add(self._product(layer.o, rows, [self._attended], [hidden], residual=True))
            if layer.mixture is not None and self._mixtures is not None:
                self._norm(hidden, layer.mixture.norm, None, rows, add)
                for launch in self._mixtures.bind(layer.mixture, self._normed[0], hidden, rows):
                    add(launch)
                continue
            if layer.mlp is None:
                program.append(self._modules_mixture(layer.experts, hidden[:rows]))
                continue
            normed, norm = self._norm(hidden, layer.mlp.norm, layer.mlp.gate_up, rows, add)
            add(self._gated(layer.mlp, rows, normed, norm))
            inner = self._inner.view(-1)[: rows * layer.mlp.down.product.matrices[0].k].view(rows, -1)
            add(self._product(layer.mlp.down, rows, [inner], [hidden], residual=True))
        if not self._has_head:
            return program
        normed, norm = self._norm(hidden, self._model.modules[-2], self._head, rows, add)
        if self._head is not None:
            add(self._product(self._head, rows, normed, [self._logits], norm=norm))
        return program

    def _norm(
        self, hidden: torch.Tensor, module: Any, group: Group | None, rows: int, add: Callable[[Run], None]
    ) -> tuple[list[torch.Tensor], Any]:
        """Norm the stream in the order of each matrix of a group; where the normed rows are, for each.

        A product of one row norms it itself: then the stream as it is, and the norm's module.
        """
        if rows == 1 and group is not None:
            return [hidden] * len(group.chosen), module
        kernel = norm_rope.norm_kernel(self._device, hidden.shape[1])
        orders: list[torch.Tensor | None] = [None]
        chosen: Sequence[int] = []
        if group is not None:
            # One output per permutation; matrices with the same one share it.
            firsts = [group.chosen.index(index) for index in range(len(group.permutations))]
            orders = [self._tuner.order(group.product, rows, first)[0] for first in firsts]
            chosen = group.chosen
        outs = list(zip(self._normed, orders, strict=False))
        add(norm_rope.norm(kernel, rows, hidden, module.weight, module.variance_epsilon, outs))
        return [self._normed[index] for index in chosen], None

    def _norms_first(self, group: Group, module: Any) -> list[tuple[torch.Tensor, float]]:
        """Weight and epsilon of the norm that a product of one row applies first; empty without a module."""
        norms = []
        for index in group.chosen if module is not None else ():
            key, perm = (id(module), index), group.permutations[index]
            if key not in self._norm_weights:
                weight = module.weight
                self._norm_weights[key] = weight if perm is None else weight[perm.long() & 0xFFFF].contiguous()
            norms.append((self._norm_weights[key], module.variance_epsilon))
        return norms

    def _product(
        self,
        group: Group,
        rows: int,
        xs: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        *,
        norm: Any = None,
        residual: bool = False,
    ) -> Run:
        norms = self._norms_first(group, norm)
        return self._tuner.bind(Operation(group.product, rows, xs, outs, norms, residual=residual))

    def _modules_mixture(self, experts: Any, hidden: torch.Tensor) -> Work:
        """Norm, experts and what they add to the stream, by exllamav2."""
        states = hidden[None]

        def work(stream: int, most_keys: int) -> None:
            out = experts.forward(states)
            if out.data_ptr() != states.data_ptr():  # few tokens are computed in place
                states.copy_(out)

        return work

    def _gated(self, mlp: Mlp, rows: int, xs: Sequence[torch.Tensor], norm: Any) -> Run:
        """Gate and up, with the activation; in the order in which the down matrix wants them."""
        product, activation = mlp.gate_up.product, self._model.config.arch.lm.mlp_act_func
        sources, places = self._tuner.order(mlp.down.product, rows)
        inner = self._inner.view(-1)[: rows * product.matrices[0].n].view(rows, -1)
        # Both halves of a block write one output.
        return self._tuner.bind(
            Operation(
                product, rows, xs, [inner] * 2, self._norms_first(mlp.gate_up, norm),
                activation=activation, places=places, sources=sources,
            )
        )  # fmt: skip

    def _attention(
        self, inputs: Inputs | Received, layer: Layer, batch: int, tokens: int, *, stores_only: bool = False
    ) -> Work:
        """Head norms, rotary embedding, cache and attention, in the order in which the output's product wants it."""
        heads, kv_heads, head_dim = self._widths
        module, cache, index = layer.attention, self._cache, layer.attention.layer_idx
        rows, page_size = batch * tokens, self._page_size
        lengths, block_table = inputs.lengths[:batch], inputs.block_table[:batch]
        constants = self._model.get_device_context(self._device.index)
        sine, cosine = constants.sin[module.rope_index], constants.cos[module.rope_index]
        keys, values = cache.get_kv_state(index, batch, 0, 0, page_size, lengths, block_table)
        argument = norm_rope.RopeArgument(
            qkv=self._qkv.data_ptr(), sine=sine.data_ptr(), cosine=cosine.data_ptr(), lengths=lengths.data_ptr(),
            table=block_table.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
            rope_offsets=inputs.rope_offsets.data_ptr() if self._switches_rope else None,
            q_weight=None if module.q_norm is None else module.q_norm.weight.data_ptr(),
            k_weight=None if module.k_norm is None else module.k_norm.weight.data_ptr(),
            epsilon=0.0 if module.q_norm is None else module.q_norm.variance_epsilon,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, turned=sine.shape[-1], tokens=tokens,
            stride=self._qkv.stride(0), table_stride=block_table.stride(0), page_size=page_size,
        )  # fmt: skip
        attended = self._attended[:rows]
        # A single row is put into the order of the output's matrix by its product.
        in_order = rows == 1 or stores_only
        perm, places = (None, None) if in_order else self._tuner.order(layer.o.product, rows)
        softcap = self._model.config.attn_logit_softcapping or 0.0
        if self._decode_attention is not None and self._attends(tokens) and not stores_only:
            return self._decode_attention.bind(
                argument, attended, batch, scale=module.scaling, window=module.sliding_window or 0, softcap=softcap,
                places=places,
            )  # fmt: skip
        attend = self._attend_paged(inputs, layer, batch, tokens, argument, softcap, stores_only=stores_only)
        if perm is None:
            return attend
        gather = norm_rope.norm_kernel(self._device, heads * head_dim)
        reorder = norm_rope.norm(gather, rows, attended, None, 0.0, [(attended, perm)])

        def work(stream: int, most_keys: int) -> None:
            attend(stream, most_keys)
            reorder(stream)

        return work

    def _attend_paged(
        self,
        inputs: Inputs | Received,
        layer: Layer,
        batch: int,
        tokens: int,
        argument: norm_rope.RopeArgument,
        softcap: float,
        *,
        stores_only: bool,
    ) -> Work:
        """What `DecodeAttention` does, in two steps and by any backend."""
        heads, kv_heads, head_dim = self._widths
        module, cache, index, page_size = layer.attention, self._cache, layer.attention.layer_idx, self._page_size
        rows, lengths, block_table, after = (
            batch * tokens,
            inputs.lengths[:batch],
            inputs.block_table[:batch],
            self._after[:batch],
        )
        rotate = norm_rope.rotate(self._device, rows, argument)
        q = self._qkv[:rows, : heads * head_dim].view(batch, tokens, heads, head_dim)
        out = self._attended[:rows].view(batch, tokens, heads, head_dim)
        pages = (-1, page_size, kv_heads, head_dim)
        keys, values = (t.view(pages) for t in cache.get_kv_state(index, batch, 0, 0, page_size, lengths, block_table))

        def work(stream: int, most_keys: int) -> None:
            if cache.has_scales:
                cache.get_kv_state(index, batch, 0, most_keys, page_size, lengths, block_table)
            rotate(stream)
            if not stores_only:
                attend_paged(
                    q, keys, values, cache_seqlens=after, block_table=block_table, scale=module.scaling,
                    window=module.sliding_window or 0, softcap=softcap, max_len=most_keys, out=out,
                )  # fmt: skip
            if cache.has_scales:
                cache.store_kv_state(index, batch, 0, tokens, page_size, lengths, block_table)

        return work

    @property
    def attends(self) -> bool:
        """Whether attention of decoding is by a kernel of our own, too."""
        return self._attends(1)

    def _attends(self, tokens: int) -> bool:
        return self._decode_attention is not None and self._decode_attention.takes(tokens)

    def _choose_attention(self) -> decode_attention.DecodeAttention | None:
        heads, kv_heads, head_dim = self._widths
        page_size, quantized = self._page_size, self._cache.has_scales
        reason = decode_attention.why_not(heads, kv_heads, head_dim, page_size, quantized_cache=quantized)
        if not reason:
            try:
                return decode_attention.DecodeAttention(self._device, heads, kv_heads, head_dim, page_size)
            except EngineError as error:
                reason = error.message
        _log.info("attention from few tokens is left to the backend: %s", reason)
        return None
