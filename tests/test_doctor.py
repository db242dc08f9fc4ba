"""`exl doctor` as a user meets it: on this machine, and on one that `fakecuda` stands for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
from fakecuda import HAS_COMPILERS, Machine, compile_module, module_source
from fakehub import FakeHub
from helpers import exl

from exl_cli.doctor import machine as machine_checks
from exl_cli.doctor import model, probes
from exl_cli.doctor.check_result import CheckResult
from exl_cli.errors import ExitCode

no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
compilers = pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")


def examine(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What `--json` prints, its findings by name."""
    assert "Traceback" not in result.stderr
    report = json.loads(result.stdout)
    assert report["exit_code"] == result.returncode
    return {**report, "findings": {finding["check"]: finding for finding in report["findings"]}}


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return examine(exl("doctor", "--json", env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}))


@no_gpu
def test_a_machine_without_a_gpu_runs_models_on_the_cpu(here: dict[str, Any]) -> None:
    assert here["verdict"] == "cpu"
    assert here["exit_code"] == ExitCode.CPU_ONLY == 12
    assert here["summary"] == "exl run works on the CPU only: Driver: no NVIDIA GPU here"
    assert here["findings"]["CPU engine"]["status"] == "ok"
    assert here["findings"]["Python"]["details"]["executable"] == sys.executable
    assert all(finding["status"] != "fail" for finding in here["findings"].values())


def test_no_network_is_a_finding_and_no_obstacle(here: dict[str, Any]) -> None:
    hub = here["findings"]["Hub"]
    assert hub["status"] == "warn"
    assert "http://127.0.0.1:9 cannot be reached" in hub["found"]
    assert "refused" in hub["found"]
    assert hub["blocks"] is None


def test_nothing_heavy_is_imported_by_the_one_who_asks() -> None:
    heavy = ("torch", "transformers", "exllamav2", "huggingface_hub", "triton", "tokenizers")
    code = f"""
import sys
from exl_cli.cli.app import app
try:
    app(["doctor", "--timeout", "0.1"])
except SystemExit:
    pass
print(sorted(set({heavy!r}) & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]"


def test_what_hangs_is_a_finding_and_the_rest_is_looked_at() -> None:
    report = examine(exl("doctor", "--json", "--timeout", "0.1"))
    assert report["verdict"] == "none"
    assert report["exit_code"] == ExitCode.CANNOT_RUN == 13
    assert "hung: no answer in 0.1 s" in report["findings"]["torch"]["found"]
    assert "--timeout" in report["findings"]["torch"]["fix"]
    assert report["findings"]["Models folder"]["status"] == "ok"


def test_ctrl_c_ends_the_questions_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write("torch/__init__.py", "import time\ntime.sleep(600)\n")
    child = pexpect.spawn(
        sys.executable, ["-m", "exl_cli", "doctor"], env=machine.environment, encoding="utf-8", timeout=20
    )
    child.expect("checking torch")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert "Traceback" not in str(child.before)


def test_the_checklist_on_a_terminal() -> None:
    # Those who run tests side by side say what width they have.
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "COLORTERM", "NO_COLOR")}
    child = pexpect.spawn(
        sys.executable,
        ["-m", "exl_cli", "doctor", "--timeout", "0.1"],
        encoding="utf-8",
        timeout=30,
        dimensions=(60, 70),
        env={**kept, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    )
    child.expect(pexpect.EOF)
    child.close()
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", str(child.before))
    # The line about what is being waited for is drawn and wiped again between the others.
    lines = re.split(r"[\r\n]+", screen)
    assert re.match(r"✓ Python {10}3\.\d+", lines[0])
    assert any(re.match(r"✗ torch {11}", line) for line in lines)
    # A long finding goes on below itself; a command is never broken, so that it can be copied.
    assert " " * 18 + "→ exl doctor --timeout 300, in case this machine is slow" in lines
    terminal = next(line for line in lines if "Terminal" in line)
    assert terminal == "✓ Terminal        xterm-256color, 256 colours, 70 columns, UTF-8"
    assert child.exitstatus == 13


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "words", "status"),
    [("", "answers, not logged in", "ok"), ("hf_bad", "does not accept the token", "warn")],
)
def test_the_hub_and_the_login(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, words: str, status: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", token)
    answer = probes.ask("hub", 30, {"timeout": 10})
    assert answer.value is not None, answer.problem
    result = machine_checks.hub(answer)
    assert words in result.message
    assert result.status == status


# --- with a model -----------------------------------------------------------------------------------------------------


def look_at(path: Path | str) -> dict[str, CheckResult]:
    """What is found about a model, for real, in child processes."""
    results = model.check(str(path), None, [], gpu=False, ask=probes.ask, seconds=60)
    return {result.check: result for result in results}


def test_a_sound_model() -> None:
    results = look_at("fable-7m")
    assert "EXL2 5.0 bpw" in results["Model"].message
    assert results["On the CPU"].status == "ok"
    # The perplexity of children's English in a model of children's stories.
    assert 5 < results["On the CPU"].details["perplexity"] < 60
    assert len(results["On the CPU"].details["tokens"]) == model.NEW_TOKENS


def test_a_model_whose_weights_are_noise(gptq_dir: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(gptq_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            tensors[name] = torch.randint(-(2**31), 2**31, tensor.shape, generator=random).to(torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = look_at(folder)["On the CPU"]
    assert (result.status, result.blocks) == ("fail", "all")
    assert "nonsense: it hesitates between" in result.message


def test_a_model_that_is_not_here() -> None:
    result = look_at("fabel-7m")["Model"]
    assert (result.status, result.blocks) == ("fail", "all")
    assert result.message == "no model named 'fabel-7m'"
    assert result.fix == "did you mean fable-7m?"


# --- a GPU machine that is not ready ----------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpus="9.0")


def look(machine: Machine, **variables: str) -> dict[str, Any]:
    return dict(examine(machine.run("doctor", "--json", **variables))["findings"])


@compilers
def test_before_the_build_and_after(machine: Machine) -> None:
    before = look(machine)
    assert before["GPU 0"]["status"] == "ok"
    assert before["Extension"]["status"] == "warn"
    assert "not compiled yet; exl run compiles it first" in before["Extension"]["found"]
    assert re.match(r"exl build \(about \d+ min with \d+ jobs?\)", before["Extension"]["fix"])
    assert before["nvcc"]["found"].startswith("13.0, ")
    assert machine.run("build").returncode == 0
    after = look(machine)
    assert after["Extension"]["status"] == "ok"
    assert "for sm_90, loads and computes" in after["Extension"]["found"]


@compilers
def test_no_nvcc(tmp_path: Path) -> None:
    results = look(Machine(tmp_path, cuda="77.1", nvcc="12.4", gpus="9.0"))
    assert results["nvcc"]["status"] == "fail"
    assert "is of CUDA 12.4, and torch 2.11.0+cu771 needs CUDA 77" in results["nvcc"]["found"]
    assert results["nvcc"]["fix"].endswith("pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]==77.1.*'")
    assert results["Extension"]["status"] == "fail"
    assert results["Extension"]["fix"].endswith(" && exl build")
    assert results["Extension"]["blocks"] == "gpu"


@compilers
def test_an_extension_of_another_abi(machine: Machine) -> None:
    source = module_source("namespace c10 { int gone(int); }", init="c10::gone(1);")
    library = compile_module(source, machine.site / "exllamav2_ext.so")
    results = look(machine)
    assert (
        "built for another torch (here: 2.11.0+cu130): undefined symbol _ZN3c104goneEi" in results["Extension"]["found"]
    )
    assert str(library) in results["Extension"]["found"]
    assert results["Extension"]["fix"].startswith("exl build")


@compilers
def test_an_extension_that_crashes_and_a_flash_attn_that_is_left_alone(machine: Machine) -> None:
    compile_module(module_source("#include <cstdlib>", init="abort();"), machine.site / "exllamav2_ext.so")
    machine.write("flash_attn/__init__.py", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    results = look(machine)
    assert "loading it crashed (SIGABRT)" in results["Extension"]["found"]
    assert (results["flash-attn"]["status"], results["flash-attn"]["found"]) == (
        "skip",
        "of unknown version; exl does without",
    )
