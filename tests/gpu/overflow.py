"""Whether a model's logits stay finite on our kernels, and how often they choose the token that exllamav2's choose.

    python tests/gpu/overflow.py MODEL... [--positions 300] [--step 8]

For models whose sums pass float16's range. Evaluates random tokens, `step` at a time, through the forward passes of
generation: first on our kernels, then on exllamav2's. Exits with 1 where ours give an infinity or a NaN.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

OURS, THEIRS = "exl", "exllamav2"


class Silent:
    """A `loader.Observer`."""

    def note(self, message: str) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass


def logits(folder: Path, ids: Sequence[int], step: int, kernels: str) -> tuple[torch.Tensor, str]:
    """Of every position, computed by the kernels that EXL_KERNELS names; and what the engine says of them."""
    before = os.environ.get("EXL_KERNELS")
    os.environ["EXL_KERNELS"] = kernels
    try:
        info = loader.resolve(str(folder))
        options = LoadOptions(engine="exllamav2", max_seq_len=len(ids))
        engine = EngineThread(loader.load(info, Tokenizer(info.path), options, Silent()))
    finally:
        del os.environ["EXL_KERNELS"]
        if before is not None:
            os.environ["EXL_KERNELS"] = before
    try:
        return engine.cached_logits(ids, step), engine.facts["kernels"]
    finally:
        engine.close()


def agreement(ours: torch.Tensor, others: torch.Tensor) -> float:
    """The share of positions whose likeliest token is the same."""
    return float((ours.argmax(-1) == others.argmax(-1)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--positions", type=int, default=300)
    parser.add_argument("--step", type=int, default=8)
    args = parser.parse_args()
    failed = False
    for model in args.models:
        vocabulary = loader.resolve(str(model)).config["vocab_size"]
        ids = np.random.default_rng(0).integers(min(1000, vocabulary // 2), vocabulary, args.positions).tolist()
        (ours, kernels), (theirs, other) = (logits(model, ids, args.step, name) for name in (OURS, THEIRS))
        print(f"{model.name}, {args.positions} positions, {args.step} at a time")
        for name, values in ((kernels, ours), (other, theirs)):
            finite = values.isfinite()
            print(f"  {name}: {'all finite' if finite.all() else f'{int((~finite).sum())} logits are not finite'}")
        print(f"  the same likeliest token in {100 * agreement(ours, theirs):.1f} % of positions", flush=True)
        failed |= not bool(ours.isfinite().all())
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
