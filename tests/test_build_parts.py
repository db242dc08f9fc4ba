"""Parts of the build: architectures, explanations of failures, jobs and time estimates."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from fakecuda import HAS_COMPILERS, compile_module, module_source

from exl_cli.engines.exllamav2.extension import build, compiled, hints
from exl_cli.engines.exllamav2.extension.compiled import Facts, Torch, python_tag
from exl_cli.system.machine import available_memory, usable_cores

TORCH = Torch("2.11.0+cu130", "13.0", None, Path("/nowhere/torch"))


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("8.6", ("8.6",)),
        ("86", ("8.6",)),
        ("sm_90", ("9.0",)),
        ("sm_120,8.0", ("12.0", "8.0")),
        ("9.0a;9.0+PTX", ("9.0a", "9.0+PTX")),
        ("7.5 7.5", ("7.5",)),
        ("compute_100", ("10.0",)),
    ],
)
def test_architectures_are_read_as_people_write_them(text: str, archs: tuple[str, ...]) -> None:
    assert compiled.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["hopper", "9", "9.0.0", "sm_", "8.6x"])
def test_what_is_no_architecture(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        compiled.parse_archs(text)


@pytest.mark.parametrize(
    ("archs", "gpu", "runs"),
    [
        # CUDA C++ Programming Guide: machine code for 8.0 runs on 8.6, not the other way round, and not on 9.0.
        (("8.0",), (8, 6), True),
        (("8.6",), (8, 0), False),
        (("8.0",), (9, 0), False),
        (("9.0",), (9, 0), True),
        (("9.0+PTX",), (12, 0), True),
        (("9.0+PTX",), (8, 9), False),
        (("7.5", "8.6"), (8, 9), True),
    ],
)
def test_which_gpus_code_runs_on(archs: tuple[str, ...], gpu: tuple[int, int], runs: bool) -> None:
    assert (compiled.uncovered(archs, [gpu]) == []) is runs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"torch": "2.11.1+cu130"}, ""),
        ({"torch": "2.10.0+cu130"}, "torch 2.10.0+cu130"),
        ({"cuda": "13.2"}, ""),
        ({"cuda": "12.8"}, "CUDA 12.8"),
        ({"python": "cpython-39-x86_64-linux-gnu"}, "cpython-39"),
        ({"exllamav2": "0.2.9"}, "0.2.9"),
        ({"archs": ("8.0",)}, "sm_90"),
    ],
)
def test_an_extensions_facts_are_checked_against_the_installation(changes: dict[str, object], words: str) -> None:
    made = {"exllamav2": "0.3.2", "torch": TORCH.version, "cuda": "13.0", "python": python_tag(), "archs": ("9.0",)}
    mismatch = Facts(**{**made, **changes}).mismatch(TORCH, [(9, 0)])
    assert words in mismatch if words else mismatch == ""


# Messages as glibc's linker, pybind11, torch, the CUDA runtime and the compilers write them.
@pytest.mark.parametrize(
    ("said", "words", "fix"),
    [
        (
            "/x/e.so: undefined symbol: _ZN3c104cuda9SetDeviceEab",
            "built for another torch version (installed: 2.11.0+cu130)",
            "exl build",
        ),
        ("libcudart.so.12: cannot open shared object file: No such file", "built for CUDA 12", "exl build"),
        ("libfoo.so.3: cannot open shared object file: No such file", "libfoo.so.3 is missing", "install"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by e.so)", "newer system", "exl build"),
        (
            "Python version mismatch: module was compiled for Python 3.11, but the interpreter version is "
            "incompatible: 3.12.1",
            "built for Python 3.11",
            "exl build",
        ),
        ("/x/e.so: file too short", "damaged", "exl build"),
        ("CUDA error: no kernel image is available for execution on the device", "no code for this GPU", "exl build"),
        ("CUDA driver version is insufficient for CUDA runtime version", "driver is too old for CUDA 13.0", "driver"),
        ("No module named 'pandas'", "package pandas is missing", "pip install pandas"),
        ("No module named 'PIL.Image'", "package PIL is missing", "pip install pillow"),
        ("Ninja is required to load C++ extensions", "ninja not found", "pip install ninja"),
        ("CUDA_HOME environment variable is not set. Please", "nvcc not found", "cuda-toolkit["),
        # nvcc 13.0 and g++ 12
        ("x.cu\n#error -- unsupported GNU version! gcc versions later than 15 are not supported!", "g++", "CXX=g++-12"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_50'", "compute_50", "cuda-toolkit["),
        ("x.h:9:10: fatal error: cusparse.h: No such file or directory\nterminated.", "cusparse.h", "cuda-toolkit["),
        ("/usr/bin/ld: cannot find -lcudart: No such file or directory", "-lcudart", "cuda-toolkit["),
        ("c++: fatal error: Killed signal terminated program cc1plus", "memory", "--jobs 1"),
    ],
)
def test_known_failures_become_a_line_and_a_fix(said: str, words: str, fix: str) -> None:
    failure = hints.explain(said, TORCH)
    assert failure is not None
    assert words in failure.what
    assert fix in failure.fix


def test_an_unknown_failure_is_not_guessed_at() -> None:
    assert hints.explain("something else", TORCH) is None


@pytest.mark.skipif(not HAS_COMPILERS, reason="there is no C++ compiler here")
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "built for another torch"), (b"", "damaged"), (b"not a library at all" * 9, "damaged")],
)
def test_real_linker_messages_are_explained(tmp_path: Path, content: bytes | None, words: str) -> None:
    library = tmp_path / "exllamav2_ext.so"
    if content is None:
        compile_module(module_source("namespace c10 { int gone(int); }", init="c10::gone(1);"), library)
    else:
        library.write_bytes(content)
    code = "import exllamav2_ext"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    failure = hints.explain(hints.last_line(done.stderr), TORCH)
    assert failure is not None, done.stderr
    assert words in failure.what
    assert failure.rebuild


def test_jobs_are_as_asked_then_as_torch_would_then_as_the_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.plan(5).jobs == 5
    assert build.plan().jobs == 3
    monkeypatch.delenv("MAX_JOBS")
    plan, free = build.plan(), available_memory()
    assert 1 <= plan.jobs <= usable_cores()
    assert free is None or plan.jobs == 1 or plan.jobs * 1.6e9 <= free


def test_the_expected_time_shares_the_work_and_is_never_below_the_longest_file() -> None:
    names = ["ext_cache.o"] * 8
    alone = build.seconds_for(names[:1], 1)
    assert build.seconds_for(names, 1) == pytest.approx(8 * alone)
    assert build.seconds_for(names, 4) < build.seconds_for(names, 2) < build.seconds_for(names, 1)
    assert build.seconds_for(names, 1000) >= alone
    assert build.seconds_for([], 2) == 0
    kernels = ["unit_exl2_1b.cuda.o"]
    assert build.seconds_for(kernels, 1, 2) > 1.5 * build.seconds_for(kernels, 1, 1)


@pytest.mark.skipif(importlib.util.find_spec("exllamav2") is None, reason="exllamav2 is not installed")
def test_the_time_estimate_of_a_full_build_matches_the_measurement() -> None:
    # 645 seconds of CPU time: see `build`.
    assert build.seconds_for(build.all_files(), 1) == pytest.approx(645, rel=0.1)
