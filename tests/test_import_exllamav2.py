"""exllamav2 is imported with an extension that fits, or an error says what mends it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fakecuda import HAS_COMPILERS, Machine, compile_module, module_source

pytestmark = pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")

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
left_out = sorted(name for name in os.environ if name.startswith("EXLLAMA_NO_"))
print(json.dumps({**end, "notes": notes, "left_out": left_out}))
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
    done = machine.python("-c", CALL, how, **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # exllamav2's own prints go to stderr.
    assert len(lines) == 1, done.stdout
    return dict(json.loads(lines[0]))


def test_what_is_compiled_is_loaded_with_no_compiler_at_hand(built: Machine) -> None:
    result = import_on(built, "alone", CUDA_HOME="/nowhere", CXX="no-such-g++")
    assert result["file"] == str(built.built)
    assert result["same"]
    assert result["notes"] == []


def test_where_nobody_can_be_told_nothing_is_compiled(machine: Machine) -> None:
    result = import_on(machine, "alone")
    assert result["error"] == "EngineError"
    assert result["message"] == "exllamav2's extension is not compiled yet"
    assert "exl build" in result["hint"]
    assert not machine.ours.exists()


def test_it_is_compiled_in_the_open(machine: Machine) -> None:
    result = import_on(machine)
    assert result["file"] == str(machine.built)
    notes = result["notes"]
    assert "not compiled yet" in notes[0]
    assert "for sm_90: 4 files, about" in notes[1]
    assert str(machine.log) in notes[1]
    assert notes[-1].startswith("compiled 4 of 4 files")


def test_what_is_missing_is_said_with_the_way_out(tmp_path: Path) -> None:
    result = import_on(Machine(tmp_path, cuda="77.1", nvcc="12.4", gpus="9.0"))
    assert "nvcc is of CUDA 12.4" in result["message"]
    assert "cuda-toolkit[" in result["hint"]
    assert "engine cpu" in result["hint"]


def test_a_prebuilt_extension_of_another_torch_is_replaced(machine: Machine) -> None:
    library = machine.site / "exllamav2_ext.so"
    compile_module(module_source("namespace c10 { int gone(int); }", init="c10::gone(1);"), library)
    alone = import_on(machine, "alone")
    assert "was built for another torch (here: 2.11.0+cu130)" in alone["message"]
    assert str(library) in alone["message"]
    result = import_on(machine)
    assert "built for another torch" in result["notes"][0]
    assert result["file"] == str(machine.built)
    assert result["same"]


def test_a_prebuilt_wheel_whose_version_says_another_torch_is_not_even_loaded(machine: Machine) -> None:
    compile_module(module_source("#include <cstdlib>", init="abort();"), machine.site / "exllamav2_ext.so")
    machine.write("exllamav2-0.3.2.dist-info/METADATA", "Name: exllamav2\nVersion: 0.3.2+cu128.torch2.8.0\n")
    result = import_on(machine, "alone")
    assert "built for torch 2.8.0, and torch 2.11.0+cu130 is here" in result["message"]


def test_an_extension_for_another_gpu_is_not_taken(built: Machine) -> None:
    built.gpus = "7.5"
    result = import_on(built, "alone")
    assert "built for sm_90, and the GPU here is sm_75" in result["message"]


def test_one_that_exllamav2_compiled_by_itself_is_tried_and_copied(machine: Machine) -> None:
    plain = machine.python("-c", "import exllamav2", PATH=f"{machine.ninja_folder}:{machine.environment['PATH']}")
    assert plain.returncode == 0, plain.stderr
    theirs = machine.torchs / "exllamav2_ext.so"
    before = {path: path.stat().st_mtime_ns for path in machine.torchs.iterdir()}
    # No compiler is needed for that.
    result = import_on(machine, CUDA_HOME="/nowhere", CXX="no-such-g++")
    assert result["file"] == str(machine.built)
    assert machine.built.read_bytes() == theirs.read_bytes()
    assert json.loads((machine.folder() / "exllamav2_ext.json").read_text())["archs"] == ["9.0"]
    assert {path: path.stat().st_mtime_ns for path in machine.torchs.iterdir()} == before


@pytest.mark.parametrize("fault", ["of another torch", "older than torch"])
def test_one_that_exllamav2_compiled_and_that_does_not_fit_is_left_where_it_is(machine: Machine, fault: str) -> None:
    theirs = machine.torchs / "exllamav2_ext.so"
    if fault == "of another torch":
        compile_module(module_source("namespace c10 { int gone(int); }", init="c10::gone(1);"), theirs)
    else:
        compile_module(module_source(), theirs)
        os.utime(theirs, (0, 0))
    before = theirs.read_bytes()
    result = import_on(machine)
    assert result["file"] == str(machine.built)
    assert result["notes"][-1].startswith("compiled 4 of 4 files")
    assert theirs.read_bytes() == before


def test_a_broken_flash_attn_is_not_imported(built: Machine) -> None:
    built.write("flash_attn.py", "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN2at4_ops5zeros4call')")
    built.write(
        "exllamav2/model.py",
        "import os\nfrom exllamav2.ext import ext_c\n"
        "if 'EXLLAMA_NO_FLASH_ATTN' not in os.environ:\n    import flash_attn\n",
    )
    result = import_on(built)
    assert "file" in result, result
    assert result["notes"] == []


def test_a_missing_package_of_exllamav2_is_named(built: Machine) -> None:
    built.write("exllamav2/model.py", "import no_such_package\n")
    result = import_on(built)
    assert result["message"] == "the Python package no_such_package is missing"
    assert "pip install no_such_package" in result["hint"]


def test_an_unknown_failure_is_passed_on_in_a_line(built: Machine) -> None:
    built.write("exllamav2/model.py", "raise SystemError('first\\nand last')\n")
    result = import_on(built)
    assert result["message"] == "exllamav2 cannot be imported: and last"


def test_a_linkers_complaint_about_another_library_is_not_blamed_on_the_extension(built: Machine) -> None:
    built.write("exllamav2/model.py", "raise ImportError('/x/other.so: undefined symbol: y')\n")
    result = import_on(built)
    assert result["message"] == "exllamav2 cannot be imported: /x/other.so: undefined symbol: y"


def test_a_full_gpu_is_no_broken_extension(built: Machine) -> None:
    result = import_on(built, FAKE_FULL="1")
    assert result["error"] == "OutOfMemoryError"
    assert "the GPU is full" in result["message"]
