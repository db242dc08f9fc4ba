"""The estimate of GPU memory beside what a run really takes, for whole models on a real GPU. Prints a table.

    python tests/gpu/estimate_against_peak.py MODEL_DIR... [--contexts 4096,16384] [--caches fp16,q4]

Each case runs in a process of its own: it loads the model through `exl_cli.loader` as `exl run` does, evaluates a
prompt of 512 random tokens and generates 32. The measured peak is the most that torch's allocator reserved, loading
included, and on top of it whatever else the process holds on the card (CUDA context, kernels): NVML's used memory less
what was used before the process came, less what the allocator holds at that moment. Nothing else may use the GPU.

Exit status 1 if a case is off by more than --tolerance (0.1), or fails.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Request
from exl_cli.models import memory
from exl_cli.models.load_options import CacheType, LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

PROMPT_TOKENS, NEW_TOKENS = 512, 32


class _Silent:
    def note(self, message: str) -> None:
        """A `loader.Observer` that is told for nothing."""

    def progress(self, done: int, total: int) -> None:
        """See `note`."""


def _used() -> int:
    """Bytes in use on the first GPU that this process sees, by whomever."""
    return sum(gpu.total - gpu.free for gpu in memory.gpus()[:1])


def measure(folder: str, context: int, cache: CacheType) -> dict[str, Any]:
    """One case, in this process. Bytes."""
    before = _used()
    info = loader.resolve(folder)
    tokenizer = Tokenizer(info.path)
    options = LoadOptions(engine="exllamav2", max_seq_len=context, cache=cache)
    engine = EngineThread(loader.load(info, tokenizer, options, _Silent()))
    random.seed(1234)
    ids = random.choices(range(100, min(30_000, tokenizer.vocab_size)), k=PROMPT_TOKENS)
    request = Request(ids=ids, sampling=build({}, None, {}), max_new_tokens=NEW_TOKENS, seed=0)
    produced = sum(len(chunk.token_ids) for chunk in engine.stream(request))

    import torch

    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    peak_reserved = torch.cuda.max_memory_reserved()
    device = _used() - before
    engine.close()
    estimate = memory.estimate(info, context, cache)
    if estimate is None:
        raise SystemExit(f"{folder}: no estimate can be made")
    return {
        "model": Path(folder).name,
        "context": context,
        "cache": cache,
        "new_tokens": produced,
        "estimate": estimate.total,
        "parts": vars(estimate),
        "device_after": device,
        "outside_allocator": device - reserved,
        "peak_reserved": peak_reserved,
        "peak": peak_reserved + device - reserved,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def _in_child(folder: str, context: int, cache: str) -> dict[str, Any] | None:
    command = [sys.executable, __file__, folder, "--one", f"{context},{cache}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{folder} {context} {cache} failed:\n{done.stderr}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run all cases and print the table, with `--json` one line for each instead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL_DIR")
    parser.add_argument("--contexts", default="4096,16384")
    parser.add_argument("--caches", default="fp16,q4", help=f"of {', '.join(get_args(CacheType))}")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        context, _, cache = arguments.one.partition(",")
        print(json.dumps(measure(arguments.models[0], int(context), cache)))
        return
    cases = [
        (model, int(context), cache)
        for model in arguments.models
        for context in arguments.contexts.split(",")
        for cache in arguments.caches.split(",")
    ]
    bad = 0
    if not arguments.json:
        print(
            f"{'model':24} {'context':>7} {'cache':5} {'estimate':>9} {'peak':>9} {'reserved':>9} {'outside':>8} ratio"
        )
    for case in cases:
        found = _in_child(*case)
        ratio = found["estimate"] / found["peak"] if found else 0.0
        bad += abs(ratio - 1) > arguments.tolerance
        if found is None:
            continue
        if arguments.json:
            print(json.dumps({**found, "ratio": round(ratio, 4)}))
            continue
        sizes = [f"{found[key] / 2**20:,.0f}" for key in ("estimate", "peak", "peak_reserved", "outside_allocator")]
        name, context, cache = found["model"][:24], found["context"], found["cache"]
        print(f"{name:24} {context:7} {cache:5} {sizes[0]:>9} {sizes[1]:>9} {sizes[2]:>9} {sizes[3]:>8} {ratio:.3f}")
    if not arguments.json:
        print("MiB; peak = torch's peak reserved memory, and what the process holds outside its allocator")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
