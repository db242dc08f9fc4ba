"""What the doctor makes of answers: GPUs that are old, full or shared, and models that speak nonsense."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from exl_cli.doctor import extension, gpu, model, probes
from exl_cli.doctor.check_result import CheckResult, verdict
from exl_cli.doctor.probes import Answer
from exl_cli.engines.exllamav2.extension.environment import Torch

TORCH = Torch("2.11.0+cu130", "13.0", None, Path("/nowhere/torch"))
GIB = 2**30
H100 = {
    "index": 0,
    "name": "NVIDIA H100",
    "uuid": "GPU-1",
    "capability": [9, 0],
    "total": 80 * GIB,
    "free": 79 * GIB,
    "processes": [],
}
ARCHS = ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"]


def ask(name: str, seconds: float = 30.0, **arguments: object) -> Answer:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        return probes.ask(name, seconds, arguments, module="doctor_questions")
    finally:
        sys.path.pop(0)


def test_an_answer_comes_whatever_libraries_print() -> None:
    answer = ask("echo", one=1)
    assert answer.value == {"given": {"one": 1}, "path": [str(Path(__file__).parent)]}


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("crash", "crash", "crashed (SIGSEGV)"),
        ("fail", "error", "what is wrong"),
        ("nothing", "error", "ended without an answer"),
    ],
)
def test_a_question_that_ends_badly_is_an_answer_too(name: str, kind: str, problem: str) -> None:
    answer = ask(name)
    assert (answer.value, answer.kind, answer.problem) == (None, kind, problem)


@pytest.mark.parametrize("name", ["torch", "kernels", "attention"])
def test_the_doctors_own_questions_are_answered(name: str) -> None:
    """Also where there is no GPU; what asks for more needs it."""
    assert probes.ask(name, 120.0).value is not None


def test_a_question_that_hangs_is_ended() -> None:
    answer = ask("hang", 0.2)
    assert (answer.kind, answer.problem) == ("hang", "hung: no answer in 0.2 s")


def test_an_exceptions_class_is_left_out() -> None:
    assert Answer(None, "exl_cli.errors.EngineError: too bad: really", "error").said == "too bad: really"
    assert Answer(None, "no class here: but a colon", "error").said == "no class here: but a colon"


def cards(*gpus: dict[str, Any]) -> list[CheckResult]:
    return gpu.gpus(Answer({"gpus": list(gpus), "archs": ARCHS, "why_not": ""}), TORCH)


def test_a_good_gpu() -> None:
    (result,) = cards(H100)
    assert (result.status, result.blocks) == ("ok", "")
    assert result.message == "NVIDIA H100, sm_90, 79.0 GiB of 80.0 GiB free"


def test_a_full_gpu_names_who_fills_it() -> None:
    processes = [
        {"pid": 11, "here": True, "name": "", "bytes": None},
        {"pid": 4242, "here": True, "name": "python", "bytes": 78 * GIB},
    ]
    (result,) = cards({**H100, "free": GIB // 2, "processes": processes})
    assert (result.status, result.blocks) == ("fail", "gpu")
    assert "0.5 GiB of 80.0 GiB free: full; also used by python (4242, 78.0 GiB), a process (11)" in result.message
    assert "kill 4242" in result.fix
    assert "CUDA_VISIBLE_DEVICES" in result.fix


def test_a_process_that_cannot_be_seen_from_here_is_not_to_be_killed() -> None:
    processes = [{"pid": 4242, "here": False, "name": "", "bytes": 78 * GIB}]
    (result,) = cards({**H100, "free": GIB // 2, "processes": processes})
    assert "kill" not in result.fix
    assert "nvidia-smi" in result.fix


def test_a_crowded_gpu_is_a_warning() -> None:
    (result,) = cards({**H100, "free": 30 * GIB})
    assert (result.status, result.blocks) == ("warn", "")


@pytest.mark.parametrize(("capability", "fits"), [([7, 5], True), ([8, 9], True), ([12, 1], True), ([6, 1], False)])
def test_whether_torch_holds_code_for_a_gpu(capability: list[int], fits: bool) -> None:
    (result,) = cards({**H100, "capability": capability})
    assert (result.status == "ok") is fits
    if not fits:
        assert "sm_61: torch 2.11.0+cu130 holds code for sm_75, sm_80" in result.message
        assert "cu126" in result.fix


def test_one_good_gpu_of_two_is_enough() -> None:
    results = cards({**H100, "free": 0}, {**H100, "index": 1})
    assert [result.check for result in results] == ["GPU 0", "GPU 1"]
    assert verdict(results) == "gpu"


def test_torch_that_cannot_be_imported() -> None:
    result = gpu.torch(TORCH, Answer(None, "ImportError: libcudnn.so.9: cannot open shared object file", "error"))
    assert (result.status, result.blocks) == ("fail", "all")
    assert "torch==2.11.0" in result.fix


def test_the_verdict() -> None:
    fine, no_gpu, nothing = (CheckResult("x", "ok", "", blocks=blocks) for blocks in ("", "gpu", "all"))  # type: ignore[arg-type]
    assert verdict([fine]) == "gpu"
    assert verdict([fine, no_gpu]) == "cpu"
    assert verdict([no_gpu, nothing]) == "none"


def test_decoding_kernels_in_words() -> None:
    assert gpu.decoding(None).status == "skip"
    assert gpu.decoding(Answer({"why_not": ""})).status == "ok"
    old = gpu.decoding(Answer({"why_not": "the GPU is older than compute capability 8.0"}))
    assert (old.status, old.blocks) == ("warn", "")
    assert "8.0" in old.message


def test_attention_in_words() -> None:
    fast = gpu.attention(Answer({"decode": "triton", "prefill": "triton", "why_not": {}}))
    assert (fast.status, fast.message) == ("ok", "exl's Triton kernels, paged")
    slow = gpu.attention(Answer({"decode": "torch", "prefill": "torch", "why_not": {"triton": "no compiler"}}))
    assert slow.status == "warn"
    assert "slow on long contexts" in slow.message
    assert "triton: no compiler" in slow.message


def test_the_typical_files_are_those_of_exllamav2() -> None:
    # exllamav2 0.3.2's ext.py lists 47 sources, of which 28 are CUDA; the library is one more.
    assert len(extension._TYPICAL) == 48
    assert sum(".cuda." in name for name in extension._TYPICAL) == 28


# --- models -----------------------------------------------------------------------------------------------------------

SOUND = {
    "load_seconds": 1.0,
    "perplexity": 20.0,
    "vocabulary": 4096,
    "prompt": [1, 2],
    "tokens": list(range(32)),
    "text": "a story",
    "facts": {},
    "tokens_per_second": 100.0,
}


def about(generated: Answer, compared: Answer, free: int = 79 * GIB) -> dict[str, CheckResult]:
    """What is found about fable-7m on a GPU that answers so."""

    def answer(name: str, seconds: float, arguments: dict[str, Any]) -> Answer:
        assert arguments["model"] == "fable-7m"
        return generated if name == "generate" and arguments["engine"] == "exllamav2" else compared

    results = model.check("fable-7m", None, [free], gpu=True, ask=answer, seconds=1.0)
    return {result.check: result for result in results}


def agreement(*shortfalls: float) -> Answer:
    below = [*shortfalls, *([0.0] * (32 - len(shortfalls)))]
    return Answer({"perplexity": 20.1, "shortfalls": below, "vocabulary": 4096})


def test_engines_that_agree() -> None:
    results = about(Answer(SOUND), agreement())
    assert results["Fits"].status == results["On the GPU"].status == results["Engines agree"].status == "ok"
    assert results["Engines agree"].message.startswith("on all 32 tokens; perplexity 20.0 on the GPU, 20.1 on the CPU")


def test_near_ties_are_no_disagreement() -> None:
    result = about(Answer(SOUND), agreement(0.0, 0.03, 0.01))["Engines agree"]
    assert result.status == "ok"
    assert "on 30 of 32 tokens, the others near ties (0.03 below)" in result.message


def test_engines_that_disagree() -> None:
    result = about(Answer(SOUND), agreement(0.0, 0.1, 7.25))["Engines agree"]
    assert (result.status, result.blocks) == ("fail", "gpu")
    assert "token 3 is 7.2 below" in result.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perplexity": None}, "computes NaN"),
        ({"perplexity": 3900.0}, "hesitates between 3,900 of 4,096 tokens"),
        ({"tokens": [0] * 32, "text": "!!!!!!!!"}, "repeats one token ('!!!!!!!!'…)"),
    ],
)
def test_nonsense_on_the_gpu(changes: dict[str, Any], words: str) -> None:
    results = about(Answer({**SOUND, **changes}), Answer(SOUND))
    assert results["On the GPU"].status == "fail"
    assert words in results["On the GPU"].message
    # The CPU engine is then asked by itself.
    assert results["On the CPU"].status == "ok"


def test_a_model_that_does_not_fit_is_not_loaded() -> None:
    results = about(Answer(None, "must not be asked", "error"), Answer(SOUND), free=GIB // 2)
    assert (results["Fits"].status, results["Fits"].blocks) == ("fail", "gpu")
    assert "GiB are free" in results["Fits"].message
    assert "On the GPU" not in results


def test_a_model_that_crashes_the_engine() -> None:
    results = about(Answer(None, "crashed (SIGSEGV)", "crash"), Answer(SOUND))
    assert results["On the GPU"].message == "crashed (SIGSEGV)"
    assert verdict(list(results.values())) == "cpu"
