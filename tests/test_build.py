"""`exl build`, with the real g++ and ninja and a stand-in for torch with CUDA and nvcc; see `fakecuda`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from fakecuda import HAS_COMPILERS, Machine, module_source

from exl_cli.engines.exllamav2.extension import toolchain
from exl_cli.engines.exllamav2.extension.compiled import Torch
from exl_cli.errors import ExitCode

pytestmark = pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def once_built(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    made = Machine(tmp_path_factory.mktemp("machine"))
    result = made.run("build", "--arch", "sm_90")
    assert (result.returncode, result.stdout) == (0, f"{made.built}\n"), result.stderr
    assert re.search(r"compiling exllamav2's extension for sm_90: 4 files, about .* with \d+ jobs? \(", result.stderr)
    assert "compiled exllamav2's extension for sm_90 in 0:0" in result.stderr
    return made


def test_the_library_is_installed_by_version_with_its_facts(once_built: Machine) -> None:
    facts = json.loads((once_built.folder() / "exllamav2_ext.json").read_text())
    assert facts["torch"] == "2.11.0+cu130"
    assert facts["archs"] == ["9.0"]
    assert facts["python"] == sysconfig.get_config_var("SOABI")
    assert facts["size"] == once_built.built.stat().st_size
    assert "one.cu" in once_built.log.read_text()
    # Nothing but the library and its facts is left, and torch's own folder is as it was.
    assert {path.name for path in once_built.folder().iterdir()} == {"exllamav2_ext.so", "exllamav2_ext.json"}
    assert not once_built.torchs.exists()


def test_an_existing_build_is_reused_unless_forced_or_for_another_torch(once_built: Machine, tmp_path: Path) -> None:
    machine = once_built.copied(tmp_path / "machine")
    again = machine.run("build", "--arch", "9.0")
    assert (again.returncode, again.stdout) == (0, f"{machine.built}\n")
    assert "already compiled for sm_90" in again.stderr
    assert re.search(r"in 0:0\d: 4 files", machine.run("build", "--arch", "9.0", "--force").stderr)
    machine.write("torch/version.py", "__version__ = '2.12.1+cu130'\ncuda = '13.0'\n")
    machine.torch = "2.12.1"
    assert machine.run("build", "--arch", "9.0").stdout == f"{machine.built}\n"


def test_the_local_gpu_is_compiled_for_and_tested(machine: Machine, tmp_path: Path) -> None:
    # With ninja where pip puts it, which is not on PATH where a virtual environment was not activated.
    programs = tmp_path / "programs"
    programs.mkdir()
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    for name in ("sh", "c++", "as", "ld", "dirname", "grep", "sleep", *([] if beside.exists() else ["ninja"])):
        (programs / name).symlink_to(str(shutil.which(name)))
    machine.gpus = "8.6"
    result = machine.run("build", PATH=str(programs), TORCH_EXTENSIONS_DIR="")
    assert result.returncode == 0, result.stderr
    assert "for sm_86 in" in result.stderr
    assert "tested on Fake GPU" in result.stderr
    assert "compute_86,code=sm_86" in machine.log.read_text()
    assert Path(result.stdout.strip()).is_relative_to(machine.root / "cache" / "exl" / "extensions")


def test_out_gives_a_wheel_that_pip_installs_and_python_imports(machine: Machine, tmp_path: Path) -> None:
    result = machine.run("build", "--arch", "8.6,9.0", "--out", str(tmp_path / "out"), "--json")
    assert result.returncode == 0, result.stderr
    wheel = Path(json.loads(result.stdout)["wheel"])
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"exllamav2_ext-0.3.2+cu130.torch2.11.0.sm86.sm90-{tag}-{tag}-{platform}.whl"
    assert list(wheel.parent.iterdir()) == [wheel]
    target = tmp_path / "elsewhere"
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = "import exllamav2_ext as e; print(e.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, capture_output=True, text=True)
    assert done.stdout.strip() == str(target / f"exllamav2_ext.{sysconfig.get_config_var('SOABI')}.so"), done.stderr
    assert json.loads((target / "exllamav2_ext.json").read_text())["archs"] == ["8.6", "9.0"]
    # It serves GPUs of each of its architectures.
    again = machine.run("build", "--arch", "9.0")
    assert again.stdout == f"{machine.folder('sm86.sm90')}/exllamav2_ext.so\n"
    assert "already compiled for sm_86, sm_90" in again.stderr


# --- what is missing --------------------------------------------------------------------------------------------------


# A version that no toolkit of this machine can have.
@pytest.mark.parametrize(
    ("version", "missing", "problem"),
    [
        ("12.4", "", "is for CUDA 12.4, but torch 2.11.0+cu771 needs CUDA 77"),
        ("77.1", "cusparse.h", "lacks cusparse.h"),
        ("77.1", "", ""),
    ],
)
def test_nvcc_must_be_of_torchs_cuda_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, missing: str, problem: str
) -> None:
    Machine(tmp_path, cuda="77.1", nvcc=version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    if missing:
        (tmp_path / "toolkit" / "include" / missing).unlink()
    nvcc = toolchain.nvcc(Torch("2.11.0+cu771", "77.1", None, tmp_path / "site" / "torch"))
    assert nvcc.problem == problem
    assert bool(problem) == nvcc.fix.endswith("pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]==77.1.*'")


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ("--arch 9.0", {"CXX": "no-such-g++"}, "no-such-g++ not found"),
        ("--arch 9.0", {"TORCH_EXTENSIONS_DIR": "/dev/null"}, "/dev/null"),
        ("--arch hopper", {}, "'hopper' is not a GPU architecture; write it as 8.6"),
        ("", {}, "no GPU to compile for on this machine; name an architecture, such as --arch"),
        (
            "",
            {"FAKE_GPUS": "9.0", "TORCH_CUDA_ARCH_LIST": "7.5"},
            "TORCH_CUDA_ARCH_LIST=7.5 does not cover this machine's GPU (sm_90); unset TORCH_CUDA_ARCH_LIST",
        ),
        # nvcc is tried before anything else is compiled.
        ("--arch 9.0", {"FAKE_REFUSAL": "#error -- unsupported GNU version!"}, "does not support this"),
    ],
)
def test_missing_or_mismatched_tools_are_one_line(
    machine: Machine, arguments: str, variables: dict[str, str], words: str
) -> None:
    result = machine.run("build", *arguments.split(), **variables)
    code = ExitCode.USAGE if "hopper" in arguments else ExitCode.ENGINE
    assert (result.returncode, result.stdout) == (code, "")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert words in " ".join(line.split())
    assert "Traceback" not in result.stderr
    assert not list(machine.ours.rglob("*.o"))


def test_a_torch_without_cuda_is_named(machine: Machine) -> None:
    machine.write("torch/version.py", "__version__ = '2.11.0+cpu'\ncuda = None\n")
    result = machine.run("build", "--arch", "9.0")
    assert "torch 2.11.0+cpu is built without CUDA" in result.stderr
    assert "pip install --force-reinstall torch==2.11.0" in result.stderr


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("two.cpp", "#error something is wrong here\n", "something is wrong here"),
        ("two.cpp", "#include <signal.h>\nint two() { return raise(SIGSEGV); }\n", "crashes on loading (SIGSEGV)"),
        ("bindings.cpp", module_source(body="Py_IncRef(x); return x;"), "has no code for this GPU"),
    ],
)
def test_what_does_not_compile_load_or_compute_is_not_kept(machine: Machine, file: str, text: str, words: str) -> None:
    machine.gpus = "9.0"
    machine.write(f"exllamav2/exllamav2_ext/{file}", text)
    result = machine.run("build")
    assert result.returncode == ExitCode.ENGINE
    assert words in result.stderr
    assert str(machine.log) in result.stderr
    assert not machine.built.exists()
