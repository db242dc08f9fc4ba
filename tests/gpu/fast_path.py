"""What the fast path gains over exllamav2's own API, on one machine in one go: the table of docs/performance.md.

    python tests/gpu/fast_path.py MODEL... [--vs CHECKOUT] [--prompt-tokens 512] [--new-tokens 256] [--runs 3]
                                           [--batch 8,64,128] [--decode]

For each model, one process each: the baseline, `stock_exllamav2.py`; exl with as many runs of one generation; exl for
each size of a batch; `exl run` as users call it. Prints a line for each figure: ours, the baseline's, their ratio. With
--decode only the first two. With --vs the baseline is exl as it lies in another checkout, measured alike.

Tokens per second are the difference of two runs, one with few new tokens and one with many: all that the second made
more, over all the time that it took more. So prompts do not count, nor when which request began. With prompts included,
it is all new tokens over the whole time. exl is used through its public API alone, which is the same in all versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Begins streams, as `exl_cli.Model.stream` returns them.
Start = Callable[[], "list[Any]"]
WORDS = ("the", "a", "fox", "river", "under", "house", "went", "old", "said", "tree", "little", "once", "upon", "time")


def worker(args: argparse.Namespace) -> None:
    """One process of exl: so many generations at a time."""
    import torch

    import exl_cli

    (path,) = args.models
    size, few = args.worker, max(1, args.new_tokens // 8)
    context = args.context if size == 1 else args.prompt_tokens + args.new_tokens
    numbers = random.Random(1234)
    with exl_cli.load(path, engine="exllamav2", max_seq_len=context, sequences=size) as model:

        def prompt() -> str:
            """One that is new each time, so that nothing is found in the cache."""
            words = numbers.choices(WORDS, k=args.prompt_tokens)
            while (count := len(model.encode(" ".join(words)))) > args.prompt_tokens:
                del words[args.prompt_tokens - count :]
            return " ".join(words)

        def prepare(new_tokens: int) -> Start:
            prompts = [prompt() for _ in range(size)]
            return lambda: [model.stream(text, max_new_tokens=new_tokens, seed=n) for n, text in enumerate(prompts)]

        whole, _, _ = timed(prepare(args.new_tokens))
        rates, firsts, wholes = zip(*(steady(prepare, few, args.new_tokens) for _ in range(args.runs)), strict=True)
        figures = {"facts": model.facts, "first_s": whole, "first_token_s": min(firsts), "rate": max(rates)}
        peak = torch.cuda.max_memory_allocated()
        print(json.dumps({**figures, "rate_with_prompts": max(wholes), "peak_bytes": peak}))


def timed(start: Start, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float, int]:
    """Seconds of some streams, those to the first text of the first one, and tokens of all."""
    begin = clock()
    streams = start()
    next(streams[0], "")
    first = clock()
    tokens = sum(len(stream.result().token_ids) for stream in streams)
    return clock() - begin, first - begin, tokens


def steady(
    prepare: Callable[[int], Start], few: int, many: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float, float]:
    """Tokens per second while all requests run, seconds to the first text, tokens per second with prompts included."""
    (short, _, made), (long, first, more) = (timed(prepare(new_tokens), clock) for new_tokens in (few, many))
    return (more - made) / (long - short), first, more / long


def measured(command: list[str], tree: Path = ROOT) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(tree))
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(tree: Path) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(tree), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path}


def whole_process(model: str, args: argparse.Namespace, tree: Path) -> float:
    """Seconds of `exl run`, from its start to its end."""
    text = " ".join(random.Random(1).choices(WORDS, k=400))
    command = [sys.executable, "-m", "exl_cli", "run", model, "-p", text, "-n", str(args.new_tokens)]
    begin = time.perf_counter()
    done = subprocess.run([*command, "--engine", "exllamav2"], capture_output=True, check=False, env=environment(tree))
    if done.returncode:
        sys.exit(done.stderr.decode()[-3000:])
    return time.perf_counter() - begin


def stock(model: str, sizes: list[str]) -> dict[str, Any]:
    """exllamav2's own API, in the form of what a worker prints."""
    run = measured([sys.executable, str(HERE / "stock_exllamav2.py"), model, *sizes])
    first, *warm = run["runs"]
    return {
        "first_s": first["all_s"],
        "first_token_s": min(each["first_token_s"] for each in warm),
        "rate": max(each["rate"] for each in warm),
        "peak_bytes": run["peak_bytes"],
        "process_s": run["import_s"] + run["load_s"] + first["all_s"],
    }


def compare(model: str, args: argparse.Namespace) -> None:
    sizes = ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens), "--runs", str(args.runs)]

    def ours(size: str, tree: Path = ROOT) -> Any:
        command = [sys.executable, __file__, model, *sizes, "--context", str(args.context), "--worker", size]
        return measured(command, tree)

    own, other = ours("1"), ours("1", args.vs) if args.vs else stock(model, sizes)
    print(f"\n{Path(model).name}: {', '.join(f'{key} {value}' for key, value in own['facts'].items())}")
    line("decode, steady, tokens/s", own["rate"], other["rate"], own["rate"] / other["rate"])
    line("first generation, seconds", own["first_s"], other["first_s"], other["first_s"] / own["first_s"])
    soon, base_soon = own["first_token_s"], other["first_token_s"]
    line("time to first token, steady, seconds", soon, base_soon, base_soon / soon)
    peak, base_peak = (each["peak_bytes"] / 1e9 for each in (own, other))
    line("peak memory, GB", peak, base_peak, peak / base_peak)
    if args.decode:
        return
    process = whole_process(model, args, ROOT)
    other_process = whole_process(model, args, args.vs) if args.vs else other["process_s"]
    line("whole process, seconds", process, other_process, other_process / process)
    for size in args.batch.split(","):
        own, base = ours(size), ours(size, args.vs) if args.vs else {"rate_with_prompts": other["rate"], **other}
        for key, words in (("rate", ""), ("rate_with_prompts", ", prompts included")):
            what = f"batch {size}{words}" + ("" if args.vs else " against batch 1") + ", tokens/s"
            line(what, own[key], base[key], own[key] / base[key])


def line(what: str, own: float, other: float, ratio: float) -> None:
    print(f"  {what:40} {own:10.3f} {other:10.3f} {ratio:8.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--vs", type=lambda path: Path(path).resolve(), metavar="CHECKOUT")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3, help="at least 2: the first warms up")
    parser.add_argument("--batch", default="8,16,32,64,128")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runs < 2:
        parser.error("--runs: at least 2, as the first warms up")
    if args.worker is not None:
        worker(args)
        return
    baseline = args.vs or "exllamav2's own API"
    print(f"prompt {args.prompt_tokens}, new {args.new_tokens}; ours, {baseline}, ratio (larger is better)")
    for model in args.models:
        compare(model, args)


if __name__ == "__main__":
    main()
