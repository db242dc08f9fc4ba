"""The CPU engine's KV cache: one sequence, kept between requests to reuse common prefixes.

The cache is truncated to the prefix it shares with the new prompt, if that gives exactly the state of a cache that
never held the rest:

- full-attention layers can be truncated anywhere;
- a full sliding window has dropped old positions, and recurrent state cannot be rolled back. Such a sequence can be
  extended but not truncated, and is reset instead;
- with length-dependent RoPE ("dynamic", "longrope"), cached keys are rotated for the old length. When the frequencies
  change, the cache is reset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class KvCache:
    """A transformers cache and the token ids it holds.

    Args:
        config: the model's transformers config.

    Attributes:
        ids: cached token ids.
        states: the transformers cache, passed to forward.
        fixed_until: sequence length up to which RoPE does not depend on the length.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._dynamic, self.fixed_until = _length_rule(config.get_text_config())
        self._salt = ""  # of the tokens held
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self.ids: list[int] = []
        self.states: Any = DynamicCache(config=self._config)
        self._angles = 0.0

    def rewind(self, ids: Sequence[int], salt: str = "") -> int:
        """Truncate to the prefix shared with a prompt, without its last token, whose logits are needed.

        Args:
            ids: the prompt.
            salt: nothing is kept if it differs from the cached tokens' salt.

        Returns:
            Number of prompt tokens that are cached.
        """
        alike = salt == self._salt and self._angles_at(len(ids)) == self._angles
        common = _common(self.ids, ids[:-1]) if alike else 0
        if common < len(self.ids):
            self._truncate(common)
        self._salt = salt
        return len(self.ids)

    def extend(self, ids: Sequence[int], compute: Callable[[list[int], Any], T]) -> T:
        """Compute the tokens that are not cached yet.

        Args:
            ids: the whole sequence, starting with the cached tokens.
            compute: runs the model on new tokens and extends the states. If it raises, its tokens are dropped.
        """
        if self._angles_at(len(ids)) != self._angles:
            self.reset()
            self._angles = self._angles_at(len(ids))
        try:
            result = compute(list(ids[len(self.ids) :]), self.states)
        except BaseException:
            # Only some layers have the new tokens: roll them back.
            self._truncate(len(self.ids))
            raise
        self.ids = list(ids)
        return result

    def _angles_at(self, length: int) -> float:
        """A key for the RoPE frequencies used at a sequence length: equal keys, equal frequencies."""
        if length <= self.fixed_until:
            return 0.0
        return length if self._dynamic else 1.0

    def _truncate(self, count: int) -> None:
        """Keep the first `count` tokens, or reset if a layer cannot be truncated."""
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
    """Whether a layer still holds the keys and values of every position."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) is DynamicLayer:
        return True
    if type(layer) is not DynamicSlidingWindowLayer:
        return False
    return layer.keys is None or bool(layer.keys.shape[-2] == layer.cumulative_length)


def _length_rule(config: Any) -> tuple[bool, float]:
    """Whether RoPE changes with every token (dynamic) or once (longrope), and the length beyond which it changes."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One setting for the model, or one per layer type.
    settings = [rope] if "rope_type" in rope or "type" in rope else [it for it in rope.values() if isinstance(it, dict)]
    limits = {
        setting.get("rope_type", setting.get("type")): (
            setting.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        for setting in settings
    }
    lengths = [limits[kind] for kind in ("dynamic", "longrope") if kind in limits]
    return "dynamic" in limits, min(lengths, default=math.inf)
