"""Made-up benchmark results, with figures chosen by the tests."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from exl_cli.bench.plan import Case, Settings
from exl_cli.bench.result import Cold, Measured, Memory, Perplexity, Probe, Result, Run, Sample

GIB = 2**30


def sample_at(test: Case, rate: float, ttft: float = 0.035) -> Sample:
    """A sample of so many tokens per second, its steps spread around their mean."""
    ns = round(1e9 * test.tokens / rate)
    steps: tuple[int, ...] = ()
    if test.n_gen:
        numbers = random.Random(ns)
        step = ns / test.n_gen
        steps = tuple(round(step * numbers.gauss(1, 0.05)) for _ in range(test.n_parallel * test.n_gen))
    return Sample(ns, round(ttft * 1e9), steps, 0, None, 1.0)


def measured(test: Case, rates: Sequence[float], **rest: Any) -> Measured:
    """A test with one sample for each rate."""
    return Measured(test, [sample_at(test, rate) for rate in rates], "2026-11-22T10:00:00Z", **rest)


def gpu_run(
    name: str = "owner/Mistral-7B-EXL2",
    format_name: str = "EXL2 4.0 bpw",
    cache: str = "fp16",
    factor: float = 1.0,
    deviation: float = 0.002,
    perplexity: float | None = None,
    seed: int = 0,
) -> Run:
    """A 7B model on a GPU: rates near those of docs/performance.md, times `factor` for generation."""
    numbers = random.Random(seed)

    def rates(mean: float) -> list[float]:
        return [mean * numbers.gauss(1, deviation) for _ in range(5)]

    size = 4_100_000_000
    tests = [measured(Case(512, 0), rates(14_600), flops=int(512 * 2 * 6.98e9))]
    for depth, base in ((0, 240.0), (4096, 221.0), (16384, 180.0)):
        test = Case(0, 128, depth)
        tests.append(
            measured(test, rates(base * factor), step_bytes=size + 131_072 * depth, kernel_ns=3.5e6, kernels=480.0)
        )
    for parallel, base in ((4, 628.0), (16, 870.0)):
        tests.append(measured(Case(0, 128, 0, parallel), rates(base * factor), step_bytes=size))
    tests.append(measured(Case(512, 128), rates(1_100 * factor)))
    answer = Case(512, 128)
    return Run(
        model={
            "name": name,
            "path": f"/models/{name}",
            "format": "exl2",
            "format_name": format_name,
            "architecture": "MistralForCausalLM",
            "parameters": 7_241_732_096,
            "bits_per_weight": 4.2,
            "context_length": 32768,
            "size_bytes": size,
            "chat_template": True,
            "commit": "0123456789abcdef",
        },
        engine={"name": "exllamav2", "context_length": 32768, "dtype": "float16", "cache": cache, "graphs": "decode"},
        cache=cache,
        load_seconds=4.2,
        tests=tests,
        memory=Memory(2 * GIB, 6 * GIB, 7 * GIB),
        cold=Cold(3.9, 2.1, answer.prompt_ids, answer.new_tokens, sample_at(answer, 60, ttft=0.95)),
        probe=Probe(3.03e12, GIB, 7.9e14, "float16"),
        perplexity=None
        if perplexity is None
        else Perplexity("text.txt", "0" * 64, 10_000, 1024, 512, 8, math.log(perplexity), 0.01),
        others_cpu=0.1,
    )


def result(*runs: Run, **rest: Any) -> Result:
    """A whole result."""
    environment = {"exl": "0.1.0", "os": "Linux", "cpu": "AMD EPYC", "cpu_cores": 16, "gpu": "NVIDIA H100 80GB HBM3"}
    environment |= {"driver": "580.1", "cuda": "13.0", "torch": "2.11.0+cu130", "exllamav2": "0.3.2"}
    settings = Settings(prompt_tokens=(512,), depths=(0, 4096, 16384), batches=(1, 4, 16))
    order = [entry.test.name for run in runs for entry in run.tests for _ in entry.samples]
    fields = {"environment": environment, "order": order, "seconds": 61.0, **rest}
    return Result("0.1.0", settings, {"temperature": 0.85}, "2026-11-22T10:00:00Z", runs=list(runs), **fields)
