"""What the smoke test of an attention implementation finds, and when it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import python

from exl_cli.engines.exllamav2.attention import paged
from exl_cli.errors import EngineError

# An implementation of its own: float64, in which nothing is spared, with mistakes on demand.
TRIAL = """
import json, sys
import torch
from exl_cli.engines.exllamav2.attention.paged import Heads, failure

def attend(call):
    seen.append(call.q.shape[1])
    if mistake == "raises":
        raise RuntimeError("first line\\nno kernel image is available")
    if mistake == "fails on the GPU":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nSearch for x.\\nCompile with y.")
    total = int(call.cache_seqlens[0]) + (0 if call.k is None else call.q.shape[1])
    table, size = call.block_table[0].tolist(), call.k_cache.shape[1]
    for position in range(total - call.q.shape[1], total) if call.k is not None else ():
        index = position - total + call.q.shape[1]
        page = table[position // size]
        call.k_cache[page, position % size] = call.k[0, index]
        if mistake != "stores no values":
            call.v_cache[page, position % size] = call.v[0, index]
    k, v = (torch.cat([cache[page] for page in table])[:total].double() for cache in (call.k_cache, call.v_cache))
    if call.k is not None:
        k[-call.q.shape[1]:], v[-call.q.shape[1]:] = call.k[0], call.v[0]
    out, groups = torch.empty_like(call.q), call.q.shape[2] // k.shape[1]
    for i in range(call.q.shape[1]):
        last = total - call.q.shape[1] + i + (mistake == "sees the next token")
        for head in range(call.q.shape[2]):
            scores = k[: last + 1, head // groups] @ call.q[0, i, head].double() * call.scale
            out[0, i, head] = scores.softmax(0) @ v[: last + 1, head // groups]
    return out * float("nan") if mistake == "not a number" else out

found = []
for mistake, heads, decodes in json.loads(sys.argv[1]):
    seen = []
    said = failure(attend, torch.device("cpu"), Heads(*heads), decodes=decodes)
    found.append([said, seen])
print(json.dumps([found, [name for name in ("torch._dynamo", "sympy") if name in sys.modules]]))
"""
# A mistake, the heads, whether decoding is tried; what is said of it, and the tokens of each case that was tried.
CASES = (
    ("", (8, 2, 128), True, "", [40, 1]),
    ("", (4, 4, 80), True, "", [40, 1]),
    ("", (8, 2, 64), False, "", [40]),
    ("raises", (8, 2, 64), True, "fails: no kernel image is available", [40]),
    ("fails on the GPU", (8, 2, 64), True, "fails: CUDA error: an illegal memory access was encountered", [40]),
    ("not a number", (8, 2, 64), True, "computes wrong results", [40]),
    ("sees the next token", (8, 2, 64), True, "computes wrong results", [40]),
    ("stores no values", (8, 2, 64), False, "stores keys and values in wrong places", [40]),
)


def test_it_finds_what_is_wrong_and_does_not_import_torchs_compiler() -> None:
    done = python(TRIAL, json.dumps([case[:3] for case in CASES]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[list(case[3:]) for case in CASES], []]


# A Triton that cannot be imported, and says how often that was tried; the first time it waits until it may go on.
TRITON = """
import builtins
builtins.imports = getattr(builtins, "imports", 0) + 1
if builtins.imports == 1:
    builtins.may_go_on.wait()
raise RuntimeError(f"CUDA out of memory ({builtins.imports})")
"""


def test_who_needs_the_choice_waits_for_a_trial_whose_failure_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(TRITON)
    code = """
import builtins, json, threading
from exl_cli.engines.exllamav2.attention import paged
builtins.may_go_on = threading.Event()
paged.try_ahead()
while not hasattr(builtins, "imports"):
    pass
said = []
waiting = threading.Thread(target=lambda: said.extend([paged.backend(), paged.backend()]))
waiting.start()
waiting.join(0.1)
assert said == []
builtins.may_go_on.set()
waiting.join()
print(json.dumps([[chosen.name, chosen.why_not] for chosen in said]))
"""
    environment = {paged.VARIABLE: "", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = python(code, path=[tmp_path], env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [["torch", "fails: CUDA out of memory (2)"]] * 2


def test_a_name_that_is_wrong_is_said_before_anything_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paged.VARIABLE, "flash")
    with pytest.raises(EngineError, match="EXL_ATTENTION=flash is not known; choose one of triton, torch"):
        paged.try_ahead()
