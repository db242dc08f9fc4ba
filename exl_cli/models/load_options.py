"""How a model is to be loaded: the values behind the load flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from exl_cli.errors import UsageError, param

EngineChoice = Literal["auto", "exllamav2", "cpu"]
CacheType = Literal["fp16", "q8", "q6", "q4"]
Speculation = Literal["off", "ngram"]


@dataclass(frozen=True)
class LoadOptions:
    """Where and how a model is loaded.

    Attributes:
        engine: "auto" takes exllamav2 where a GPU and the model allow it.
        max_seq_len: context to allocate, in tokens; None for what the request needs, between 4,096 and the model's.
        cache: type of the KV cache on the GPU.
        gpu_split: GiB of weights per GPU; None to fill the GPUs one after the other.
        low_mem: evaluate prompts in smaller pieces, for less scratch memory.
        sequences: how many sequences of that context the KV cache shall have room for at once.

        speculate: "ngram" proposes tokens that followed the same ones before, and verifies several in one pass.
        draft: a smaller model of the same vocabulary to propose them, found as any model is; None for none.

    Raises:
        UsageError: a value that cannot be.
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
        if self.gpu_split is not None and not _is_split(self.gpu_split):
            raise UsageError(f"{param('gpu_split')} {self.gpu_split!r} is not a list of GiB per GPU", "as [20, 24]")
        if self.speculate not in get_args(Speculation):
            raise UsageError(
                f"no kind of speculation named {self.speculate!r}", f"kinds: {', '.join(get_args(Speculation))}"
            )
        if self.speculate != "off" and self.draft is not None:
            raise UsageError(f"{param('draft')} and {param('speculate')} both propose tokens", "use one of them")
        if self.engine == "cpu":
            self.refuse_speculation(f"{param('engine')} cpu")

    def for_the_gpu(self) -> list[str]:
        """The parameters given that the CPU engine ignores, for use in a text; see `param`."""
        given = {"cache": self.cache != "fp16", "gpu_split": self.gpu_split is not None, "low_mem": self.low_mem}
        return [param(name) for name, said in given.items() if said]

    def refuse_speculation(self, reason: str) -> None:
        """For an engine that computes one token at a time, and `reason` why it was chosen.

        Raises:
            UsageError: there is to be speculation.
        """
        if self.speculate != "off" or self.draft is not None:
            name = param("speculate" if self.draft is None else "draft")
            raise UsageError(
                f"{name} is for the exllamav2 engine, the CPU engine does not speculate ({reason})",
                f"leave {name} away",
            )


def _is_split(values: object) -> bool:
    """Whether these are GiB per GPU, not all of them 0."""
    if not isinstance(values, tuple) or not all(isinstance(value, (int, float)) for value in values):
        return False
    return all(0 <= value < 10_000 for value in values) and any(values)


def parse_gpu_split(text: str) -> tuple[float, ...] | None:
    """ "auto" to None, "20,24" to (20.0, 24.0).

    Raises:
        UsageError: anything else.
    """
    if text.strip().lower() == "auto":
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not _is_split(values):
        raise UsageError(f"{param('gpu_split')} {text!r} is not a list of GiB per GPU", "write it as 20,24 or auto")
    return values
