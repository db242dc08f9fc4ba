"""Rotary embeddings as config.json describes them: each kind of layer's, their frequencies, and how far they reach.

Everything here follows transformers (`modeling_rope_utils.py`), whose computation is what a model was trained with or
is published for. It is plain Python: a model's description must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Names that mean one of these: Phi 3 called longrope "su" at first; for text alone mrope is the default.
_OTHER_NAMES = {"su": "longrope", "mrope": "default"}
_NUMBERS = ("rope_theta", "factor", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of one kind of layers.

    Attributes:
        kind: one of KINDS.
        theta: the base.
        dim: values of a head that are rotated, the first ones.
        original: tokens that the model saw before its context was extended.
        longest: tokens that config.json counts, extended or not.
        parameters: the keys that belong to the kind.
    """

    kind: str
    theta: float
    dim: int
    original: int
    longest: int
    parameters: Mapping[str, Any] = field(hash=False)

    @property
    def factor(self) -> float:
        """By how much the context is extended; 1 where it is not."""
        factor = self.parameters.get("factor")
        if factor is None:
            return self.longest / self.original if self.kind in ("yarn", "longrope") else 1.0
        return float(factor)

    def switches(self, context: int) -> list[int]:
        """Lengths of a sequence up to `context` beyond which it takes other frequencies, from its first token on.

        Those of "dynamic" follow each token. Taken by steps of a sixteenth of the length, in the middle of each, logits
        are off by 0.5 % (relative L2, a model of 1,024 tokens computed as one of 256 extended fourfold), and 99 % of
        the likeliest tokens are the same.
        """
        if self.kind == "longrope":
            return [self.original] if context > self.original else []
        switches = []
        length = self.longest
        while self.kind == "dynamic" and length < context:
            switches.append(length)
            length += -(-length // 16)
        return switches

    def frequencies(self, length: int = 0) -> list[float]:
        """Radians a position, for each pair of rotated values, in a sequence of `length` tokens."""
        theta = self.theta
        if self.kind == "dynamic" and length > self.longest:
            grown = self.factor * length / self.longest - (self.factor - 1)
            theta *= grown ** (self.dim / (self.dim - 2))
        plain = [theta ** (-2 * index / self.dim) for index in range(self.dim // 2)]
        if self.kind == "linear":
            return [value / self.factor for value in plain]
        if self.kind == "longrope":
            factors = self.parameters["long_factor" if length > self.original else "short_factor"]
            return [value / factor for value, factor in zip(plain, factors, strict=True)]
        if self.kind == "llama3":
            return [self._llama3(value) for value in plain]
        return self._yarn(plain) if self.kind == "yarn" else plain

    @property
    def attention_factor(self) -> float:
        """By what sines and cosines are multiplied."""
        given = self.parameters.get("attention_factor")
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if given is not None:
            return float(given)
        if self.factor <= 1:
            return 1.0
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original))
        scale, all_dims = self.parameters.get("mscale"), self.parameters.get("mscale_all_dim")
        log = 0.1 * math.log(self.factor)
        return float((scale * log + 1) / (all_dims * log + 1)) if scale and all_dims else log + 1

    def _llama3(self, value: float) -> float:
        # Long waves are stretched, short ones are not, and between two lengths one passes into the other.
        low, high = (float(self.parameters[f"{end}_freq_factor"]) for end in ("low", "high"))
        turns = self.original * value / (2 * math.pi)
        if turns > high:
            return value
        if turns < low:
            return value / self.factor
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * value / self.factor + smooth * value

    def _yarn(self, plain: list[float]) -> list[float]:
        # Pairs that turn often enough in the original context are kept, those that turn too little are stretched.
        def pair(turns: float) -> float:
            return self.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low = pair(self.parameters.get("beta_fast") or 32)
        high = pair(self.parameters.get("beta_slow") or 1)
        if self.parameters.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = (high - low) or 0.001
        stretched = [min(1.0, max(0.0, (index - low) / width)) for index in range(self.dim // 2)]
        return [v / self.factor * s + v * (1 - s) for v, s in zip(plain, stretched, strict=True)]


def ropes(
    config: Mapping[str, Any],
    head_dim: int,
    longest: int,
    *,
    theta: float = 10000.0,
    local_theta: float | None = None,
    partial: float | None = None,
) -> dict[str, Rope]:
    """The rotary embeddings that a text model's config.json describes, by the kind of layer.

    Args:
        config: its text part.
        head_dim: values of a head.
        longest: tokens of context that it counts.
        theta, local_theta, partial: what the model's class takes for granted: the base, that of layers with a window
            where they have one of their own, and the share of a head that is rotated (None: all of it, always).

    Returns:
        FULL and, where layers with a window have one of their own, SLIDING.

    Raises:
        ValueError: with what makes no sense, in a few words.
    """
    nested = config.get("rope_parameters")
    if not isinstance(nested, dict) or not (FULL in nested or SLIDING in nested):
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        ropes = {FULL: _rope(config, given, head_dim, longest, theta, partial)}
        if local_theta is not None:
            # Gemma 3 before transformers 5; its layers with a window are not scaled.
            local = config.get("rope_local_base_freq") or local_theta
            ropes[SLIDING] = _rope(config, {"rope_theta": local}, head_dim, longest, theta, partial)
        return ropes
    bases = {SLIDING: local_theta or theta}
    return {
        kind: _rope(config, nested[kind], head_dim, longest, bases.get(kind, theta), partial)
        for kind in (FULL, SLIDING)
        if nested.get(kind) is not None
    }


def _rope(
    config: Mapping[str, Any], given: Any, head_dim: int, longest: int, theta: float, partial: float | None
) -> Rope:
    if not isinstance(given, dict):
        raise ValueError("rope parameters must be an object")
    kind = given.get("rope_type", given.get("type")) or "default"
    kind = _OTHER_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "yarn" and "long_factor" in given:
        kind = "longrope"  # what Phi 3 said before it said su
    if kind not in KINDS:
        raise ValueError(f"the rope type {kind!r} is not known")
    for name in _NUMBERS:
        value = given.get(name, config.get(name) if name != "attention_factor" else None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise ValueError(f"{name} must be a number above 0, not {value!r}")
    # Phi 3 keeps the original length outside, and there it counts more.
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    if kind in ("default", "linear", "dynamic"):
        original = None
    base = given.get("rope_theta") or config.get("rope_theta") or theta
    share = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or partial or 1.0
    if partial is None and share != 1.0:
        raise ValueError(f"partial_rotary_factor is {share}, and its class rotates whole heads")
    dim = int(head_dim * share)
    rope = Rope(kind, float(base), dim, _length(original) or longest, longest, given)
    if kind in ("linear", "dynamic", "llama3") and given.get("factor") is None:
        raise ValueError(f"{kind} rope needs a factor")
    if kind == "llama3" and not all(
        isinstance(given.get(f"{end}_freq_factor"), (int, float)) for end in ("low", "high")
    ):
        raise ValueError("llama3 rope needs low_freq_factor and high_freq_factor")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = given.get(name)
        if (
            not isinstance(values, list)
            or len(values) != dim // 2
            or not all(isinstance(value, (int, float)) and value > 0 for value in values)
        ):
            raise ValueError(f"longrope needs {dim // 2} numbers above 0 as {name}")
    return rope


def _length(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"original_max_position_embeddings must be a whole number, at least 1, not {value!r}")
    return value


def extended_length(config: Mapping[str, Any], longest: int) -> int:
    """How many tokens a model can take once `rope_scaling` has extended its context.

    Publishers keep either the original or the extended length in max_position_embeddings; the larger reading counts, as
    for exllamav2 and vLLM. With llama3 and longrope max_position_embeddings is the extended one already.

    Args:
        config: config.json's text part.
        longest: tokens of context that it counts.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict) or str(config.get("model_type")).startswith("gemma3"):
        return longest
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, (int, float)) or not 1 <= factor < 1e6:
        return longest
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = original or config.get("max_sequence_length") or longest
    return max(longest, int(factor * original)) if type(original) is int else longest
