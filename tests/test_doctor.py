"""`exl doctor` on this machine, and on a simulated one (`fakecuda`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest
from fakecuda import HAS_COMPILERS, Machine, compile_module, module_source
from fakehub import FakeHub
from helpers import exl, python

from exl_cli.doctor import machine as machine_checks
from exl_cli.doctor import probes
from exl_cli.errors import ExitCode
from exl_cli.system import questions

no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")


def examine(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What `--json` prints, its findings by name."""
    assert "Traceback" not in result.stderr
    report = json.loads(result.stdout.splitlines()[0])
    return {**report, "findings": {finding["check"]: finding for finding in report["findings"]}}


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    result = exl("doctor", "fable-7m", "--json", env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    report = examine(result)
    assert report["exit_code"] == result.returncode
    return report


@no_gpu
def test_a_machine_without_a_gpu_runs_models_on_the_cpu(here: dict[str, Any]) -> None:
    assert here["verdict"] == "cpu"
    assert here["exit_code"] == ExitCode.CPU_ONLY == 12
    assert here["summary"] == "exl run works on the CPU only (Driver: no NVIDIA GPU found)"
    assert here["findings"]["CPU engine"]["status"] == "ok"
    assert here["findings"]["Python"]["details"]["executable"] == sys.executable
    assert all(finding["status"] != "fail" for finding in here["findings"].values())
    model = here["findings"]["On the CPU"]
    # The perplexity of children's English in a model of children's stories.
    assert 5 < model["details"]["perplexity"] < 60
    assert len(model["details"]["tokens"]) == 32
    alone = here["findings"]["Engines agree"]
    assert alone["status"] == "skip"
    assert alone["found"] == ("skipped: only the CPU can run it; its prefill and decoding agree on all 32 tokens")


def test_no_network_is_a_finding_and_no_obstacle(here: dict[str, Any]) -> None:
    hub = here["findings"]["Hub"]
    assert hub["status"] == "warn"
    assert "cannot reach http://127.0.0.1:9" in hub["found"]
    assert "refused" in hub["found"]
    assert hub["blocks"] is None


def test_a_hang_is_a_result_and_the_parent_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "exllamav2", "huggingface_hub", "triton", "tokenizers")
    code = f"""
import sys
from exl_cli.cli.app import app
try:
    app(["doctor", "--json", "--timeout", "0.1"])
except SystemExit as end:
    print(end.code)
print(sorted(set({heavy!r}) & set(sys.modules)))
"""
    done = python(code)
    report = examine(done)
    assert report["verdict"] == "none"
    assert report["exit_code"] == ExitCode.CANNOT_RUN == 13
    assert "timed out after 0.1 s" in report["findings"]["torch"]["found"]
    assert "--timeout" in report["findings"]["torch"]["fix"]
    assert report["findings"]["Models folder"]["status"] == "ok"
    assert done.stdout.splitlines()[-2:] == ["13", "[]"]


def test_ctrl_c_ends_the_questions_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write("torch/__init__.py", "import time\ntime.sleep(600)\n")
    child = pexpect.spawn(
        sys.executable, ["-m", "exl_cli", "doctor"], env=machine.environment, encoding="utf-8", timeout=60
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
        timeout=60,
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
    # A long finding goes on below itself; a command is never broken: it is there to be copied.
    assert " " * 18 + "→ exl doctor --timeout 300 (in case this machine is slow)" in lines
    terminal = next(line for line in lines if "Terminal" in line)
    assert terminal == "✓ Terminal        xterm-256color, 256 colours, 70 columns, UTF-8"
    assert child.exitstatus == 13


@pytest.mark.parametrize(
    ("token", "words", "status"),
    [("", "reachable, not logged in", "ok"), ("hf_bad", "rejects the token", "warn")],
)
def test_the_hub_and_the_login(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, words: str, status: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", token)
    answer = questions.ask(probes.__name__, "hub", 60, {"timeout": 10})
    assert answer.value is not None, answer.problem
    result = machine_checks.hub(answer)
    assert words in result.message
    assert result.status == status


@pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")
def test_a_gpu_machine_before_it_has_an_extension_and_after(tmp_path: Path) -> None:
    machine = Machine(tmp_path, gpus="9.0")
    before = examine(machine.run("doctor", "--json"))["findings"]
    assert before["GPU 0"]["status"] == "ok"
    assert before["Extension"]["status"] == "warn"
    assert "not compiled yet; the first exl run compiles it" in before["Extension"]["found"]
    assert re.match(r"exl build \(about \d+ min with \d+ jobs?\)", before["Extension"]["fix"])
    assert before["nvcc"]["found"].startswith("13.0, ")
    library = compile_module(module_source(), machine.site / "exllamav2_ext.so")
    after = examine(machine.run("doctor", "--json"))["findings"]
    assert after["Extension"]["status"] == "ok"
    assert after["Extension"]["found"] == f"prebuilt ({library}), loads and computes"
