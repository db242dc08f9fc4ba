"""What `exl bench` says of generation, beside a stopwatch that shares no code with it.

    python tests/gpu/bench_stopwatch.py MODEL [--engine exllamav2] [--new-tokens 128] [--depth 512] [--pairs 7]

The stopwatch runs around the whole of `engine.stream`: once for N + 1 new tokens and once for one, after prompts of the
same length. The difference is the time of N tokens, whatever the prompt and the start of a request cost. Both take
turns, so that heat and other programs fall on both alike. Ends with exit code 1 where they are more than 3 % apart.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench.measure import measure
from exl_cli.bench.plan import Case
from exl_cli.engines.base import Request
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling

LIMIT = 0.03


class Quiet:
    """A `loader.Observer` that says nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int) -> None:
        """Nothing."""


def seconds(engine: EngineThread, ids: list[int], new_tokens: int, seed: int) -> float:
    """The time of a whole stream."""
    start = time.perf_counter()
    count = sum(len(chunk.token_ids) for chunk in engine.stream(Request(ids, Sampling(), new_tokens, seed)))
    end = time.perf_counter()
    if count != new_tokens:
        sys.exit(f"the engine gave {count} of {new_tokens} tokens")
    return end - start


def main() -> None:
    """Measure in turns, print both and the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    info = loader.resolve(args.model)
    case = Case(0, args.new_tokens, args.depth)
    engine = EngineThread(
        loader.load(info, Tokenizer(info.path), LoadOptions(engine=args.engine), Quiet(), needed=case.context)
    )
    numbers = random.Random(1)
    vocabulary = int(info.text_config("vocab_size"))

    def prompt() -> list[int]:
        return [numbers.randrange(10, vocabulary) for _ in range(case.prompt_ids)]

    bench, stopwatch = [], []
    for pair in range(-1, args.pairs):  # the first pair warms both up
        sample = measure(engine, case, [Request(prompt(), Sampling(), case.new_tokens, pair + 1)])
        whole = seconds(engine, prompt(), case.new_tokens, pair + 1)
        rest = seconds(engine, prompt(), 1, pair + 1)
        if pair >= 0:
            bench.append(1e9 * case.n_gen / sample.ns)
            stopwatch.append(case.n_gen / (whole - rest))
    engine.close()
    ours, theirs = statistics.median(bench), statistics.median(stopwatch)
    difference = ours / theirs - 1
    print(f"{info.name} {info.format_name}, {engine.name}, {case.name}, median of {args.pairs}")
    print(f"bench     {ours:.2f} tokens/s ± {statistics.stdev(bench):.2f}")
    print(f"stopwatch {theirs:.2f} tokens/s ± {statistics.stdev(stopwatch):.2f}")
    print(f"difference {difference:+.2%} (at most {LIMIT:.0%})")
    sys.exit(abs(difference) > LIMIT)


if __name__ == "__main__":
    main()
