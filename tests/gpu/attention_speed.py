"""What attention over pages costs: microseconds per call, beside the time that reading the keys and values must take.

    python tests/gpu/attention_speed.py

Decoding is timed in a CUDA graph of calls on caches of their own, more of them than the GPU's second-level cache
holds, as the layers of a model are. 32 query heads, 8 KV heads of 128, as Llama 3 8B and Mistral 7B have.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from functools import partial

import torch

from exl_cli.engines.exllamav2.attention.paged import NAMES, VARIABLE, attend_paged, backend
from exl_cli.errors import EngineError

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 256
MORE_THAN_CACHED = 160 << 20


def milliseconds(call: Callable[[], object], repetitions: int) -> float:
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repetitions):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repetitions


def copy_rate() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), 10) * 1000


class Layers:
    """As many layers' caches as are needed to defeat the GPU's own, and a step's call on each."""

    def __init__(self, batch: int, q_len: int, past: int) -> None:
        each = -(-(past + q_len) // PAGE)
        self.bytes = batch * (past + q_len) * KV_HEADS * DIM * 2 * 2
        count = min(64, 1 + MORE_THAN_CACHED // self.bytes)
        shape = 2, batch * each, PAGE, KV_HEADS, DIM
        self.caches = [torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(count)]
        self.table = torch.randperm(batch * each, device="cuda").int().view(batch, each)
        self.lengths = torch.full((batch,), past, dtype=torch.int32, device="cuda")
        buffer = torch.randn(batch, q_len, HEADS + 2 * KV_HEADS, DIM, device="cuda", dtype=torch.float16)
        self.q, self.k, self.v = buffer.split([HEADS, KV_HEADS, KV_HEADS], 2)
        self.max_len = past + q_len

    def attend(self, layer: int) -> torch.Tensor:
        k_cache, v_cache = self.caches[layer]
        return attend_paged(
            self.q,
            k_cache,
            v_cache,
            cache_seqlens=self.lengths,
            block_table=self.table,
            k=self.k,
            v=self.v,
            scale=DIM**-0.5,
            max_len=self.max_len,
        )

    def step(self) -> None:
        for layer in range(len(self.caches)):
            self.attend(layer)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs may still be on their way
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            call()
    torch.cuda.synchronize()
    return graph.replay


def available() -> list[str]:
    names = []
    for name in NAMES:
        os.environ[VARIABLE] = name
        try:
            backend()
        except EngineError as error:
            print(f"{name}: {error.message}")
        else:
            names.append(name)
    return names


def decode(names: list[str], rate: float) -> None:
    names = [name for name in names if name != "torch"]
    print("\ndecode, µs a call" + "".join(f"{name:>14}" for name in ("floor", *names)))
    for batch, q_len, context in [
        *itertools.product((1, 4, 16), (1,), (512, 768, 4096, 16384)),
        (1, 4, 768),
        (1, 8, 768),
    ]:
        layers = Layers(batch, q_len, context - q_len)
        times = []
        for name in names:
            os.environ[VARIABLE] = name
            times.append(milliseconds(captured(layers.step), 10) / len(layers.caches) * 1000)
        row = "".join(f"{time:14.1f}" for time in (layers.bytes / rate * 1e6, *times))
        print(f"{batch:3} x {q_len} at {context:6}{row}")
        del layers


def prefill(names: list[str]) -> None:
    print("\nprompt, µs a call (TFLOP/s)" + "".join(f"{name:>18}" for name in names))
    for past, q_len in itertools.product((0, 4096), (512, 2048)):
        layers = Layers(1, q_len, past)
        work = 4 * HEADS * DIM * (q_len * past + q_len * q_len / 2)
        row = ""
        for name in names:
            os.environ[VARIABLE] = name
            time = milliseconds(partial(layers.attend, 0), 20)
            row += f"{time * 1000:10.1f} ({work / time / 1e9:4.0f})"
        print(f"{q_len:5} after {past:5}         {row}")


if __name__ == "__main__":
    found = available()
    bandwidth = copy_rate()
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s")
    decode(found, bandwidth)
    prefill(found)
