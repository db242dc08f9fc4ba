"""Decode rates with the tokens chosen on the GPU and on the CPU, as a program that prints its figures.

python tests/gpu/sampling_speed.py MODEL [--sequences 1,32] [--new 192]
"""

from __future__ import annotations

import argparse
import logging
import queue
import random
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import Recorder

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.engines.base import Request
from exl_cli.engines.exllamav2.device_sampler import DeviceSampler
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.sampling import Sampling, build

SETTINGS = {
    "greedy": build({}, "greedy"),
    "top-p": Sampling(temperature=1.0, top_k=0, top_p=0.9, token_repetition_penalty=1.0),
    "notebook": Sampling(),
    "much": Sampling(
        top_k=0, top_p=0.95, min_p=0.01, dry_multiplier=0.8, xtc_probability=0.3, token_frequency_penalty=0.1
    ),
}


def rate(engine: EngineThread, sampling: Sampling, sequences: int, new: int) -> float:
    """Tokens a second while all sequences decode."""
    inbox: queue.Queue[tuple[int, Any, float]] = queue.Queue()
    numbers = random.Random(1)
    for index in range(sequences):
        ids = [numbers.randrange(100, 30000) for _ in range(256)]
        request = Request(ids, sampling, new, index, min_new_tokens=0)
        engine.submit(request, lambda chunk, index=index: inbox.put((index, chunk, time.perf_counter())))
    tokens: list[tuple[float, int]] = []
    first, ended, open_ = {}, 0.0, sequences
    while open_:
        index, chunk, now = inbox.get(timeout=120)
        if isinstance(chunk, BaseException):
            raise chunk
        if chunk is None or chunk.summary is not None:
            open_ -= 1
            ended = ended or now
            continue
        first.setdefault(index, now)
        tokens.append((now, len(chunk.token_ids)))
    begun = max(first.values())
    return sum(count for now, count in tokens if begun < now <= ended) / (ended - begun)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model")
    arguments.add_argument("--sequences", default="1,32")
    arguments.add_argument("--new", type=int, default=192)
    arguments.add_argument("--gpu-only", action="store_true", help="not the CPU's sampler, which takes its time")
    given = arguments.parse_args()
    info = loader.resolve(given.model)
    options = LoadOptions(engine="exllamav2", sequences=32, max_seq_len=1024)
    logging.basicConfig(level=logging.INFO)
    engine = EngineThread(loader.load(info, Tokenizer(info.path), options, Recorder()))
    for sequences in map(int, given.sequences.split(",")):
        for name in ("greedy", *SETTINGS):  # the first warms up
            sampling, rates = SETTINGS[name], []
            for device in (True, True) if given.gpu_only else (True, False, True, False):
                begin = DeviceSampler.begin if device else lambda self, sampler, request: None
                with mock.patch.object(DeviceSampler, "begin", begin):
                    rates.append(rate(engine, sampling, sequences, given.new))
            print(
                f"{sequences:3} sequences  {name:10} GPU {max(rates[::2]):8.1f}  CPU {max(rates[1::2]):8.1f} tokens/s",
                flush=True,
            )
    engine.close()


if __name__ == "__main__":
    main()
