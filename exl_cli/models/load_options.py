"""Load options, validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from exl_cli.errors import UsageError, param

EngineChoice = Literal["auto", "exllamav2", "cpu"]
CacheType = Literal["fp16", "q8", "q6", "q4"]
Speculation = Literal["off", "ngram"]


@dataclass(frozen=True)
class LoadOptions:
    """Where and how to load a model.

    Attributes:
        engine: "auto" is exllamav2 if the machine and the model allow it, else the CPU.
        max_seq_len: context to allocate, in tokens; None for what the request needs, at least 4,096 and at most the
            model's context.
        cache: KV cache type on the GPU.
        gpu_split: GiB of weights per GPU; None uses one GPU if the model fits, else several, filled alike.
        low_mem: smaller prefill chunks, for less scratch memory.
        sequences: contexts of that length that the KV cache on the GPU has room for.
        speculate: "ngram" drafts tokens by prompt lookup.
        draft: name or path of a draft model with the same vocabulary; None for none.

    Raises:
        UsageError: an invalid value or combination.
    """

    engine: EngineChoice = "auto"
    max_seq_len: int | None = None
    cache: CacheType = "fp16"
    gpu_split: tuple[float, ...] | None = None
    low_mem: bool = False
    sequences: int = 1
    speculate: Speculation = "off"
    draft: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in get_args(EngineChoice):
            raise UsageError(f"no engine named {self.engine!r}", f"engines: {', '.join(get_args(EngineChoice))}")
        if self.cache not in get_args(CacheType):
            raise UsageError(f"no cache type named {self.cache!r}", f"cache types: {', '.join(get_args(CacheType))}")
        if self.max_seq_len is not None and not (type(self.max_seq_len) is int and self.max_seq_len >= 1):
            raise UsageError(f"{param('max_seq_len')} must be at least 1 token, got {self.max_seq_len!r}")
        if not (type(self.sequences) is int and self.sequences >= 1):
            raise UsageError(f"{param('sequences')} must be at least 1, got {self.sequences!r}")
        if self.gpu_split is not None and not _is_split(self.gpu_split):
            raise UsageError(
                f"{param('gpu_split')} {self.gpu_split!r} is not a list of GiB per GPU", "write it as [20, 24]"
            )
        if self.speculate not in get_args(Speculation):
            raise UsageError(
                f"no kind of speculation named {self.speculate!r}", f"kinds: {', '.join(get_args(Speculation))}"
            )
        if self.speculate != "off" and self.draft is not None:
            raise UsageError(f"{param('draft')} cannot be combined with {param('speculate')}", "drop one of them")
        if self.engine == "cpu":
            self.refuse_speculation(f"{param('engine')} cpu")

    def for_the_gpu(self) -> list[str]:
        """Parameters that were set but that the CPU engine ignores, as `param` marks."""
        given = {"cache": self.cache != "fp16", "gpu_split": self.gpu_split is not None, "low_mem": self.low_mem}
        return [param(name) for name, said in given.items() if said]

    def refuse_speculation(self, reason: str) -> None:
        """Raise UsageError if speculation was requested; `reason` says why the CPU engine was chosen."""
        if self.speculate != "off" or self.draft is not None:
            name = param("speculate" if self.draft is None else "draft")
            raise UsageError(
                f"{name} needs the exllamav2 engine; the CPU engine does not support speculation ({reason})",
                f"drop {name}",
            )


def _is_split(values: object) -> bool:
    if not isinstance(values, tuple) or not all(isinstance(value, (int, float)) for value in values):
        return False
    return all(0 <= value < 10_000 for value in values) and any(values)


def parse_gpu_split(text: str) -> tuple[float, ...] | None:
    """Parse "auto" (None) or GiB per GPU such as "20,24" ((20.0, 24.0)); anything else is a UsageError."""
    if text.strip().lower() == "auto":
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not _is_split(values):
        raise UsageError(f"{param('gpu_split')} {text!r} is not a list of GiB per GPU", "write it as 20,24 or auto")
    return values
