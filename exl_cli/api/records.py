"""The JSON records that commands print with --json, as plain dicts with consistent names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Request, Summary
from exl_cli.models.info import ModelInfo
from exl_cli.models.memory import CUDA_CONTEXT
from exl_cli.models.prompt import Prompt
from exl_cli.system.readings import GpuReading, HostReading
from exl_cli.system.version import installed_version

if TYPE_CHECKING:
    from exl_cli.models.folders import Entry
    from exl_cli.models.hub.download import Outcome, Plan, Wanted
    from exl_cli.models.memory import Estimate
    from exl_cli.models.placement import Share

_SPECULATION = ("drafted_tokens", "accepted_tokens", "note")


def summarized(summary: Summary) -> dict[str, Any]:
    """A summary as a dict, without the speculation fields if there was none."""
    left_out = () if summary.drafted_tokens else _SPECULATION
    return {name: value for name, value in asdict(summary).items() if name not in left_out}


def limit(summary: Summary, context_length: int) -> Literal["context", "max_new_tokens"] | None:
    """Which limit ended a response, or None. If both were reached, "context": raising max_new_tokens would not help."""
    if summary.finish_reason != "length":
        return None
    return "context" if summary.prompt_tokens + summary.new_tokens >= context_length else "max_new_tokens"


def prompt(rendered: Prompt, ids: Sequence[int]) -> dict[str, Any]:
    """The rendered prompt, with the names that `generation` uses."""
    return {**rendered.variables, "prompt": rendered.text, "prompt_tokens": len(ids), "prompt_ids": list(ids)}


def generation(
    info: ModelInfo,
    engine: EngineThread,
    request: Request,
    variables: Mapping[str, str],
    text: str,
    summary: Summary,
    load_seconds: float,
    gpus: Sequence[GpuReading],
    host: HostReading,
) -> dict[str, Any]:
    """One response: template variables, text, and all numbers, in seconds, tokens and bytes."""
    return {
        **variables,
        "text": text,
        "finish_reason": summary.finish_reason,
        "limit": limit(summary, engine.context_length),
        "prompt_tokens": summary.prompt_tokens,
        "reused_tokens": summary.reused_tokens,
        "new_tokens": summary.new_tokens,
        **{name: value for name, value in summarized(summary).items() if name in _SPECULATION},
        "load_seconds": round(load_seconds, 6),
        "prompt_seconds": round(summary.prompt_seconds, 6),
        "generation_seconds": round(summary.generation_seconds, 6),
        "first_token_seconds": round(summary.first_token_seconds, 6),
        "prompt_tokens_per_second": round(summary.prompt_rate, 3),
        "generation_tokens_per_second": round(summary.generation_rate, 3),
        "seed": request.seed,
        "max_new_tokens": request.max_new_tokens,
        "stop": list(request.stop_strings),
        "sampling": request.sampling.to_dict(),
        "model": info.to_dict(),
        "engine": {"name": engine.name, "context_length": engine.context_length, **engine.facts},
        "memory": {"host": asdict(host), "gpus": [asdict(gpu) for gpu in gpus]},
        "exl_version": installed_version(),
    }


def model(
    info: ModelInfo,
    entry: Entry,
    licence: str,
    why_not: str,
    template: str,
    estimates: Mapping[int, Mapping[str, Estimate]],
    shares: Sequence[Share] = (),
) -> dict[str, Any]:
    """A model, as `exl show` prints it.

    Args:
        info, entry: the model.
        licence: its name, or empty.
        why_not: why exllamav2 cannot run it, or empty.
        template: source of its chat template, or empty.
        estimates: GPU memory by context and cache type.
        shares: what each of the machine's GPUs would hold with the default context.
    """
    return {
        **entry.to_dict(),
        "licence": licence or None,
        "head_bits": info.head_bits,
        "group_size": info.group_size,
        "desc_act": info.desc_act if info.format == "gptq" else None,
        "why_not_exllamav2": why_not or None,
        "chat_template": template or None,
        "generation_config": info.generation_config,
        "config": info.config,
        "vram_bytes": {
            str(context): {cache: needed.total for cache, needed in row.items()} for context, row in estimates.items()
        },
        "gpu_split": [
            {
                "gpu": share.gpu,
                "layers": [share.layers.start, share.layers.stop - 1],
                "weights_bytes": share.weights,
                "vram_bytes": share.allocated + CUDA_CONTEXT,
            }
            for share in shares
        ],
    }


def plan(order: Plan) -> dict[str, Any]:
    """A download plan, as --dry-run prints it."""
    return {
        **_place(order.wanted, order.listing.commit),
        "total_bytes": order.total,
        "remaining_bytes": order.remaining,
        "left_out": order.pickles,
        "files": [
            {"name": item.file.name, "bytes": item.file.size, "bytes_here": item.bytes_here, "state": item.state}
            for item in order.items
        ],
    }


def outcome(done: Outcome) -> dict[str, Any]:
    """A finished download."""
    return {
        **_place(done.wanted, done.commit),
        "total_bytes": done.total,
        "downloaded_bytes": done.fetched_bytes,
        "seconds": round(done.seconds, 3),
        "files": [{"name": file.name, "bytes": file.size, "sha256": file.sha256 or None} for file in done.files],
    }


def _place(wanted: Wanted, commit: str) -> dict[str, Any]:
    repository, revision = wanted.repository.id, wanted.repository.revision
    return {"repository": repository, "revision": revision, "commit": commit or None, "path": str(wanted.folder)}
