"""What a trial of an attention implementation finds, and what it does not bring along."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# An implementation of its own: float32, in which nothing is spared, with mistakes on demand.
TRIAL = """
import json, sys
import torch
from exl_cli.engines.exllamav2 import attention_trial, paged_backends as backends

def attend(call):
    seen.append(call.q.shape[1])
    if mistake == "raises":
        raise RuntimeError("first line\\nno kernel image is available")
    total = int(call.cache_seqlens[0]) + (0 if call.k is None else call.q.shape[1])
    table, size = call.block_table[0].tolist(), call.k_cache.shape[1]
    for position in range(total - call.q.shape[1], total) if call.k is not None else ():
        index = position - total + call.q.shape[1]
        call.k_cache[table[position // size], position % size] = call.k[0, index]
        call.v_cache[table[position // size], position % size] = call.v[0, index]
    k, v = (torch.cat([cache[page] for page in table])[:total].double() for cache in (call.k_cache, call.v_cache))
    out, groups = torch.empty_like(call.q), call.q.shape[2] // k.shape[1]
    for i in range(call.q.shape[1]):
        last = total - call.q.shape[1] + i + (mistake == "sees the next token")
        for head in range(call.q.shape[2]):
            scores = k[: last + 1, head // groups] @ call.q[0, i, head].double() * call.scale
            out[0, i, head] = scores.softmax(0) @ v[: last + 1, head // groups]
    return out * float("nan") if mistake == "not a number" else out

mistake, heads, decodes = json.loads(sys.argv[1])
seen = []
backends.IMPLEMENTATIONS["mine"] = backends.Implementation(attend, lambda device: "", lambda call: "")
said = attention_trial.failure("mine", torch.device("cpu"), attention_trial.Heads(*heads), decodes=decodes)
print(json.dumps([said, seen, [name for name in ("torch._dynamo", "sympy") if name in sys.modules]]))
"""


def trial(mistake: str = "", heads: tuple[int, int, int] = (8, 2, 64), *, decodes: bool = True) -> list[object]:
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", TRIAL, json.dumps([mistake, heads, decodes])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("heads", [(8, 2, 128), (4, 4, 80)])
def test_what_is_right_passes_and_torchs_compiler_is_not_imported(heads: tuple[int, int, int]) -> None:
    assert trial(heads=heads) == ["", [40, 1], []]


def test_decoding_is_not_tried_where_something_else_does_it() -> None:
    assert trial(decodes=False) == ["", [40], []]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("raises", "fails: no kernel image is available"),
        ("not a number", "computes wrong results"),
        ("sees the next token", "computes wrong results"),
    ],
)
def test_mistakes(mistake: str, said: str) -> None:
    assert trial(mistake)[0] == said
