"""Doctor's verdicts: old, full or shared GPUs, models that generate nonsense."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fakecuda import Machine

from exl_cli.doctor import extension, gpu, model, probes
from exl_cli.doctor.check_result import CheckResult
from exl_cli.engines.exllamav2.extension import compiled
from exl_cli.engines.exllamav2.extension.compiled import Torch
from exl_cli.system import questions
from exl_cli.system.questions import Answer

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


def test_the_probes_run() -> None:
    """Also where there is no GPU; what asks for more needs it."""
    import torch

    assert probes.kernels()
    if torch.cuda.is_available():  # this process is to use no GPU
        assert questions.ask(probes.__name__, "attention", 120.0).value is not None
    else:
        assert probes.attention()["why_not"]["triton"] == "needs a CUDA GPU"


def cards(*gpus: dict[str, Any]) -> list[CheckResult]:
    return gpu.gpus(Answer({"gpus": list(gpus), "archs": ARCHS, "why_not": ""}), TORCH)


def using(pid: int, name: str = "", size: int | None = None, *, here: bool = True) -> dict[str, Any]:
    return {"pid": pid, "here": here, "name": name, "bytes": size}


@pytest.mark.parametrize(
    ("changes", "status", "message", "fix"),
    [
        ({}, "ok", "NVIDIA H100, sm_90, 79.0 GiB of 80.0 GiB free", ""),
        (
            {"free": GIB // 2, "processes": [using(11), using(4242, "python", 78 * GIB)]},
            "fail",
            "0.5 GiB of 80.0 GiB free: full; also used by python (4242, 78.0 GiB), a process (11)",
            "end the process that uses it (kill 4242), or choose another GPU with CUDA_VISIBLE_DEVICES=NUMBER",
        ),
        # One that cannot be seen from here is not to be killed.
        (
            {"free": GIB // 2, "processes": [using(4242, here=False)]},
            "fail",
            "full; also used by a process (4242)",
            "see what uses it with nvidia-smi, or choose another GPU with CUDA_VISIBLE_DEVICES=NUMBER",
        ),
        ({"free": 30 * GIB}, "warn", "30.0 GiB of 80.0 GiB free", "see what uses it with nvidia-smi"),
        ({"capability": [7, 5]}, "ok", "sm_75", ""),
        ({"capability": [8, 9]}, "ok", "sm_89", ""),
        ({"capability": [12, 1]}, "ok", "sm_121", ""),
        ({"capability": [6, 1]}, "fail", "sm_61: torch 2.11.0+cu130 only supports sm_75, sm_80", "cu126"),
    ],
)
def test_the_line_for_a_gpu(changes: dict[str, Any], status: str, message: str, fix: str) -> None:
    (result,) = cards({**H100, **changes})
    assert (result.status, result.blocks) == (status, "gpu" if status == "fail" else "")
    assert message in result.message
    assert fix in result.fix


def test_one_good_gpu_of_two_is_enough() -> None:
    results = cards({**H100, "free": 0}, {**H100, "index": 1})
    assert [(result.check, result.status, result.blocks) for result in results] == [
        ("GPU 0", "warn", ""),
        ("GPU 1", "ok", ""),
    ]


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ([(0, 1, True, "NVLink")], "NVLink"),
        ([(0, 1, False, "PCIe, through host memory")], "no peer access, copies go through host memory"),
        ([(0, 1, True, None)], "peer access"),
        (
            [(0, 1, True, "NVLink"), (0, 2, True, "PCIe"), (1, 2, True, "PCIe")],
            "NVLink (0-1); PCIe (0-2, 1-2)",
        ),
    ],
)
def test_the_line_for_links_between_gpus(links: list[tuple[int, int, bool, str | None]], message: str) -> None:
    pairs = [{"gpus": [first, second], "peer": peer, "link": link} for first, second, peer, link in links]
    (result,) = gpu.links(Answer({"gpus": [], "links": pairs}))
    assert (result.check, result.status, result.message) == ("GPU links", "ok", message)
    assert gpu.links(Answer({"gpus": [], "links": []})) == []
    assert gpu.links(Answer(None, "it crashed", "error")) == []


def test_torch_that_cannot_be_imported() -> None:
    result = gpu.torch(TORCH, Answer(None, "ImportError: libcudnn.so.9: cannot open shared object file", "error"))
    assert (result.status, result.blocks) == ("fail", "all")
    assert "torch==2.11.0" in result.fix


SLOW = {"decode": "torch", "prefill": "torch", "why_not": {"triton": "no compiler"}}


@pytest.mark.parametrize(
    ("check", "answer", "status", "words"),
    [
        (gpu.decoding, None, "skip", "no GPU"),
        (gpu.decoding, {"why_not": ""}, "ok", "exl's, compiled"),
        (gpu.decoding, {"why_not": "needs compute capability 8.0"}, "warn", "needs compute capability 8.0"),
        (gpu.attention, {"decode": "triton", "prefill": "triton", "why_not": {}}, "ok", "exl's Triton kernels, paged"),
        (
            gpu.attention,
            SLOW,
            "warn",
            "decoding cannot use CUDA graphs (triton: no compiler)",
        ),
    ],
)
def test_kernels_in_words(check: Any, answer: dict[str, Any] | None, status: str, words: str) -> None:
    result = check(answer and Answer(answer))
    assert (result.status, result.blocks) == (status, "")
    assert words in result.message


# --- the extension ----------------------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """nvcc of CUDA 77.1, which no toolkit of this machine has, and nothing compiled."""
    machine = Machine(tmp_path, cuda="77.1", nvcc="77.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(machine.extensions))
    return machine


FUTURE = Torch("2.11.0+cu771", "77.1", None, Path("/nowhere/torch"))


def examine(answer: Answer | None = None) -> dict[str, CheckResult]:
    def try_out(library: Path) -> Answer:
        assert answer is not None
        return answer

    return {result.check: result for result in extension.check(FUTURE, [(9, 0)], try_out)}


def publish(folder: Path) -> Path:
    """An extension that seems to fit."""
    library = folder / "library.so"
    library.write_bytes(b"machine code")
    return compiled.publish(library, FUTURE, ("9.0",))[0]


@pytest.mark.skipif(importlib.util.find_spec("exllamav2_ext") is not None, reason="an extension is installed")
@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (Answer({"gpus": ["H100"]}), "ok", " for sm_90, loads and computes"),
        (
            Answer(None, "ImportError: /x.so: undefined symbol: _ZN3c104goneEi", "error"),
            "warn",
            "built for another torch version (installed: 2.11.0+cu771): undefined symbol _ZN3c104goneEi ({library})",
        ),
        (Answer(None, "crashed (SIGABRT)", "crash"), "warn", "{library}: loading it crashed (SIGABRT)"),
    ],
)
def test_an_extension_that_was_tried(toolkit: Machine, answer: Answer, status: str, words: str) -> None:
    library = publish(toolkit.root)
    result = examine(answer)["Extension"]
    assert result.status == status
    assert words.format(library=library) in result.message
    assert result.fix.startswith("exl build") is (status == "warn")


def test_without_nvcc_nothing_can_be_compiled(toolkit: Machine) -> None:
    nvcc = toolkit.root / "toolkit" / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("77.1", "12.4"))
    results = examine()
    assert results["nvcc"].status == "fail"
    assert "is for CUDA 12.4, but torch 2.11.0+cu771 needs CUDA 77" in results["nvcc"].message
    assert results["nvcc"].fix.endswith("pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]==77.1.*'")
    assert (results["Extension"].status, results["Extension"].blocks) == ("fail", "gpu")
    assert results["Extension"].fix.endswith(" && exl build")


# --- models -----------------------------------------------------------------------------------------------------------

SOUND: dict[str, Any] = {
    "load_seconds": 1.0,
    "perplexity": 20.0,
    "vocabulary": 4096,
    "prompt": [1, 2],
    "tokens": list(range(32)),
    "text": "a story",
    "shortfalls": [0.0] * 32,
    "facts": {},
    "tokens_per_second": 100.0,
}


def about(generated: Answer, compared: Answer, free: int = 79 * GIB, name: str = "fable-7m") -> dict[str, CheckResult]:
    """What is found about a model on a GPU that answers so."""

    def answer(probe: str, arguments: dict[str, Any]) -> Answer:
        assert arguments["model"] == name
        return generated if probe == "generate" and arguments["engine"] == "exllamav2" else compared

    return {result.check: result for result in model.check(name, None, [free], gpu=True, ask=answer)}


def agreement(*shortfalls: float, relative_l2: float = 0.0012) -> Answer:
    below = [*shortfalls, *([0.0] * (32 - len(shortfalls)))]
    distances = {
        "prompt": {"relative_l2": 0.001, "kl": 1e-7},
        "decoding": {"relative_l2": relative_l2, "kl": 2e-6},
    }
    return Answer({"perplexity": 20.1, "shortfalls": below, "distances": distances})


def test_engines_that_agree() -> None:
    results = about(Answer(SOUND), agreement())
    assert results["Fits"].status == results["On the GPU"].status == results["Engines agree"].status == "ok"
    assert results["Engines agree"].message == (
        "on all 32 tokens; logits differ by 0.0012 (relative L2, KL 2e-06) over 256 tokens; "
        "perplexity 20.0 on the GPU, 20.1 on the CPU"
    )


@pytest.mark.parametrize(
    ("compared", "status", "blocks", "words"),
    [
        (agreement(0.0, 0.03, 0.01), "ok", "", "on 30 of 32 tokens, the rest are near ties (at most 0.03 apart)"),
        (agreement(0.0, 0.1, 7.25), "fail", "gpu", "no: on the CPU, the logit of token 3 is 7.2 below the highest; "),
        (agreement(relative_l2=0.07), "warn", "", "but logits differ by 0.07"),
        (Answer(None, "crashed (SIGSEGV)", "crash"), None, "", "comparison failed: crashed (SIGSEGV)"),
    ],
)
def test_engines_that_differ(compared: Answer, status: str | None, blocks: str, words: str) -> None:
    results = about(Answer(SOUND), compared)
    result = results["Engines agree" if status else "On the CPU"]
    assert (result.status, result.blocks) == (status or "warn", blocks)
    assert words in result.message


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def in_this_process(gpu: Path, cpu: Path) -> dict[str, CheckResult]:
    """Both engines are the CPU's, each with another model."""

    def ask(probe: str, arguments: dict[str, Any]) -> Answer:
        folder, given = cpu, {**arguments, **({"engine": "cpu"} if "engine" in arguments else {})}
        if arguments.get("engine") == "exllamav2":
            folder = gpu
        return Answer(getattr(probes, probe)(**{**given, "model": str(folder)}))

    return {result.check: result for result in model.check(str(cpu), None, [79 * GIB], gpu=True, ask=ask)}


def test_a_window_that_an_engine_ignores_shows_in_logits_past_it(gptq_dir: Path, tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    short = {**mistral, "max_position_embeddings": 160}
    without = with_config(gptq_dir, tmp_path / "without", **short, sliding_window=None)
    windowed = with_config(gptq_dir, tmp_path / "windowed", **short, sliding_window=64)
    same = in_this_process(windowed, windowed)["Engines agree"]
    assert same.status == "ok", same.message
    assert "over 128 tokens, beyond the sliding window of 64" in same.message
    assert same.details["distances"]["prompt"]["relative_l2"] < 1e-6
    other = in_this_process(without, windowed)["Engines agree"]
    assert other.status in ("warn", "fail")
    assert other.details["distances"]["prompt"]["relative_l2"] > 0.02
    # Beyond the context, or too much to compute: the text stays within the window.
    (tmp_path / "windowed" / "config.json").unlink()
    long = with_config(gptq_dir, tmp_path / "long", **mistral, sliding_window=1000)
    said = about(Answer(SOUND), agreement(), name=str(long))["Engines agree"].message
    assert "over 256 tokens, within the sliding window of 1,000" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perplexity": None}, "produces NaN"),
        ({"perplexity": 3900.0}, "perplexity 3,900 with a vocabulary of 4,096"),
        ({"tokens": [0] * 32, "text": "!!!!!!!!"}, "repeats one token ('!!!!!!!!'…)"),
    ],
)
def test_nonsense_on_the_gpu(changes: dict[str, Any], words: str) -> None:
    results = about(Answer({**SOUND, **changes}), Answer(SOUND))
    assert results["On the GPU"].status == "fail"
    assert words in results["On the GPU"].message
    # The CPU engine is then asked by itself.
    assert results["On the CPU"].status == "ok"


def test_passes_of_one_engine_that_disagree() -> None:
    bad = Answer({**SOUND, "shortfalls": [0.0, 3.0]})
    result = about(Answer({**SOUND, "perplexity": None}), bad)["Engines agree"]
    assert result.status == "warn"
    assert (
        "its prefill and decoding disagree: in prefill, the logit of token 2 is 3.0 below the highest" in result.message
    )


def test_a_model_whose_weights_are_noise(gptq_dir: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(gptq_dir, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            tensors[name] = torch.randint(-(2**31), 2**31, tensor.shape, generator=random).to(torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = in_this_process(folder, folder)["On the CPU"]
    assert (result.status, result.blocks) == ("fail", "all")
    assert "garbage: perplexity" in result.message


def test_a_missing_model() -> None:
    def ask(probe: str, arguments: dict[str, Any]) -> Answer:
        raise AssertionError(probe)

    (result,) = model.check("fabel-7m", None, [], gpu=False, ask=ask)
    assert (result.status, result.blocks) == ("fail", "all")
    assert (result.message, result.fix) == ("no model named 'fabel-7m'", "did you mean fable-7m?")


def test_a_model_that_does_not_fit_is_not_loaded() -> None:
    results = about(Answer(None, "must not be asked", "error"), Answer(SOUND), free=GIB // 2)
    assert (results["Fits"].status, results["Fits"].blocks) == ("fail", "gpu")
    assert "GiB is free" in results["Fits"].message
    assert "On the GPU" not in results


def test_a_model_that_crashes_the_engine() -> None:
    result = about(Answer(None, "crashed (SIGSEGV)", "crash"), Answer(SOUND))["On the GPU"]
    assert (result.message, result.blocks) == ("crashed (SIGSEGV)", "gpu")
