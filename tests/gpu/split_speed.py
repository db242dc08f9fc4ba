"""The speed of a model over several GPUs beside that of the same model on one. Prints a table.

    python tests/gpu/split_speed.py MODEL --split 2,3 [--split 1.3,1.1,1.1,3 …] [--sequences 1,16]
                                    [--prompt-tokens 512] [--long-prompt 2048] [--new-tokens 256] [--cache fp16]

Each split (GiB of weights per GPU, as of --gpu-split) runs in another process, after one with all layers on one GPU
(`--alone 0` leaves that out, for a model that does not fit). Decoding is timed from the last sequence's first token on,
greedily and with the default sampling; a prompt by the time to its first token. --cuts 16 divides the model at layer 16
on one GPU instead: what handing over costs without a link.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from typing import Any

from exl_cli import loader
from exl_cli.engines.base import Chunk, Request
from exl_cli.engines.exllamav2 import engine as exllamav2
from exl_cli.engines.exllamav2 import import_exllamav2
from exl_cli.engines.exllamav2.engine import ExLlamaV2Engine
from exl_cli.engines.exllamav2.extension.build import Notes
from exl_cli.engines.exllamav2.fused_forward import FusedForward
from exl_cli.models.load_options import LoadOptions, parse_gpu_split
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import build

KERNELS_WAIT = 120.0  # seconds that the kernels of prompts may take to compile
REPEATS = 3


def generate(engine: ExLlamaV2Engine, requests: list[Request]) -> tuple[float, float]:
    """Seconds until all requests have a token, and tokens per second from then on."""
    for index, request in enumerate(requests):
        engine.add(index, request)
    begin, ended, waiting = time.perf_counter(), 0, set(range(len(requests)))
    made: list[tuple[float, int]] = []
    first = 0.0
    while ended < len(requests):
        for index, event in engine.step():
            if not isinstance(event, Chunk):
                raise event
            now = time.perf_counter() - begin
            if event.token_ids and index in waiting:
                waiting.remove(index)
                first = now
            made.append((now, len(event.token_ids)))
            ended += event.summary is not None
    last = made[-1][0]
    return first, sum(count for when, count in made if when > first) / max(last - first, 1e-9)


def await_kernels(engine: ExLlamaV2Engine) -> None:
    until = time.perf_counter() + KERNELS_WAIT
    for stage in engine._forward._pipeline.stages:
        for tokens in (64, 128, 256, 512, 1024, 2048) if isinstance(stage.forward, FusedForward) else ():
            while not stage.forward.prefills(tokens) and time.perf_counter() < until:
                time.sleep(0.02)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    info = loader.resolve(args.model)
    import_exllamav2.import_exllamav2(Notes(print))
    sizes = [int(size) for size in args.sequences.split(",")]
    context = max(args.prompt_tokens, args.long_prompt) + args.new_tokens
    split = parse_gpu_split(args.split[0]) if args.split else None
    options = LoadOptions("exllamav2", context, args.cache, split, sequences=max(sizes))
    cuts = [int(cut) for cut in args.cuts.split(",") if cut]
    engine = exllamav2.load(info, Tokenizer(info.path), context, options, lambda *_: None, cuts=cuts)
    await_kernels(engine)
    numbers = random.Random(1234)

    def requests(count: int, tokens: int, new_tokens: int, preset: str | None) -> list[Request]:
        prompts = [[numbers.randrange(100, 4000) for _ in range(tokens)] for _ in range(count)]
        return [Request(ids, build({}, preset), new_tokens, seed) for seed, ids in enumerate(prompts)]

    figures: dict[str, float] = {}
    for size in sizes:
        for name, preset in (("greedy", "greedy"), ("default sampling", None)):
            generate(engine, requests(size, args.prompt_tokens, 40, preset))
            runs = [
                generate(engine, requests(size, args.prompt_tokens, args.new_tokens, preset)) for _ in range(REPEATS)
            ]
            figures[f"decode, {size} sequences, {name}, tokens/s"] = max(rate for _, rate in runs)
    for tokens in sorted({args.prompt_tokens, args.long_prompt}):
        runs = [generate(engine, requests(1, tokens, 2, "greedy")) for _ in range(2 * REPEATS)]
        figures[f"prompt of {tokens}, tokens/s"] = tokens / min(first for first, _ in runs)
    facts = engine.facts
    engine.close()
    return {"figures": figures, "facts": {name: facts.get(name, "") for name in ("kernels", "graphs", "layers")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--split", action="append", default=[])
    parser.add_argument("--cuts", default="")
    parser.add_argument("--alone", type=int, default=1)
    parser.add_argument("--sequences", default="1,16")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--long-prompt", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--cache", default="fp16")
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    cases = [[], *(["--split", split] for split in args.split)] if args.alone else [["--split", s] for s in args.split]
    cases += [["--cuts", args.cuts]] if args.cuts else []
    same = [
        f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("sequences", "prompt_tokens", "long_prompt")
    ]
    same += [f"--new-tokens={args.new_tokens}", f"--cache={args.cache}"]
    base: dict[str, float] = {}
    for case in cases:
        command = [sys.executable, __file__, args.model, "--worker", *same, *case]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        base = base or result["figures"]
        print(f"\n{' '.join(case) or 'one GPU'}: {', '.join(value for value in result['facts'].values() if value)}")
        for name, value in result["figures"].items():
            print(f"{name:<50}{value:>12,.1f}{value / base[name]:>8.3f}", flush=True)


if __name__ == "__main__":
    main()
