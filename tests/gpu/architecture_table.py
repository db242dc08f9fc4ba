"""Every kind of tiny model on one engine against transformers' float32 logits.

    PYTHONPATH=.:tests python tests/gpu/architecture_table.py [--only GLOB] [--format FORMAT] [--engine cpu]
                                                              [--folders DIR]

prints a line for each: relative L2 of the logits, the whole prompt at once and token by token through the cache,
how many greedy tokens are transformers', and whose kernels ran; or the sentence with which the engine refuses.
`--folders` takes models and expected values that `python tests/architectures.py DIR` has written.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import torch
from helpers import Recorder, collect, request_for

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.errors import ExlError
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer

# A greedy choice may fall otherwise where the second best is closer than this part of the logits' spread.
NEAR_TIE = 0.05


@dataclass
class Row:
    """How a kind fares.

    Attributes:
        prefill, decode: relative L2 of the logits, the worst prompt's.
        tokens: greedy tokens that are transformers', all prompts together.
        new_tokens: how many were asked for.
        parted: where a continuation parts from transformers', the largest gap there to its second choice, as a part
            of the logits' spread; 0 where none parts.
        kernels: whose ran.
        refusal: the engine's sentence, instead of all these.
    """

    kind: str
    fmt: str
    prefill: float = 0.0
    decode: float = 0.0
    tokens: int = 0
    new_tokens: int = 0
    parted: float = 0.0
    kernels: str = ""
    refusal: str = ""

    def __str__(self) -> str:
        name = f"{self.kind:26} {self.fmt:8}"
        if self.refusal:
            return f"{name} refused: {self.refusal}"
        parted = f", parted at a gap of {self.parted:.4f}" if self.parted else ""
        wrong = "" if self.right() else "  WRONG"
        figures = f"{self.prefill:8.5f} {self.decode:8.5f} {self.tokens:3}/{self.new_tokens}{parted}"
        return f"{name} {figures}  {self.kernels}{wrong}"

    def right(self) -> bool:
        # "dynamic" embeddings go by steps of a sixteenth of the length (`Rope.switches`), and random weights show it.
        coarser = 5 if self.kind == "llama-dynamic" else 1
        return max(self.prefill, self.decode) <= 0.01 * coarser and self.parted <= NEAR_TIE * coarser


def measure(kind: str, fmt: str, folder: Path, expected: dict[str, Any], engine: str = "exllamav2") -> Row:
    """Load a folder and compare.

    Args:
        kind, fmt: what it holds.
        folder: as `architectures.make` writes it.
        expected: as `architectures.expected` computes it.
        engine: as `LoadOptions` names it.
    """
    row = Row(kind, fmt)
    try:
        info = loader.resolve(str(folder))
        options = LoadOptions(engine=engine, max_seq_len=architectures.CONTEXT)
        loaded = loader.load(info, Tokenizer(info.path), options, Recorder())
    except ExlError as error:
        row.refusal = f"{type(error).__name__}: {error}"
        return row
    thread = EngineThread(loaded)
    row.kernels = str(thread.facts.get("kernels", ""))
    try:
        for i in range(len(architectures.LENGTHS)):
            _compare(row, thread, *(expected.get(f"{key}{i}") for key in ("ids", "logits", "steps", "greedy", "gaps")))
    except ExlError as error:
        row.refusal = f"{type(error).__name__}: {error}"
    finally:
        thread.close()
    return row


def _compare(row: Row, thread: EngineThread, ids: Any, logits: Any, steps: Any, greedy: Any, gaps: Any) -> None:
    row.prefill = max(row.prefill, relative_l2(thread.logits(ids.tolist()), logits))
    # Where the embedding depends on the length, earlier keys were made for a shorter text: the text below shows those.
    if steps is None or len(ids) < architectures.ORIGINAL:
        row.decode = max(row.decode, relative_l2(thread.cached_logits(ids.tolist(), 1), logits))
    tokens = collect(thread.stream(request_for(ids.tolist(), "greedy", len(greedy))))[1]
    same = next((at for at, (a, b) in enumerate(zip(tokens, greedy, strict=False)) if a != b), len(greedy))
    row.tokens, row.new_tokens = row.tokens + same, row.new_tokens + len(greedy)
    if same < len(greedy):
        row.parted = max(row.parted, float(gaps[same] / logits.std()))


def relative_l2(actual: torch.Tensor, expected: Any) -> float:
    wanted = torch.as_tensor(expected)
    error = torch.linalg.vector_norm(actual[:, : wanted.shape[1]] - wanted) / torch.linalg.vector_norm(wanted)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def rows(only: str, formats: list[str], engine: str, folders: Path | None) -> Any:
    """A `Row` for each kind and format, as they are measured."""
    with tempfile.TemporaryDirectory() as temporary:
        for kind in fnmatch.filter(architectures.KINDS, only):
            for fmt in formats:
                if folders is None:
                    folder = architectures.make(kind, Path(temporary) / f"{kind}-{fmt}", fmt)
                    expected: dict[str, Any] = architectures.expected(kind, fmt)
                else:
                    folder = folders / f"{kind}-{fmt}"
                    with np.load(folder / "expected.npz") as arrays:
                        expected = dict(arrays)
                yield measure(kind, fmt, folder, expected, engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="names of kinds, as a glob")
    parser.add_argument("--format", choices=architectures.FORMATS, action="append", help="all three where not given")
    parser.add_argument("--engine", default="exllamav2", choices=("exllamav2", "cpu"))
    parser.add_argument("--folders", type=Path, help="written before by tests/architectures.py")
    args = parser.parse_args()
    architectures.quiet()
    start, right, wrong, refused = time.monotonic(), 0, 0, 0
    print(f"{'kind':26} {'format':8} {'prefill':>8} {'decode':>8} greedy  kernels")
    for row in rows(args.only, args.format or list(architectures.FORMATS), args.engine, args.folders):
        print(row, flush=True)
        right += not row.refusal and row.right()
        wrong += not row.refusal and not row.right()
        refused += bool(row.refusal)
    print(f"{right} right, {wrong} wrong, {refused} refused, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
