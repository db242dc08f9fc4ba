"""RoPE as config.json describes it: per layer type, with all scaling methods of transformers' modeling_rope_utils.py.

Plain Python, because inspecting a model must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Aliases: Phi 3 first called longrope "su"; mrope (Qwen 2 VL) equals the default for text.
_OTHER_NAMES = {"su": "longrope", "mrope": "default"}
_NUMBERS = ("rope_theta", "factor", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow")


@dataclass(frozen=True)
class Rope:
    """The RoPE of one layer type.

    Attributes:
        kind: one of KINDS.
        theta: the base of the frequencies.
        dim: number of leading elements of a head that are rotated.
        original: context length before scaling, in tokens.
        longest: context length stated in config.json, in tokens; depending on the kind, before or after scaling.
        parameters: the keys of `rope_scaling` or `rope_parameters`.
    """

    kind: str
    theta: float
    dim: int
    original: int
    longest: int
    parameters: Mapping[str, Any] = field(hash=False)

    @property
    def factor(self) -> float:
        """The scaling factor of the context; 1 without scaling."""
        factor = self.parameters.get("factor")
        if factor is None:
            return self.longest / self.original if self.kind in ("yarn", "longrope") else 1.0
        return float(factor)

    def switches(self, context: int) -> list[int]:
        """Sequence lengths, up to `context`, at which the frequencies change for all of a sequence's tokens.

        longrope changes once, at the original length. "dynamic" changes with every token; we approximate it with steps
        of 1/16 of the length, using the frequencies of each step's middle. Measured on a 1,024-token model run as a
        256-token one extended fourfold, logits are off by 0.5 % (relative L2) and 99 % of the top tokens agree.
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
        """Radians per position of each of the dim / 2 pairs, in a sequence of `length` tokens."""
        theta = self.theta
        if self.kind == "dynamic" and length > self.longest:
            # NTK-aware scaling: a larger base stretches low frequencies and leaves high ones nearly unchanged.
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
        """Multiplies sines and cosines, and so scales attention scores by its square (YaRN's temperature)."""
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
        # Llama 3.1: keep high frequencies, divide low ones by the factor, and interpolate between. `turns` is the
        # number of rotations within the original context.
        low, high = (float(self.parameters[f"{end}_freq_factor"]) for end in ("low", "high"))
        turns = self.original * value / (2 * math.pi)
        if turns > high:
            return value
        if turns < low:
            return value / self.factor
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * value / self.factor + smooth * value

    def _yarn(self, plain: list[float]) -> list[float]:
        # YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071): pairs that rotate more than beta_fast times within
        # the original context keep their frequency, those below beta_slow are divided by the factor, and a linear ramp
        # over the pair's index lies between. `pair` is the index of the pair with that many rotations.
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
    """Read the RoPE of each layer type.

    Args:
        config: the text model's part of config.json.
        head_dim: size of a head.
        longest: context length stated there, in tokens.
        theta: default base.
        local_theta: default base of sliding-window layers; None if they share the other layers' RoPE.
        partial: default fraction of a head that is rotated; None if the class always rotates all of it.

    Returns:
        FULL, and SLIDING if sliding-window layers differ.

    Raises:
        ValueError: an unknown type or an invalid parameter.
    """
    nested = config.get("rope_parameters")
    if not isinstance(nested, dict) or not (FULL in nested or SLIDING in nested):
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        ropes = {FULL: _rope(config, given, head_dim, longest, theta, partial)}
        if local_theta is not None:
            # Gemma 3 before transformers 5. Its sliding-window layers are not scaled.
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
        kind = "longrope"  # the earliest Phi 3 configs call longrope "yarn"
    if kind not in KINDS:
        raise ValueError(f"unknown RoPE type {kind!r}")
    for name in _NUMBERS:
        value = given.get(name, config.get(name) if name != "attention_factor" else None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise ValueError(f"{name} must be a number above 0, not {value!r}")
    # Phi 3 has the original length at top level, where transformers gives it precedence.
    original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    if kind in ("default", "linear", "dynamic"):
        original = None
    base = given.get("rope_theta") or config.get("rope_theta") or theta
    share = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or partial or 1.0
    if partial is None and share != 1.0:
        raise ValueError(f"partial_rotary_factor is {share}, but this architecture rotates whole heads")
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
        raise ValueError(f"original_max_position_embeddings must be a positive integer, not {value!r}")
    return value


def extended_length(config: Mapping[str, Any], longest: int) -> int:
    """Context length after RoPE scaling, in tokens.

    max_position_embeddings is the original length in some models and the scaled one in others. Like exllamav2 and vLLM,
    take the larger reading. For llama3 and longrope it is always the scaled length.

    Args:
        config: the text model's part of config.json.
        longest: context length stated there, in tokens.
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
