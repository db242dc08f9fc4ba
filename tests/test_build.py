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
from fakecuda import HAS_COMPILERS, Machine

from exl_cli.errors import ExitCode

pytestmark = pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def check_error(result: subprocess.CompletedProcess[str], *words: str) -> str:
    """One line that says what is wrong, exit code 8, nothing on stdout, and nothing half done left; the line."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    assert (result.returncode, result.stdout) == (ExitCode.ENGINE, "")
    return lines[0]


def test_the_library_lands_in_a_folder_of_its_own_and_says_what_it_is_for(machine: Machine) -> None:
    result = machine.run("build", "--arch", "sm_90")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{machine.built}\n"
    assert re.search(r"compiling exllamav2's extension for sm_90: 4 files, about .* with \d+ jobs? \(", result.stderr)
    assert "compiled exllamav2's extension for sm_90 in 0:0" in result.stderr
    facts = json.loads((machine.folder() / "exllamav2_ext.json").read_text())
    assert facts["torch"] == "2.11.0+cu130"
    assert facts["archs"] == ["9.0"]
    assert facts["python"] == sysconfig.get_config_var("SOABI")
    assert facts["size"] == machine.built.stat().st_size
    assert "one.cu" in machine.log.read_text()
    # Nothing but the library and its facts is left, and torch's own folder is as it was.
    assert {path.name for path in machine.folder().iterdir()} == {"exllamav2_ext.so", "exllamav2_ext.json"}
    assert not machine.torchs.exists()


def test_the_gpu_that_is_here_is_what_it_compiles_for_and_tries(machine: Machine) -> None:
    machine.gpus = "8.6"
    result = machine.run("build")
    assert result.returncode == 0, result.stderr
    assert "for sm_86 in" in result.stderr
    assert "tried on Fake GPU" in result.stderr
    assert "compute_86,code=sm_86" in machine.log.read_text()


def test_without_a_gpu_it_asks_which(machine: Machine) -> None:
    assert "no GPU here" in check_error(machine.run("build"), "--arch")


def test_what_is_there_is_not_compiled_again_unless_forced(machine: Machine) -> None:
    machine.run("build", "--arch", "9.0")
    again = machine.run("build", "--arch", "9.0")
    assert again.returncode == 0
    assert "already compiled for sm_90" in again.stderr
    forced = machine.run("build", "--arch", "9.0", "--force")
    assert re.search(r"in 0:0\d: 4 files", forced.stderr), forced.stderr


def test_another_torch_makes_it_compile_again(machine: Machine) -> None:
    machine.run("build", "--arch", "9.0")
    machine.write("torch/version.py", "__version__ = '2.12.1+cu130'\ncuda = '13.0'\n")
    result = machine.run("build", "--arch", "9.0")
    assert "already compiled" not in result.stderr
    machine.torch = "2.12.1"
    assert json.loads((machine.folder() / "exllamav2_ext.json").read_text())["torch"] == "2.12.1+cu130"


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


def test_one_build_serves_gpus_of_each_of_its_architectures(machine: Machine) -> None:
    assert machine.run("build", "--arch", "8.6,9.0").stdout == f"{machine.folder('sm86.sm90')}/exllamav2_ext.so\n"
    assert "already compiled for sm_86, sm_90" in machine.run("build", "--arch", "9.0").stderr
    # Another folder, beside which the first one stays.
    assert machine.run("build", "--arch", "7.5").stdout == f"{machine.folder('sm75')}/exllamav2_ext.so\n"
    assert machine.folder("sm86.sm90").exists()


def test_without_torch_extensions_dir_it_lies_in_the_users_cache(machine: Machine) -> None:
    result = machine.run("build", "--arch", "9.0", TORCH_EXTENSIONS_DIR="")
    assert Path(result.stdout.strip()).is_relative_to(machine.root / "cache" / "exl" / "extensions")


def test_an_architecture_that_is_none(machine: Machine) -> None:
    result = machine.run("build", "--arch", "hopper")
    assert result.returncode == ExitCode.USAGE
    assert "hopper" in result.stderr
    assert "8.6" in result.stderr


# --- what is missing --------------------------------------------------------------------------------------------------


def test_nvcc_of_another_cuda(tmp_path: Path) -> None:
    # A version that no machine has, so that no toolkit of this one can be the right one.
    machine = Machine(tmp_path, cuda="77.1", nvcc="12.4")
    line = check_error(machine.run("build", "--arch", "9.0"), "nvcc is of CUDA 12.4", "needs CUDA 77")
    assert "pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl]==77.1.*'" in line
    assert not machine.folder().exists()


def test_a_toolkit_without_headers(tmp_path: Path) -> None:
    machine = Machine(tmp_path, cuda="77.1", nvcc="77.1")
    (tmp_path / "toolkit" / "include" / "cusparse.h").unlink()
    check_error(machine.run("build", "--arch", "9.0"), "nvcc comes without cusparse.h", "cuda-toolkit[")


def test_no_compiler(machine: Machine) -> None:
    check_error(machine.run("build", "--arch", "9.0", CXX="no-such-g++"), "no-such-g++ is not found")


@pytest.mark.skipif(shutil.which("ninja") is None, reason="there is no ninja here")
def test_ninja_beside_python_is_found_though_it_is_not_on_path(machine: Machine, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "c++", "as", "ld", "dirname", "grep", "sleep"):
        (programs / name).symlink_to(str(shutil.which(name)))
    beside = Path(sysconfig.get_path("scripts")) / "ninja"
    result = machine.run("build", "--arch", "9.0", PATH=str(programs))
    if beside.exists():
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode == 0 or "pip install ninja" in check_error(result, "ninja is not found")


def test_torch_without_cuda(machine: Machine) -> None:
    machine.write("torch/version.py", "__version__ = '2.11.0+cpu'\ncuda = None\n")
    line = check_error(machine.run("build", "--arch", "9.0"), "torch 2.11.0+cpu is built without CUDA")
    assert "pip install --force-reinstall torch==2.11.0" in line


def test_a_folder_that_cannot_be_written(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = machine.run("build", "--arch", "9.0", TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    check_error(result, str(tmp_path / "file"), "TORCH_EXTENSIONS_DIR=")


def test_a_left_over_list_of_architectures_that_leaves_out_the_gpu(machine: Machine) -> None:
    machine.gpus = "9.0"
    result = machine.run("build", TORCH_CUDA_ARCH_LIST="7.5")
    check_error(result, "TORCH_CUDA_ARCH_LIST=7.5 leaves out the GPU here (sm_90)", "unset TORCH_CUDA_ARCH_LIST")


# --- what fails on the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("#error -- unsupported GNU version! gcc versions later than 13 are not supported!", "does not work with this"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_90'", "does not know the GPU"),
        ("foo.h:3:10: fatal error: cusolverDn.h: No such file or directory", "a header is missing"),
    ],
)
def test_nvcc_that_does_not_fit_is_found_before_anything_else_is_compiled(
    machine: Machine, said: str, words: str
) -> None:
    result = machine.run("build", "--arch", "9.0", FAKE_REFUSAL=said)
    check_error(result, words, str(machine.log))
    assert said in machine.log.read_text()
    assert not list(machine.ours.rglob("*.o"))


def test_a_file_that_does_not_compile(machine: Machine) -> None:
    machine.write("exllamav2/exllamav2_ext/two.cpp", "#error something is wrong here\n")
    result = machine.run("build", "--arch", "9.0")
    check_error(result, "two.cpp", "something is wrong here", str(machine.log))
    assert not machine.built.exists()


def test_a_library_that_crashes_when_it_is_loaded(machine: Machine) -> None:
    machine.write("exllamav2/exllamav2_ext/two.cpp", "#include <signal.h>\nint two() { return raise(SIGSEGV); }\n")
    check_error(machine.run("build", "--arch", "9.0"), "crashes when it is loaded (SIGSEGV)")
    assert not machine.built.exists()


def test_a_library_that_does_not_compute(machine: Machine) -> None:
    from fakecuda import module_source

    machine.gpus = "9.0"
    machine.write("exllamav2/exllamav2_ext/bindings.cpp", module_source(body="Py_RETURN_NONE;"))
    check_error(machine.run("build"), "holds no code for this GPU")
    assert not machine.built.exists()
