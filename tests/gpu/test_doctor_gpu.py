"""`exl doctor` and the import of exllamav2 on a GPU: ready, full, and with an extension that does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakecuda import compile_module, module_source
from helpers import exl

from exl_cli.errors import ExitCode

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
FILL = """
import sys, torch
held = []
for size in (2**30, 2**27, 2**24):
    try:
        while torch.cuda.mem_get_info()[0] > 2**28 + size:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError:
        pass
print("full", flush=True)
sys.stdin.read()
"""


def examine(*arguments: str, **variables: str) -> tuple[dict[str, Any], dict[str, Any]]:
    result = exl("doctor", *arguments, "--json", env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", **variables})
    report = json.loads(result.stdout)
    assert report["exit_code"] == result.returncode
    return report, {finding["check"]: finding for finding in report["findings"]}


def test_a_ready_machine_and_a_model_on_which_both_engines_agree() -> None:
    report, found = examine("fable-7m")
    print(json.dumps(report, indent=1))
    assert report["verdict"] == "gpu"
    assert report["exit_code"] == 0
    assert found["Extension"]["status"] == "ok"
    assert "loads and computes" in found["Extension"]["found"]
    capability = torch.cuda.get_device_capability()
    assert found["GPU 0"]["details"]["capability"] == list(capability)
    assert found["Attention"]["status"] in ("ok", "warn")
    assert found["Fits"]["status"] == "ok"
    assert found["On the GPU"]["status"] == "ok"
    assert found["Engines agree"]["status"] == "ok"
    distances = found["Engines agree"]["details"]["distances"]
    assert max(distances[way]["relative_l2"] for way in ("prompt", "decoding")) < 0.01


def test_a_full_gpu() -> None:
    filler = subprocess.Popen([sys.executable, "-c", FILL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert filler.stdout is not None
        assert filler.stdout.readline() == "full\n"
        report, found = examine()
        run = exl("run", "-p", "x", "-n", "4")
    finally:
        assert filler.stdin is not None
        filler.stdin.close()
        filler.wait()
    gpu = found["GPU 0"]
    print(gpu, run.stderr, sep="\n")
    if torch.cuda.device_count() == 1:
        assert gpu["status"] == "fail"
        assert report["exit_code"] == ExitCode.CPU_ONLY
    assert ": full" in gpu["found"]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.stderr
    assert run.returncode == ExitCode.OUT_OF_MEMORY


@needs_compiler
def test_an_extension_of_another_torch_is_named_and_not_taken(tmp_path: Path) -> None:
    source = module_source("namespace c10 { int gone(int); }", init="c10::gone(1);")
    library = compile_module(source, tmp_path / "exllamav2_ext.so")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    nowhere = str(tmp_path / "nowhere")
    _, found = examine(PYTHONPATH=path, TORCH_EXTENSIONS_DIR=nowhere)
    print(found["Extension"])
    assert "built for another torch" in found["Extension"]["found"]
    code = """
from exl_cli.engines.exllamav2.import_exllamav2 import import_exllamav2
from exl_cli.errors import EngineError
try:
    import_exllamav2()
except EngineError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": nowhere}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert "was built for another torch" in done.stdout, done.stderr
    assert str(library) in done.stdout
    assert "exl build" in done.stdout
