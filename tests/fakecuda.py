"""A small stand-in for torch with CUDA, exllamav2 and NVIDIA's compiler, laid out as packages and programs in a folder.

It behaves as they do where `exl build` and the import of exllamav2 meet them: torch's `load` takes its lock, writes a
`build.ninja` and calls ninja; exllamav2's `ext` looks for an importable extension first and hands its sources to that;
nvcc tells its version and compiles. The sources are small C++ files that the real g++ compiles and links, run by the
real ninja.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HAS_COMPILERS = shutil.which("c++") is not None

_TORCH = """
import os
from torch import cuda, version
from torch.version import __version__
half = "half"

class Tensor:
    def __init__(self, values): self.values = list(values)
    def float(self): return self
    def cpu(self): return self
    def to(self, device):
        if "FAKE_FULL" in os.environ: raise cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
        return Tensor(self.values)
    def __truediv__(self, by): return Tensor(v / by for v in self.values)
    def __mul__(self, by): return Tensor(v * by for v in self.values)
    def softcap_(self, scale): self.values = (tanh(self / scale) * scale).values

def linspace(start, end, steps, dtype):
    return Tensor(start + (end - start) * i / (steps - 1) for i in range(steps))
def tanh(tensor):
    import math
    return Tensor(math.tanh(v) for v in tensor.values)
def allclose(a, b, rtol, atol): return all(abs(x - y) <= atol + rtol * abs(y) for x, y in zip(a.values, b.values))
"""

_CUDA = """
import os
from types import SimpleNamespace
class OutOfMemoryError(RuntimeError): pass
_gpus = [tuple(map(int, text.split("."))) for text in os.environ.get("FAKE_GPUS", "").split(",") if text]
def is_available(): return bool(_gpus)
def device_count(): return len(_gpus)
def get_device_capability(index=0): return _gpus[index]
def get_device_name(index=0): return "Fake GPU"
def get_arch_list(): return ["sm_75", "sm_80", "sm_90"]
def synchronize(index=0): pass
def init():
    if not _gpus: raise RuntimeError("Found no NVIDIA driver on your system.")
def get_device_properties(index):
    return SimpleNamespace(name="Fake GPU", major=_gpus[index][0], minor=_gpus[index][1], total_memory=8 * 2**30)
"""

_PYNVML = """
import os
_gpus = [tuple(map(int, text.split("."))) for text in os.environ.get("FAKE_GPUS", "").split(",") if text]
def nvmlInit():
    if not _gpus: raise RuntimeError("Driver Not Loaded")
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return len(_gpus)
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetCudaComputeCapability(index): return _gpus[index]
"""

_CPP_EXTENSION = """
import importlib.util, os, subprocess
def _run_ninja_build(build_directory, verbose, error_prefix):
    try:
        subprocess.run(["ninja", "-v", "-j", os.environ.get("MAX_JOBS", "2")], cwd=build_directory, check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error_prefix) from error
def load(name, sources, extra_include_paths, verbose, extra_ldflags, extra_cuda_cflags, extra_cflags):
    folder = os.path.join(os.environ["TORCH_EXTENSIONS_DIR"], name)
    os.makedirs(folder, exist_ok=True)
    lock = os.path.join(folder, "lock")
    handle = os.open(lock, os.O_CREAT | os.O_EXCL)
    try:
        archs = os.environ["TORCH_CUDA_ARCH_LIST"].split(";")
        codes = " ".join(f"-gencode=arch=compute_{a[0]}{a[2]},code=sm_{a[0]}{a[2]}" for a in archs)
        stems = [os.path.splitext(os.path.basename(source))[0] for source in sources]
        objects = [stem + (".cuda.o" if s.endswith(".cu") else ".o") for stem, s in zip(stems, sources)]
        lines = ["cxx = " + os.environ.get("CXX", "c++"), "nvcc = " + os.environ["CUDA_HOME"] + "/bin/nvcc"]
        lines += ["cuda_cflags = " + codes, "rule compile", "  command = $cxx -fPIC -c $in -o $out"]
        lines += ["rule cuda_compile", "  command = $nvcc $cuda_cflags -fPIC -c $in -o $out"]
        lines += ["rule link", "  command = $cxx -shared $in -o $out"]
        for source, target in zip(sources, objects):
            lines += [f"build {target}: {'cuda_compile' if source.endswith('.cu') else 'compile'} {source}"]
        lines += [f"build {name}.so: link {' '.join(objects)}", f"default {name}.so", ""]
        with open(os.path.join(folder, "build.ninja"), "w") as file:
            file.write(chr(10).join(lines))
        _run_ninja_build(folder, verbose, f"Error building extension {name!r}")
    finally:
        os.close(handle)
        os.remove(lock)
    return _import_module_from_library(name, folder, True)
def _import_module_from_library(name, folder, is_python_module):
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, name + ".so"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""

_EXT = """
import glob, os
from torch.utils.cpp_extension import load
import torch
build_jit = False
try:
    import exllamav2_ext
except ModuleNotFoundError:
    build_jit = True
if build_jit:
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a}.{b}" for a, b in torch.cuda._gpus)
    here = os.path.join(os.path.dirname(__file__), "exllamav2_ext")
    exllamav2_ext = load(name="exllamav2_ext", sources=sorted(glob.glob(here + "/*.c*")), extra_include_paths=[here],
                         verbose=False, extra_ldflags=[], extra_cuda_cflags=[], extra_cflags=[])
ext_c = exllamav2_ext
"""

# Of Python.h, whose compilation would take longer than all else, only what it needs.
MODULE = """
extern "C" {{
    struct PyObject;
    struct PyMethodDef {{ const char* name; PyObject* (*call)(PyObject*, PyObject*); int flags; const char* doc; }};
    struct PyModuleDef {{
        long references; void *type, *init; long index; void* copy;
        const char *name, *doc; long size; PyMethodDef* methods; void *slots, *traverse, *clear, *free;
    }};
    int PyArg_ParseTuple(PyObject*, const char*, ...);
    PyObject* PyObject_CallMethod(PyObject*, const char*, const char*, ...);
    void Py_IncRef(PyObject*);
    PyObject* PyModule_Create2(PyModuleDef*, int);
    PyObject* PyInit_exllamav2_ext();
}}
{declarations}
static PyObject* softcap(PyObject* self, PyObject* args) {{
    PyObject* x; double scale;
    if (!PyArg_ParseTuple(args, "Od", &x, &scale)) return nullptr;
    {body}
}}
static PyMethodDef methods[] = {{{{"softcap_", softcap, 1, ""}}, {{nullptr, nullptr, 0, nullptr}}}};
static PyModuleDef module = {{1, nullptr, nullptr, 0, nullptr, "exllamav2_ext", "", -1, methods}};
PyObject* PyInit_exllamav2_ext() {{ {init} return PyModule_Create2(&module, 1013); }}
"""
_COMPUTES = 'return PyObject_CallMethod(x, "softcap_", "d", scale);'

_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1"; exit;;
  *--dryrun*) echo "#\\$ _HERE_=$(dirname "$0")" >&2; exit;;
esac
if [ -n "$FAKE_HANG" ] && echo "$*" | grep -q "$FAKE_HANG"; then
  trap 'kill $!' USR1; sleep 600 & echo $$ > "$FAKE_PID"; wait  # SIGUSR1 lets it go on
fi
if [ -n "$FAKE_REFUSAL" ]; then echo "$FAKE_REFUSAL" >&2; exit 1; fi
for last; do :; done
while [ "$1" != -c ]; do shift; done
exec c++ -fPIC -x c++ -c "$2" -o "$last" -D__global__= -I "$(dirname "$0")/../include"
"""


def module_source(declarations: str = "", body: str = _COMPUTES, init: str = "") -> str:
    """A C++ file that is the extension."""
    return MODULE.format(declarations=declarations, body=body, init=init)


def compile_module(source: str, target: Path) -> Path:
    """Compile one file into an extension, with no build program around it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_suffix(".cpp")
    file.write_text(source)
    subprocess.run(["c++", "-shared", "-fPIC", str(file), "-o", str(target)], check=True)
    file.unlink()
    return target


@dataclass
class Machine:
    """The stand-in, in a folder of its own, and the environment in which programs take it for the real thing."""

    root: Path
    cuda: str = "13.0"
    nvcc: str | None = "13.0"
    torch: str = "2.11.0"
    gpus: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._name_paths()
        self.write("torch/__init__.py", _TORCH)
        self.write(
            "torch/version.py", f"__version__ = '{self.torch}+cu{self.cuda.replace('.', '')}'\ncuda = {self.cuda!r}\n"
        )
        self.write("torch/cuda.py", _CUDA)
        self.write("pynvml.py", _PYNVML)
        self.write("torch/utils/__init__.py", "")
        self.write("torch/utils/cpp_extension.py", _CPP_EXTENSION)
        self.write("exllamav2/__init__.py", "from exllamav2.model import ext_c\n")
        self.write("exllamav2/model.py", "from exllamav2.ext import ext_c\nprint('exllamav2 says something')\n")
        self.write("exllamav2/ext.py", _EXT)
        self.write("exllamav2/exllamav2_ext/bindings.cpp", module_source("int one();", init="one();"))
        self.write("exllamav2/exllamav2_ext/one.cu", "int two();\nint one() { return two(); }\n")
        self.write("exllamav2/exllamav2_ext/two.cpp", "int two() { return 2; }\n")
        self.write("exllamav2-0.3.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: exllamav2\nVersion: 0.3.2\n")
        if self.nvcc:
            toolkit = self.root / "toolkit"
            (toolkit / "bin").mkdir(parents=True)
            (toolkit / "include").mkdir()
            (toolkit / "bin" / "nvcc").write_text(_NVCC.format(version=self.nvcc))
            (toolkit / "bin" / "nvcc").chmod(0o755)
            for header in ("cuda_runtime.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h"):
                (toolkit / "include" / header).write_text("")

    def _name_paths(self) -> None:
        self.site = self.root / "site"
        self.extensions = self.root / "extensions"
        self.torchs = self.extensions / "exllamav2_ext"
        self.ours = self.extensions / "exl"
        self.log = self.root / "cache" / "exl" / "logs" / "build.log"

    def copied(self, root: Path) -> Machine:
        """Another like it, with what was compiled here."""
        shutil.copytree(self.root, root)
        other = copy.copy(self)
        other.root = root
        other._name_paths()
        return other

    def folder(self, archs: str = "sm90") -> Path:
        """Where exl puts the extension for these architectures."""
        tag = f"torch{self.torch.rpartition('.')[0]}-cu{self.cuda}-{sysconfig.get_config_var('SOABI')}"
        return self.ours / f"exllamav2-0.3.2-{tag}-{archs}"

    @property
    def built(self) -> Path:
        """The extension for compute capability 9.0."""
        return self.folder() / "exllamav2_ext.so"

    @property
    def lock(self) -> Path:
        """torch's lock on exl's build."""
        return self.folder() / "build" / "exllamav2_ext" / "lock"

    def write(self, name: str, text: str) -> None:
        """Put a file among the packages."""
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    @property
    def ninja_folder(self) -> str:
        """Where ninja is, which exl finds by itself and torch does not."""
        found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        return str(Path(found).parent) if found else ""

    @property
    def environment(self) -> dict[str, str]:
        """For processes that shall see it."""
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH"), *_source()]))
        return {
            **{key: value for key, value in os.environ.items() if key not in _FOREIGN},
            # The stand-in's files change within a second, which a compiled module's time stamp would not show.
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": path,
            "TORCH_EXTENSIONS_DIR": str(self.extensions),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "XDG_DATA_HOME": str(self.root / "data"),
            "CUDA_HOME": str(self.root / "toolkit"),
            "FAKE_GPUS": self.gpus,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            **self.variables,
        }

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`exl` with these arguments."""
        return self.python("-m", "exl_cli", *arguments, **variables)

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Python with these arguments."""
        environment: Mapping[str, str] = {**self.environment, **variables}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )


_FOREIGN = {"CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "CXX", "CC", "CUDA_VISIBLE_DEVICES"}


def _source() -> list[str]:
    return [str(Path(__file__).parent.parent)]
