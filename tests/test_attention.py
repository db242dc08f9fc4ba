"""Attention in torch and in Triton's interpreter, and the smoke test that chooses between them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from paged_in_interpreter import CASES
from pagedcases import TOLERANCE, Built, Case
from torch import Tensor

from exl_cli.engines.exllamav2.attention import paged
from exl_cli.engines.exllamav2.attention.causal import causal_attention
from exl_cli.engines.exllamav2.attention.paged import Call, Heads
from exl_cli.errors import EngineError

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def by_definition(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int, softcap: float) -> np.ndarray:
    """Softmax attention in float64. Shapes [batch, len, heads, dim]; keys and values may have fewer heads."""
    out = np.zeros(q.shape)
    position, groups = np.arange(k.shape[1]), q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(*q.shape[:3]):
        at = k.shape[1] - q.shape[1] + i
        scores = k[b, :, h // groups] @ q[b, i, h] * scale
        if softcap:
            scores = np.tanh(scores / softcap) * softcap
        hidden = (position > at) | (window > 0) & (position <= at - window)
        weights = np.exp(np.where(hidden, -np.inf, scores - scores[~hidden].max()))
        out[b, i, h] = weights / weights.sum() @ v[b, :, h // groups]
    return out


@pytest.mark.parametrize(
    ("q_len", "k_len", "heads", "kv_heads", "dim", "window", "softcap"),
    [
        (9, 9, 4, 4, 64, 0, 0.0),
        (9, 9, 4, 2, 64, 0, 0.0),
        (1, 13, 8, 1, 80, 0, 0.0),
        (5, 17, 4, 2, 128, 0, 0.0),
        (12, 12, 2, 2, 64, 4, 0.0),
        (6, 20, 4, 2, 64, 5, 0.0),
        (1, 20, 4, 2, 64, 5, 0.0),
        (8, 8, 4, 2, 256, 64, 0.0),
        (7, 11, 4, 2, 64, 0, 30.0),
        (1, 11, 4, 2, 64, 0, 30.0),
        (7, 20, 4, 2, 96, 6, 30.0),
        (1, 1, 4, 2, 64, 0, 0.0),
    ],
)
def test_causal_attention_is_attention(
    q_len: int, k_len: int, heads: int, kv_heads: int, dim: int, window: int, softcap: float
) -> None:
    rng = np.random.default_rng(q_len * dim)
    q = rng.normal(size=(3, q_len, heads, dim)) * 2
    k, v = (rng.normal(size=(3, k_len, kv_heads, dim)) for _ in range(2))
    tensors = (torch.from_numpy(x).float() for x in (q, k, v))
    actual = causal_attention(*tensors, dim**-0.5, window=window, softcap=softcap)
    expected = by_definition(q, k, v, dim**-0.5, window, softcap)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_pages_in_plain_torch(name: str) -> None:
    built = Built(CASES[name])
    assert built.check(paged.attend_in_torch(built.call())) <= TOLERANCE


@pytest.fixture(scope="session")
def errors() -> dict[str, float]:
    """Of the Triton kernels, by case."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("this Triton's interpreter does not run on NumPy 2.4")
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "paged_in_interpreter.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_pages_by_triton(name: str, errors: dict[str, float]) -> None:
    assert errors[name] <= TOLERANCE


def test_a_sequence_without_keys_gets_zeros() -> None:
    built = Built(Case((1, 5), fresh=False))
    built.lengths[0] = 0
    out = paged.attend_in_torch(built.call())
    assert not out[0].any()
    assert out[1].isfinite().all()


def mistaken(call: Call, mistake: str) -> Tensor:
    """A call computed key by key in float64, sparing nothing, with a mistake."""
    if mistake == "raises":
        raise RuntimeError("first line\nno kernel image is available")
    if mistake == "fails on the GPU":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for x.\nCompile with y.")
    table, size, new = call.block_table[0].tolist(), call.k_cache.shape[1], call.q.shape[1]
    total = int(call.cache_seqlens[0])
    if call.k is not None and call.v is not None:
        for index in range(new):
            page, place = table[(total + index) // size], (total + index) % size
            call.k_cache[page, place] = call.k[0, index]
            call.v_cache[page, place] = call.v[0, index]
        total += new
    if mistake == "stores too much":
        call.v_cache[table[total // size], total % size] = 0
    k, v = (torch.cat([cache[page] for page in table]).double() for cache in (call.k_cache, call.v_cache))
    out, groups = torch.empty_like(call.q), call.q.shape[2] // k.shape[1]
    for i, head in np.ndindex(*call.q.shape[1:3]):
        seen = total - new + i + 1 + (mistake == "sees the next token")
        scores = k[:seen, head // groups] @ call.q[0, i, head].double() * call.scale
        out[0, i, head] = scores.softmax(0) @ v[:seen, head // groups]
    return out * float("nan") if mistake == "not a number" else out


@pytest.mark.parametrize(
    ("mistake", "heads", "said"),
    [
        ("", (4, 2, 128), ""),
        ("", (4, 4, 80), ""),
        ("raises", (4, 2, 64), "fails: no kernel image is available"),
        ("fails on the GPU", (4, 2, 64), "fails: CUDA error: an illegal memory access was encountered"),
        ("not a number", (4, 2, 64), "computes wrong results"),
        ("sees the next token", (4, 2, 64), "computes wrong results"),
        ("stores too much", (4, 2, 64), "stores keys and values in wrong places"),
    ],
)
def test_the_smoke_test_explains_its_failure(mistake: str, heads: tuple[int, int, int], said: str) -> None:
    assert paged.failure(lambda call: mistaken(call, mistake), CPU, Heads(*heads)) == said


def test_who_needs_the_choice_waits_for_a_trial_whose_failure_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Triton that cannot be imported, the first time only after a while."""
    (tmp_path / "triton.py").write_text("import builtins\nbuiltins.import_triton()\n")
    importing, may_go_on, imports = threading.Event(), threading.Event(), []

    def import_triton() -> None:
        imports.append(threading.current_thread())
        importing.set()
        assert may_go_on.wait(20)
        raise RuntimeError(f"CUDA out of memory ({len(imports)})")

    monkeypatch.setattr("builtins.import_triton", import_triton, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(paged.VARIABLE, raising=False)
    heads, chosen = Heads(8, 2, 72), []
    paged.try_ahead(heads)
    assert importing.wait(20)
    waiting = threading.Thread(target=lambda: chosen.extend([paged.backend(heads=heads), paged.backend(heads=heads)]))
    waiting.start()
    waiting.join(0.1)
    assert not chosen
    may_go_on.set()
    waiting.join()
    assert [(each.name, each.why_not) for each in chosen] == [("torch", "fails: CUDA out of memory (2)")] * 2


def test_what_is_in_use_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(paged.VARIABLE, raising=False)
    chosen = paged.backend(CPU)
    assert (str(chosen), chosen.captures) == ("torch", False)
    assert chosen.why_not == ("needs a CUDA GPU" if importlib.util.find_spec("triton") else "not installed")


def test_a_wish_that_cannot_be_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paged.VARIABLE, "flash")
    with pytest.raises(EngineError, match="unknown value EXL_ATTENTION=flash; choose one of triton, torch"):
        paged.try_ahead()  # at once
    monkeypatch.setenv(paged.VARIABLE, "triton")
    reason = "needs a CUDA GPU" if importlib.util.find_spec("triton") else "not installed"
    with pytest.raises(EngineError, match=f"^EXL_ATTENTION=triton is not available: {reason}; unset EXL_ATTENTION$"):
        paged.backend(CPU)
