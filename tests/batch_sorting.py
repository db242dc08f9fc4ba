"""Measures what sorting saves, on prompts that share beginnings of 1,000 tokens: in sorted windows and in input order.

python tests/batch_sorting.py [BEGINNINGS [PROMPTS_EACH [TURNS]]]
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARED, OWN, NEW = 1000, 12, 4


def write_prompts(path: Path, beginnings: int, each: int) -> None:
    """Prompts of random tokens: so many that begin alike, shuffled."""
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, 4000) for _ in range(count)]

    prompts = [[*begin, *tokens(OWN)] for begin in (tokens(SHARED) for _ in range(beginnings)) for _ in range(each)]
    rng.shuffle(prompts)
    path.write_text("".join(json.dumps({"prompt": ids, "ignore_eos": True}) + "\n" for ids in prompts))


def run(prompts: Path, output: Path, *flags: str) -> tuple[int, int, float]:
    """Tokens of the prompts, how many of them were computed, and seconds from the first answer to the last."""
    command = [sys.executable, "-m", "exl_cli", "batch", str(prompts), "-o", str(output)]
    process = subprocess.Popen([*command, "--engine", "cpu", "-q", "-n", str(NEW), *flags])
    begun = 0.0
    while process.poll() is None:
        if not begun and output.exists() and output.stat().st_size:
            begun = time.monotonic()
        time.sleep(0.005)
    seconds = time.monotonic() - begun
    usages = [json.loads(line)["response"]["body"]["usage"] for line in output.read_text().splitlines()]
    total = sum(usage["prompt_tokens"] for usage in usages)
    return total, total - sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages), seconds


def main(beginnings: int = 8, each: int = 16, turns: int = 3) -> None:
    """Print the figures; `--ordered` is what does not sort."""
    seconds: dict[str, float] = {"sorted": 0.0, "unsorted": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "in.jsonl")
        write_prompts(prompts, beginnings, each)
        for turn in range(turns):
            for name, flags in (("sorted", ()), ("unsorted", ("--ordered",))):
                total, computed, taken = run(prompts, Path(folder, f"{name}{turn}.jsonl"), *flags)
                seconds[name] += taken
                print(f"{name}: {computed:,} of {total:,} prompt tokens computed, {taken:.1f} s", flush=True)
    print(f"time sorted over unsorted: {seconds['sorted'] / seconds['unsorted']:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
