"""Importing exllamav2 with an extension that fits, or an error with the fix."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import preloaded
import pytest
from fakecuda import HAS_COMPILERS, Machine, compile_module, module_source
from helpers import python

compilers = pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")

CALL = """
import json, os, sys
from exl_cli.engines.exllamav2.extension.build import Notes
from exl_cli.engines.exllamav2.import_exllamav2 import import_exllamav2
from exl_cli.errors import ExlError, spell
notes = []
try:
    import_exllamav2(Notes(notes.append) if sys.argv[1] == "observed" else None)
    import exllamav2_ext
    end = {"file": exllamav2_ext.__file__, "same": sys.modules["exllamav2.ext"].ext_c is exllamav2_ext}
except ExlError as error:
    end = {"error": type(error).__name__, "message": error.message, "hint": spell(error.hint)}
left = [name for name in os.environ if name.startswith("EXLLAMA_NO_")]
left += {"exllamav2" if "error" in end else "", "torch.utils.cpp_extension"} & set(sys.modules)
print(json.dumps({**end, "notes": notes, "left": left}))
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpus="9.0")


@pytest.fixture(scope="module")
def once_built(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    made = Machine(tmp_path_factory.mktemp("machine"), gpus="9.0")
    assert made.run("build").returncode == 0
    return made


@pytest.fixture
def built(once_built: Machine, tmp_path: Path) -> Machine:
    """One whose extension is compiled."""
    return once_built.copied(tmp_path / "machine")


def import_on(machine: Machine, how: str = "observed", **variables: str) -> dict[str, Any]:
    done = preloaded.python(CALL, how, environment={**machine.environment, **variables})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # exllamav2's own prints go to stderr.
    assert len(lines) == 1, done.stdout
    result = dict(json.loads(lines[0]))
    assert result["left"] == []
    return result


@compilers
def test_what_is_compiled_is_loaded_with_no_compiler_at_hand(built: Machine) -> None:
    result = import_on(built, "alone", CUDA_HOME="/nowhere", CXX="no-such-g++")
    assert result["file"] == str(built.built)
    assert result["same"]
    assert result["notes"] == []


@compilers
def test_it_is_compiled_in_the_open_or_not_at_all(machine: Machine) -> None:
    alone = import_on(machine, "alone")
    assert (alone["error"], alone["message"]) == ("EngineError", "exllamav2's extension is not compiled yet")
    assert "exl build" in alone["hint"]
    assert not machine.ours.exists()
    result = import_on(machine)
    assert result["file"] == str(machine.built)
    notes = result["notes"]
    assert "not compiled yet" in notes[0]
    assert "for sm_90: 4 files, about" in notes[1]
    assert str(machine.log) in notes[1]
    assert notes[-1].startswith("compiled 4 of 4 files")


def test_missing_packages_are_reported_with_a_fix(tmp_path: Path) -> None:
    result = import_on(Machine(tmp_path, cuda="77.1", nvcc="12.4", gpus="9.0"))
    assert "nvcc is for CUDA 12.4" in result["message"]
    assert "cuda-toolkit[" in result["hint"]
    assert "engine cpu" in result["hint"]


@compilers
def test_a_prebuilt_extension_of_another_torch_is_replaced(machine: Machine) -> None:
    library = machine.site / "exllamav2_ext.so"
    compile_module(module_source("namespace c10 { int gone(int); }", init="c10::gone(1);"), library)
    alone = import_on(machine, "alone")
    assert "was built for another torch version (installed: 2.11.0+cu130)" in alone["message"]
    assert str(library) in alone["message"]
    result = import_on(machine)
    assert "built for another torch" in result["notes"][0]
    assert result["file"] == str(machine.built)
    assert result["same"]
    # One whose version says so is not even loaded.
    compile_module(module_source("#include <cstdlib>", init="abort();"), library)
    machine.write("exllamav2-0.3.2.dist-info/METADATA", "Name: exllamav2\nVersion: 0.3.2+cu128.torch2.8.0\n")
    assert import_on(machine, "alone")["file"] == str(machine.built)


@compilers
def test_an_extension_for_another_gpu_is_not_taken(built: Machine) -> None:
    built.gpus = "7.5"
    assert "built for sm_90, but this machine's GPU is sm_75" in import_on(built, "alone")["message"]


@compilers
@pytest.mark.parametrize("fault", ["", "of another torch", "older than torch"])
def test_one_that_exllamav2_compiled_by_itself_is_copied_where_it_fits(machine: Machine, fault: str) -> None:
    theirs = machine.torchs / "exllamav2_ext.so"
    source = module_source("namespace c10 { int gone(int); }", init="c10::gone(1);") if "of" in fault else None
    compile_module(source or module_source(), theirs)
    if fault == "older than torch":
        os.utime(theirs, (0, 0))
    before = theirs.stat().st_mtime_ns, theirs.read_bytes()
    # No compiler is needed for a copy.
    result = import_on(machine, **({} if fault else {"CUDA_HOME": "/nowhere", "CXX": "no-such-g++"}))
    assert result["file"] == str(machine.built)
    assert (machine.built.read_bytes() == before[1]) is not bool(fault)
    assert json.loads((machine.folder() / "exllamav2_ext.json").read_text())["archs"] == ["9.0"]
    assert (theirs.stat().st_mtime_ns, theirs.read_bytes()) == before
    assert list(machine.torchs.iterdir()) == [theirs]


@compilers
@pytest.mark.parametrize(
    ("module", "message", "hint"),
    [
        # A broken flash-attn is not imported.
        ("import os\nif 'EXLLAMA_NO_FLASH_ATTN' not in os.environ: raise ImportError('flash_attn')", "", ""),
        ("import no_such_package", "the Python package no_such_package is missing", "pip install no_such_package"),
        ("raise SystemError('first\\nand last')", "cannot import exllamav2: and last", "exl doctor"),
        # Not the fault of the extension, which has been tried.
        (
            "raise ImportError('/x/other.so: undefined symbol: y')",
            "cannot import exllamav2: /x/other.so: undefined symbol: y",
            "exl doctor",
        ),
    ],
)
def test_what_the_import_itself_runs_into(built: Machine, module: str, message: str, hint: str) -> None:
    built.write("exllamav2/model.py", f"from exllamav2.ext import ext_c\n{module}\n")
    result = import_on(built)
    assert result.get("message", "") == message
    assert hint in result.get("hint", "")


@compilers
def test_a_full_gpu_is_no_broken_extension(built: Machine) -> None:
    result = import_on(built, FAKE_FULL="1")
    assert result["error"] == "OutOfMemoryError"
    assert "the GPU is full" in result["message"]


@pytest.mark.skipif(importlib.util.find_spec("exllamav2") is None, reason="exllamav2 is not installed")
def test_neither_the_real_import_nor_modules_on_the_meta_device_bring_in_a_compiler() -> None:
    """Later imports get it; modules elsewhere than on the meta device are initialized as ever."""
    code = """
import importlib.util, json, os, sys
import fakeextension, torch
fakeextension.install()
torch_alone = set(sys.modules)
from exl_cli.engines.exllamav2 import engine
from exl_cli.engines.exllamav2.attention import causal, paged
from exl_cli.engines.exllamav2.import_exllamav2 import import_exllamav2
from exl_cli.engines.exllamav2.startup import nothing_drawn
import_exllamav2()
causal.install()
paged.install_paged()
with nothing_drawn():
    torch.nn.Embedding(8, 8, device="meta")
    torch.nn.Linear(8, 8, bias=True, device="meta")
    real = torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8)
heavy = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed", "setuptools", "torch.utils.cpp_extension")
new = set(sys.modules) - torch_alone
from exllamav2 import attn
from torch.utils.cpp_extension import BuildExtension
random = [(torch.manual_seed(0), torch.nn.Linear(8, 8).weight.tolist())[1] for _ in range(2)]
print(json.dumps({"heavy": sorted(set(heavy) & new), "new": len(new), "sdpa": attn.has_lower_right_sdpa,
    "left": "EXLLAMA_NO_SDPA" in os.environ, "bias": bool(importlib.util.find_spec("torch.nn.attention.bias")),
    "class": isinstance(BuildExtension, type), "drawn": all(module.weight.std() > 0.01 for module in real),
    "again": random[0] == random[1]}))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("new") < 300  # 1,122 with all of it
    assert result.pop("heavy") == []
    assert result == {"sdpa": False, "left": False, "bias": True, "class": True, "drawn": True, "again": True}
