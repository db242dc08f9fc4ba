"""Attention over pages, on the CPU: plain torch directly, the Triton kernels through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paged_in_interpreter import CASES
from pagedcases import TOLERANCE, Built, Case, attention

from exl_cli.engines.exllamav2.attention import paged
from exl_cli.errors import EngineError

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", CASES)
def test_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paged.VARIABLE, "torch")
    built = Built(CASES[name])
    assert built.check(built.run()) <= TOLERANCE


def test_a_sequence_without_keys_gets_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paged.VARIABLE, "torch")
    built = Built(Case((1, 5), fresh=False))
    built.lengths[0] = 0
    out = built.run()
    assert not out[0].any()
    assert out[1].isfinite().all()


def test_a_window_is_what_transformers_calls_one() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    case = Case((40,), q_len=40, heads=2, kv_heads=2, dim=64, window=7)
    built = Built(case)
    k, v = built.sequences[0]
    allowed = sliding_window_causal_mask_function(case.window)
    mask = torch.tensor([[bool(allowed(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(40)] for q in range(40)])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.float().transpose(0, 1) for t in (built.q[0], k, v)), attn_mask=mask
    ).transpose(0, 1)
    torch.testing.assert_close(attention(built.q[0], k, v, case), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(built.run()[0].float(), expected, rtol=0.01, atol=0.002)


@pytest.fixture(scope="session")
def errors() -> dict[str, float]:
    """Of the Triton kernels, by case."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import numpy as np
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("this Triton's interpreter does not run on NumPy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", paged.VARIABLE: "triton"}
    done = subprocess.run(
        [sys.executable, str(HERE / "paged_in_interpreter.py")],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_triton(name: str, errors: dict[str, float]) -> None:
    assert errors[name] <= TOLERANCE


def test_what_is_in_use_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(paged.VARIABLE, raising=False)
    chosen = paged.backend(torch.device("cpu"))
    assert (str(chosen), chosen.captures) == ("torch", False)
    assert chosen.why_not == ("needs a CUDA GPU" if importlib.util.find_spec("triton") else "not installed")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_wish_that_cannot_be_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paged.VARIABLE, "triton")
    with pytest.raises(EngineError) as raised:
        paged.backend(torch.device("cpu"))
    assert str(raised.value) == "EXL_ATTENTION=triton cannot be had: needs a CUDA GPU; unset EXL_ATTENTION"
