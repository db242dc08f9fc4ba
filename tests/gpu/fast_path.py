"""What the fast path gains over exllamav2's own API, on one machine in one go: the table of README's "How fast".

    python tests/gpu/fast_path.py MODEL... [--prompt-tokens 512] [--new-tokens 256] [--runs 3] [--batch 8,16] [--decode]

For each model, one process each: `stock_exllamav2.py`; the engine with as many runs on the same prompts; an engine for
each size of a batch; `exl run` as users call it. Prints a line for each figure: ours, the baseline's, their ratio. With
--decode only the first two.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def worker(args: argparse.Namespace) -> None:
    """One process of ours: runs one after the other, or a batch."""
    import torch

    from exl_cli import loader
    from exl_cli.engines.base import Request
    from exl_cli.models.load_options import LoadOptions
    from exl_cli.models.tokenizer import Tokenizer
    from exl_cli.sampling import Sampling

    class Quiet:
        def note(self, message: str) -> None:
            sys.stderr.write(message + "\n")

        def progress(self, done: int, total: int) -> None:
            pass

    (path,) = args.models
    info = loader.resolve(path)
    tokenizer = Tokenizer(info.path)
    options = LoadOptions(engine="exllamav2", max_seq_len=args.context, sequences=max(args.worker, 1))
    engine = loader.load(info, tokenizer, options, Quiet())
    numbers = torch.Generator().manual_seed(1234)
    vocabulary = min(30000, int(info.text_config("vocab_size")))

    def request(seed: int) -> Request:
        ids = torch.randint(100, vocabulary, (args.prompt_tokens,), generator=numbers).tolist()
        return Request(ids, Sampling(), args.new_tokens, seed)

    found: dict[str, Any] = {"facts": engine.facts}
    if args.worker:
        rates = []
        for _ in range(2):
            streams = [engine.stream(request(seed)) for seed in range(args.worker)]
            for stream in streams:
                while not next(stream).token_ids:
                    pass
            begin, tokens = time.perf_counter(), 0
            while streams:
                for stream in list(streams):
                    chunk = next(stream)
                    tokens += len(chunk.token_ids)
                    if chunk.summary is not None:
                        streams.remove(stream)
            rates.append(tokens / (time.perf_counter() - begin))
        found["rate"] = rates[-1]
    else:
        runs = []
        for seed in range(args.runs):
            asked = request(seed)
            begin, first = time.perf_counter(), 0.0
            for chunk in engine.stream(asked):
                first = first or (chunk.token_ids and time.perf_counter())
            end = time.perf_counter()
            rate = (args.new_tokens - 1) / (end - first)
            runs.append({"first_token_s": first - begin, "rate": rate, "all_s": end - begin})
        found |= {"runs": runs, "peak_bytes": torch.cuda.max_memory_allocated()}
    print(json.dumps(found))


def measured(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment() -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path}


def whole_process(model: str, args: argparse.Namespace) -> float:
    """Seconds of `exl run`, from its start to its end."""
    words = random.Random(1).choices(["the", "a", "fox", "river", "under", "house", "went", "old", "said"], k=400)
    command = [sys.executable, "-m", "exl_cli", "run", model, "-p", " ".join(words), "-n", str(args.new_tokens)]
    begin = time.perf_counter()
    done = subprocess.run([*command, "--engine", "exllamav2"], capture_output=True, check=False, env=environment())
    if done.returncode:
        sys.exit(done.stderr.decode()[-3000:])
    return time.perf_counter() - begin


def compare(model: str, args: argparse.Namespace) -> None:
    sizes = ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens), "--runs", str(args.runs)]
    stock = measured([sys.executable, str(HERE / "stock_exllamav2.py"), model, *sizes])
    itself = [sys.executable, __file__, model, *sizes]
    ours = measured([*itself, "--worker", "0"])
    steady, stock_steady = (max(run["rate"] for run in found["runs"][1:]) for found in (ours, stock))
    soon, stock_soon = (min(run["first_token_s"] for run in found["runs"][1:]) for found in (ours, stock))
    first, stock_first = (found["runs"][0]["all_s"] for found in (ours, stock))
    peak, stock_peak = (found["peak_bytes"] / 1e9 for found in (ours, stock))
    print(f"\n{Path(model).name}: {', '.join(f'{key} {value}' for key, value in ours['facts'].items())}")
    line("decode, steady, tokens/s", steady, stock_steady, steady / stock_steady)
    line("first generation, seconds", first, stock_first, stock_first / first)
    line("time to first token, steady, seconds", soon, stock_soon, stock_soon / soon)
    line("peak memory, GB", peak, stock_peak, peak / stock_peak)
    if args.decode:
        return
    process, one_run = whole_process(model, args), stock["import_s"] + stock["load_s"] + stock["runs"][0]["all_s"]
    line("whole process, seconds", process, one_run, one_run / process)
    for size in args.batch.split(","):
        rate = measured([*itself, "--worker", size, "--context", "1024"])["rate"]
        line(f"batch {size} against batch 1, tokens/s", rate, stock_steady, rate / stock_steady)


def line(what: str, own: float, other: float, ratio: float) -> None:
    print(f"  {what:40} {own:10.3f} {other:10.3f} {ratio:8.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", default="8,16")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args)
        return
    print(f"prompt {args.prompt_tokens}, new {args.new_tokens}; ours, exllamav2's own API, ratio (larger is better)")
    for model in args.models:
        compare(model, args)


if __name__ == "__main__":
    main()
