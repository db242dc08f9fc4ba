"""The keys and values of one sequence on the CPU, kept from one generation to the next.

What a new prompt has in common with the sequence, from its first token on, is not computed again. The rest is cut off,
and that only where it leaves exactly the state of a cache that never held it:

- layers that keep every position can be cut anywhere;
- a sliding window has thrown positions away once it was full, and the state of a recurrent layer cannot be turned back.
  Such a sequence can be continued, but not cut;
- rotary embeddings that change with the length of the sequence ("dynamic", "longrope") have turned what is kept by
  angles that a longer or shorter sequence would not use. Where they change, all is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class KvCache:
    """A transformers cache and the tokens it holds.

    Args:
        config: the model's.

    Attributes:
        ids: the tokens whose keys and values are held, in order.
        states: what the model's forward takes as its cache.
        fixed_until: up to which length of a sequence the rotary embeddings do not depend on it.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._dynamic, self.fixed_until = _length_rule(config.get_text_config())
        self._salt = ""  # of the tokens held
        self.reset()

    def reset(self) -> None:
        """Hold nothing."""
        from transformers import DynamicCache

        self.ids: list[int] = []
        self.states: Any = DynamicCache(config=self._config)
        self._angles = 0.0

    def rewind(self, ids: Sequence[int], salt: str = "") -> int:
        """Keep what a prompt begins with, but never its last token, whose logits are wanted.

        Args:
            ids: the prompt.
            salt: with another than the tokens held have, nothing is kept.

        Returns:
            How many tokens of the prompt are held.
        """
        alike = salt == self._salt and self._angles_at(len(ids)) == self._angles
        common = _common(self.ids, ids[:-1]) if alike else 0
        if common < len(self.ids):
            self._truncate(common)
        self._salt = salt
        return len(self.ids)

    def extend(self, ids: Sequence[int], compute: Callable[[list[int], Any], T]) -> T:
        """Compute the tokens that are not held yet.

        Args:
            ids: the whole sequence, which begins with the tokens held.
            compute: runs the model on tokens, with the states it is given, and extends them; the tokens of one that
                raises are not held.
        """
        if self._angles_at(len(ids)) != self._angles:
            self.reset()
            self._angles = self._angles_at(len(ids))
        try:
            result = compute(list(ids[len(self.ids) :]), self.states)
        except BaseException:
            # Some layers have them already, others do not.
            self._truncate(len(self.ids))
            raise
        self.ids = list(ids)
        return result

    def _angles_at(self, length: int) -> float:
        """A number that changes with the angles by which a sequence of that length is turned."""
        if length <= self.fixed_until:
            return 0.0
        return length if self._dynamic else 1.0

    def _truncate(self, count: int) -> None:
        """Hold the first `count` tokens only; nothing at all where that cannot be done exactly."""
        if not count or not all(_is_whole(layer) for layer in self.states.layers):
            self.reset()
            return
        for layer in self.states.layers:
            if layer.keys is None:
                continue
            layer.keys, layer.values = layer.keys[..., :count, :], layer.values[..., :count, :]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = count
        del self.ids[count:]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_whole(layer: Any) -> bool:
    """Whether a layer's state is the keys and values of every position, and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) is DynamicLayer:
        return True
    if type(layer) is not DynamicSlidingWindowLayer:
        return False
    return layer.keys is None or bool(layer.keys.shape[-2] == layer.cumulative_length)


def _length_rule(config: Any) -> tuple[bool, float]:
    """Whether the rotary embeddings change with each token, rather than once; and beyond which length they change."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One setting for the model, or one for each type of layer.
    settings = [rope] if "rope_type" in rope or "type" in rope else [it for it in rope.values() if isinstance(it, dict)]
    limits = {
        setting.get("rope_type", setting.get("type")): (
            setting.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        for setting in settings
    }
    lengths = [limits[kind] for kind in ("dynamic", "longrope") if kind in limits]
    return "dynamic" in limits, min(lengths, default=math.inf)
