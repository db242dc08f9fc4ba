"""Compiles CUDA sources with NVRTC, which every CUDA build of torch brings, and launches what comes out.

No compiler needs to be installed. Binaries are cached in the user's cache folder, keyed by source, options, GPU
architecture and NVRTC version, so a machine compiles each kernel once. Compiling takes about a second per kernel;
`begin` does it in the background.

The calls are those of the CUDA driver API and of NVRTC (https://docs.nvidia.com/cuda/cuda-driver-api,
https://docs.nvidia.com/cuda/nvrtc), found through the library in torch that links both.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import re
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from exl_cli.engines.exllamav2.support import too_old
from exl_cli.errors import EngineError, param
from exl_cli.system.files import user_cache, write_atomically
from exl_cli.system.machine import usable_cores

_HERE = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"$', re.MULTILINE)
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# Of cuTensorMapEncodeTiled: CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_SWIZZLE_128B and
# CU_TENSOR_MAP_L2_PROMOTION_L2_128B.
_FLOAT16, _SWIZZLE_128B, _PROMOTE_128B = 6, 3, 2
_MOST_THREADS = 8
_LEFT_FREE = 2  # cores, for the answer that is being generated meanwhile

# A source file, its macro definitions, and the compute capability.
Build = tuple[str, tuple[tuple[str, int], ...], tuple[int, int]]
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Ahead(Generic[Key, Value]):
    """Results by key, computed in the background before they are asked for.

    An executor would finish its queue before the interpreter ends, and daemon threads crash when the libraries they
    call are torn down. These threads end with the queue, or with the key they are at when the program is over.

    Args:
        work: computes a result; several threads call it at once.
        threads: the most that run in the background.
    """

    def __init__(self, work: Callable[[Key], Value], threads: int) -> None:
        self._work = work
        self._free = threading.Semaphore(threads)
        self._queue: deque[tuple[Key, Future[Value]]] = deque()
        self._futures: dict[Key, Future[Value]] = {}

    def begin(self, keys: Iterable[Key]) -> None:
        """Queue keys in this order, in front of those that are still queued."""
        wanted = {key: Future[Value]() for key in keys if key not in self._futures or self._futures[key].cancel()}
        self._futures.update(wanted)
        self._queue.extendleft(reversed(wanted.items()))
        # Where there are no more threads, those who ask do the work.
        with contextlib.suppress(RuntimeError):
            for _ in wanted:
                if not self._free.acquire(blocking=False):
                    break
                threading.Thread(target=self._serve, name="work ahead", daemon=False).start()

    def forget(self, keys: Iterable[Key]) -> None:
        """Drop keys that are still queued."""
        for key in keys:
            self._futures[key].cancel()

    def done(self, key: Key) -> bool:
        """Whether the result, or an error, is there."""
        return key in self._futures and self._futures[key].done()

    def get(self, key: Key) -> Value:
        """The result. If no thread has begun on the key, or it failed there, compute it in this one."""
        future = self._futures.get(key)
        if future is None or future.cancel() or future.exception():
            future = Future()
            future.set_result(self._work(key))
            self._futures[key] = future
        return future.result()

    def _serve(self) -> None:
        with contextlib.suppress(IndexError):  # the queue is empty
            while threading.main_thread().is_alive():
                key, future = self._queue.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(self._work(key))
                except BaseException as error:
                    future.set_exception(error)
        self._free.release()


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint64), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@lru_cache
def _library() -> Any:
    path = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"cannot load torch's run-time compiler: {error}") from error


def _check(code: int, what: str) -> None:
    if code:
        raise EngineError(f"{what} failed with CUDA error {code}", f"run again with {param('debug')} to see where")


@cache
def source(name: str) -> str:
    """A source file of this folder with its includes expanded."""
    return _INCLUDE.sub(lambda match: source(match[1]), (_HERE / name).read_text(encoding="utf-8"))


def why_not(device: torch.device) -> str:
    """Why the kernels of this folder cannot run on a device, in a few words; empty where they can.

    Tries one of them: a fraction of a second the first time.
    """
    if reason := too_old(device):
        return reason
    try:
        Kernel("step.cu", "rms_norm", {}, device)
    except EngineError as error:
        return error.message
    return ""


def write_tensor_map(address: int, matrix: torch.Tensor, box: tuple[int, int]) -> None:
    """Write a CUtensorMap, from which the copy engine learns how to copy boxes of a matrix, swizzled over 128 bytes.

    Args:
        address: of 128 bytes, a multiple of 64.
        matrix: float16, shape (rows, columns), rows at any stride that is a multiple of 16 bytes.
        box: columns and rows of a box, at most 64 and 256; what lies outside the matrix is copied as zeros.

    Raises:
        EngineError: the driver refuses.
    """
    rows, columns = matrix.shape
    code = _library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), _FLOAT16, 2, ctypes.c_void_p(matrix.data_ptr()),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * matrix.stride(0)),
        (ctypes.c_uint32 * 2)(*box), (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLE_128B, _PROMOTE_128B, 0,
    )  # fmt: skip
    _check(code, "describing a matrix")


def begin(file: str, builds: Iterable[Mapping[str, int]], device: torch.device) -> list[Build]:
    """Compile in the background what `Kernel` will want, ahead of what is queued already.

    Errors are raised by the `Kernel` that wants the build.

    Args:
        file, device: as of `Kernel`.
        builds: the `defines` of each, in the order in which they will be wanted.

    Returns:
        The builds, for `forget`.
    """
    capability = torch.cuda.get_device_capability(device)
    queued = [(file, tuple(sorted(defines.items())), capability) for defines in builds]
    _binaries.begin(queued)
    return queued


def forget(builds: Iterable[Build]) -> None:
    """Drop builds that are still queued."""
    _binaries.forget(builds)


def done(builds: Iterable[Build]) -> bool:
    """Whether all of them are compiled, or cannot be."""
    return all(_binaries.done(build) for build in builds)


class Kernel:
    """A function on the GPU.

    Args:
        name: the function; its file is the first word of `file`.
        file: the `.cu` file it is in.
        defines: macros that the source expects to be defined.
        device: where it runs.
        shared_bytes: dynamic shared memory of a block.

    Raises:
        EngineError: it cannot be compiled or loaded here.
    """

    def __init__(
        self, file: str, name: str, defines: Mapping[str, int], device: torch.device, shared_bytes: int = 0
    ) -> None:
        self._shared_bytes, self._device = shared_bytes, device
        self._function = _function(file, name, tuple(sorted(defines.items())), device, shared_bytes)

    def bind(self, grid: tuple[int, ...], threads: int, argument: ctypes.Structure) -> Launch:
        """A launch with this argument, which may be changed between launches.

        Args:
            grid: blocks, up to three dimensions.
            threads: threads of a block.
            argument: the function's one parameter.

        Where the GPU can (compute capability 9.0) it starts while the kernel before it ends: all functions here wait
        for what they need of that one.
        """
        overlaps = torch.cuda.get_device_capability(self._device) >= (9, 0)
        attribute = _Attribute(_PROGRAMMATIC, (ctypes.c_uint32 * 16)(1))
        dimensions = [(ctypes.c_uint * 3)(*(*sizes, 1, 1)[:3]) for sizes in (grid, (threads,))]
        config = _Config(*dimensions, self._shared_bytes, None, ctypes.pointer(attribute), int(overlaps))
        return Launch(self._function, config, argument)

    def resident(self, threads: int) -> int:
        """Most blocks of this many threads that are resident on a multiprocessor at once."""
        blocks = ctypes.c_int()
        with torch.cuda.device(self._device):
            code = _library().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), self._function, threads, ctypes.c_size_t(self._shared_bytes)
            )
        _check(code, "asking how many blocks are resident")
        return blocks.value


@cache
def _function(
    file: str, name: str, defines: tuple[tuple[str, int], ...], device: torch.device, shared_bytes: int
) -> ctypes.c_void_p:
    """The driver's handle of a function, loaded once."""
    library = _library()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context that the driver's calls need
        binary = _binaries.get((file, defines, torch.cuda.get_device_capability(device)))
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(library.cuModuleLoadData(ctypes.byref(module), binary), f"loading {file}")
        _check(library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
        if shared_bytes > 48 * 1024:
            _check(
                library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes),
                f"asking for {shared_bytes:,} bytes of shared memory for {name}",
            )
    return function


class Launch:
    """A kernel with its grid and argument; call it with a stream to run it."""

    def __init__(self, function: Any, config: _Config, argument: ctypes.Structure) -> None:
        self.argument = argument
        self._function, self._config = function, config
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        self._by_reference = ctypes.byref(config)
        self._launch = _library().cuLaunchKernelEx

    def __call__(self, stream: int) -> None:
        """Run it in order on a stream, by its handle.

        Raises:
            EngineError: the driver refuses.
        """
        self._config.stream = stream
        code = self._launch(self._by_reference, self._function, self._parameters, None)
        if code:
            _check(code, "launching a kernel")


def _binary(build: Build) -> bytes:
    file = build[0]
    library = _library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "asking NVRTC for its version")
    options = _options(build)
    key = hashlib.sha256("\n".join([source(file), *options, f"{major.value}.{minor.value}"]).encode()).hexdigest()[:24]
    path = user_cache() / "kernels" / f"{Path(file).stem}-{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        binary = compiled(library, build)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time at the next start, nothing else
        write_atomically(path, binary)
    return binary


def _options(build: Build) -> list[str]:
    _, defines, capability = build
    # wgmma instructions exist on one architecture only (sm_90a); later ones do not support them.
    alone = "a" if dict(defines).get("WGMMA") else ""
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{alone}", "--std=c++17", "-default-device"]
    return options + [f"-D{name}={value}" for name, value in defines]


def compiled(library: Any, build: Build) -> bytes:
    """What NVRTC makes of a build, a cubin; this needs no GPU.

    Args:
        library: NVRTC.
        build: what to compile.

    Raises:
        EngineError: it cannot be compiled.
    """
    file, options = build[0], _options(build)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    code = library.nvrtcCreateProgram(ctypes.byref(program), source(file).encode(), file.encode(), 0, None, None)
    _check(code, f"reading {file}")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments):
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise EngineError(f"cannot compile {file} for this GPU: {log.value.decode(errors='replace')[:500]}")
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), f"compiling {file}")
        binary = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, binary), f"compiling {file}")
        return binary.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


_binaries = Ahead(_binary, max(1, min(_MOST_THREADS, usable_cores() - _LEFT_FREE)))
