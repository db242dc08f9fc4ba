"""Measures what Ray costs: jobs of many short prompts on one engine, with Ray and without, in turns.

python tests/batch_ray_overhead.py [PROMPTS [TURNS]]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from batch_kills import write_prompts


def rows_per_second(prompts: Path, output: Path, *flags: str) -> tuple[float, float]:
    """Rate of rows between a tenth and all of the answers, and seconds of the whole command."""
    command = [sys.executable, "-m", "exl_cli", "batch", str(prompts), "-o", str(output)]
    start = time.monotonic()
    process = subprocess.Popen(
        [*command, "--engine", "cpu", "-n", "1", *flags], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    marks: list[tuple[float, int]] = []
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.match(r"([\d,]+) of [\d,]+ rows", line):
            marks.append((time.monotonic(), int(match[1].replace(",", ""))))
    if process.wait():
        raise RuntimeError(f"exit code {process.returncode}")
    (first, begun), (last, done) = marks[0], marks[-1]
    return (done - begun) / (last - first), time.monotonic() - start


def main(count: int = 2000, turns: int = 3) -> None:
    """Print the figures."""
    rates: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "in.jsonl")
        write_prompts(prompts, count)
        for turn in range(turns):
            for name, flags in (("without", ()), ("with", ("--gpus", "1"))):
                rate, seconds = rows_per_second(prompts, Path(folder, f"{name}{turn}.jsonl"), *flags)
                rates[name].append(rate)
                print(f"{name} Ray: {rate:.1f} rows/s, {seconds:.0f} s in all", flush=True)
    without, with_ray = (median(some) for some in rates.values())
    more = (1 / with_ray - 1 / without) * 1e3
    print(f"with Ray over without: {without / with_ray:.3f} of the time, {more:+.2f} ms a row")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
