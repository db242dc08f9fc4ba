"""Lower bounds, their reasons, GPU readings and perplexity, against independently computed figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchdata
import numpy as np
import pytest
import tinymodels
import torch
from benchfakes import PacedEngine
from safetensors import safe_open

from exl_cli import loader
from exl_cli.api.engine_thread import EngineThread
from exl_cli.bench import limits, measure
from exl_cli.bench.machine import Watch
from exl_cli.bench.plan import Case
from exl_cli.bench.result import Measured, Probe, Run
from exl_cli.engines import probe
from exl_cli.errors import DiskError, PromptError
from exl_cli.system.nvml import Driver


def test_the_bytes_of_a_step_on_the_cpu(exl2_dir: Path) -> None:
    info = loader.resolve(str(exl2_dir))
    # fable-7m's parameters as its own description counts them, all float32, its embeddings tied: the head reads them.
    # 8 layers, 2 heads of 64 for keys and values; at depth 100 the 11 timed tokens attend to 101 to 111 tokens.
    expected = 4 * 7_344_384 + 8 * 2 * 2 * 64 * 4 * (100 + 12 / 2)
    case = Case(0, 11, 100)
    assert limits.step_bytes(info, case, "fp16", "float32", unpacked=True) == pytest.approx(expected, abs=1)
    more = limits.step_bytes(info, replace(case, n_parallel=3), "fp16", "float32", unpacked=True)
    assert more == pytest.approx(expected + 2 * 8 * 2 * 128 * 4 * 106, abs=1)
    # A sliding window bounds what is read of the cache.
    narrow = replace(info, config={**info.config, "sliding_window": 64})
    less = limits.step_bytes(narrow, case, "fp16", "float32", unpacked=True)
    assert less == pytest.approx(expected - 8 * 2 * 128 * 4 * (106 - 64), abs=1)


def test_the_bytes_of_a_step_on_a_gpu_are_those_of_the_file(gptq_dir: Path) -> None:
    info = loader.resolve(str(gptq_dir))
    with safe_open(gptq_dir / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    embeddings = stored["model.embed_tokens.weight"]
    # The packed layers as they are, and the embedding matrix once as the float16 head that it is tied to.
    weights = sum(stored.values()) - embeddings + 2 * 4096 * 256
    values = 8 * 2 * 128 * (512 + 129 / 2)
    for cache, bits in (("fp16", 16), ("q8", 8.5), ("q4", 4.5)):
        size = limits.step_bytes(info, Case(0, 128, 512), cache, "float16", unpacked=False)
        assert size == pytest.approx(weights + values * bits / 8, rel=1e-6)


def test_experts_that_are_not_used_are_not_read(tmp_path: Path) -> None:
    tinymodels.write(tmp_path / "model", tinymodels.Variant("float"))
    info = loader.resolve(str(tmp_path / "model"))
    case = Case(0, 4)
    whole = limits.step_bytes(info, case, "fp16", "float16", unpacked=False) or 0
    # The same file, with its MLPs called experts, of which a token uses one in four.
    renamed = {name.replace(".mlp.", ".mlp.experts.0."): t for name, t in info.tensors.items()}
    tensors = {name: replace(tensor, name=name) for name, tensor in renamed.items()}
    config = {**info.config, "num_local_experts": 4, "num_experts_per_tok": 1}
    moe = replace(info, tensors=tensors, config=config)
    mlp = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    share = mlp / sum(t.nbytes for t in tensors.values())
    cached = 2 * 2 * 128 * 2 * (1 + 2.5)
    expected = (whole - cached) * (1 - 0.75 * share) + cached
    assert limits.step_bytes(moe, case, "fp16", "float16", unpacked=False) == pytest.approx(expected, rel=0.001)
    unknown = replace(moe, config=info.config)
    assert limits.step_bytes(unknown, case, "fp16", "float16", unpacked=False) is None


def test_the_work_of_a_prompt(exl2_dir: Path) -> None:
    config = json.loads((exl2_dir / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries, keys = 4 * 64, 2 * 64
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner
    expected = 512 * 2 * layers * layer + layers * sum(4 * queries * seen for seen in range(1, 513))
    flops = limits.prompt_flops(loader.resolve(str(exl2_dir)), Case(512, 0))
    assert flops == pytest.approx(expected, rel=0.01)


def generation(run: Run) -> Measured:
    return next(entry for entry in run.tests if entry.test == Case(0, 128))


def test_the_share_of_the_limit() -> None:
    run = benchdata.gpu_run(deviation=0.0)
    entry = generation(run)
    limit = limits.limit(run, entry)
    assert limit is not None
    # 4.1 GB at 3.03 TB/s, of the 1/240 s that a token takes.
    assert (limit.ns, limit.share) == (pytest.approx(4.1 / 3.03 * 1e6), pytest.approx(4.1 / 3030 * 240, rel=1e-3))
    prompt = limits.limit(run, run.tests[0])
    assert prompt is not None
    assert prompt.share == pytest.approx(2 * 6.98e9 * 14_600 / 7.9e14, rel=1e-3)
    run.probe = None
    assert limits.limit(run, entry) is None
    assert limits.verdict(run, entry) == ""


@pytest.mark.parametrize(
    ("kernel_ns", "bandwidth", "begins"),
    [
        (4e6, 1.3e12, "memory-bound: reading its 3.82 GiB"),
        (2e6, 3.03e12, "launch-bound: the GPU computes for 2.00 ms of a step's 4.17 ms (48%), in 480 kernels"),
        (4e6, 3.03e12, "kernel-bound: the GPU is busy 96% of the time"),
        (None, 3.03e12, "not memory-bound"),
    ],
)
def test_what_holds_a_gpu_back(kernel_ns: float | None, bandwidth: float, begins: str) -> None:
    run = benchdata.gpu_run(deviation=0.0)
    run.probe = Probe(bandwidth, 2**30, 7.9e14, "float16")
    entry = generation(run)
    entry.kernel_ns = kernel_ns
    assert limits.verdict(run, entry).startswith(begins)
    assert "4.17 ms" in limits.verdict(run, entry)


@pytest.mark.parametrize(
    ("share", "begins"),
    [(1.0, "CPU-bound: 1.0 of 2 threads busy"), (0.6, "CPU-starved: 0.6 cores of CPU time")],
)
def test_what_holds_a_cpu_back(share: float, begins: str) -> None:
    run = benchdata.gpu_run(deviation=0.0)
    run.memory = replace(run.memory, allocator=None)
    run.engine, run.others_cpu = {"name": "cpu", "threads": "2"}, 1.2
    entry = generation(run)
    entry.samples = [replace(sample, cpu_share=share) for sample in entry.samples]
    busy = ", while other programs used 1.2; reading its 3.82 GiB"
    assert limits.verdict(run, entry).startswith(begins + busy)


def test_the_gpu_is_asked_for_energy_clocks_and_other_processes() -> None:
    processes, reasons, closed = {100}, [0, 4, 4 | 32, 1], []
    nvml = SimpleNamespace(
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: f"card {index}",
        nvmlDeviceGetHandleByUUID={"GPU-1": "card 0"}.__getitem__,
        nvmlDeviceGetUUID={"card 0": "GPU-1"}.__getitem__,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=pid) for pid in processes],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1000,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons.pop(0),
        nvmlShutdown=lambda: closed.append(True),
    )
    watch = Watch(Driver(nvml))
    watch.attach(["GPU-1"])
    assert (watch.driver, watch.joules()) == ("580.1", 1.0)
    for _ in range(4):
        watch.look()
    assert watch.most_used is None  # this card withholds it
    processes.add(7)  # ours, under whatever number
    assert watch.warnings() == [
        "the GPU's clock was throttled at the end of some of 4 repetitions: power cap 2, heat 1",
        "1 other process used GPU memory (see which with nvidia-smi)",
    ]
    processes.remove(100)
    watch.slowed.clear()
    assert watch.warnings() == []
    watch.close()
    assert closed
    for blind in (watch, Watch(Driver(None))):
        blind.look()
        assert (blind.joules(), blind.most_used, blind.warnings()) == (None, None, [])


@pytest.mark.parametrize(
    ("granted", "link"),
    [({0, 2}, "NVLink"), ({0}, "PCIe"), (set(), "PCIe, through host memory")],  # nvml.h: reading is 0, NVLink is 2
)
def test_the_link_between_gpus(granted: set[int], link: str) -> None:
    nvml = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 0,
        nvmlDeviceGetHandleByUUID=str,
        nvmlDeviceGetP2PStatus=lambda first, second, kind: 0 if kind in granted else 3,
    )
    watch = Watch(Driver(nvml))
    watch.attach(["GPU-1", "GPU-2", "GPU-3"])
    assert watch.link() == link
    watch.attach(["GPU-1"])
    assert watch.link() is None
    blind = Watch(Driver(None))
    blind.attach(["GPU-1", "GPU-2"])
    assert blind.link() is None


def test_time_in_which_any_kernel_runs() -> None:
    assert probe.covered([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4
    assert probe.covered([]) == 0


def test_the_probe_measures_this_machine() -> None:
    rate, size = probe.bandwidth("cpu", 3_000_000)
    assert size == 3_000_000
    assert 1e8 < rate < 1e13
    assert 1e8 < probe.matrix_rate("cpu", "float32") < 1e14


@pytest.mark.parametrize(("length", "window", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (37, 8, 4), (100, 8, 3)])
def test_windows_predict_every_token_once(length: int, window: int, stride: int) -> None:
    predicted: list[int] = []
    for begin, end, count in measure.windows(length, window, stride):
        assert end - begin <= window
        assert begin == 0 or end - count - begin >= window - stride  # the context that even its first token has
        predicted += range(end - count, end)
    assert predicted == list(range(1, length))


class Numbers:
    """A tokenizer whose tokens are numbers written out."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [int(word) for word in text.split()]


class StepEngine(PacedEngine):
    """Remembers how it was asked."""

    def cached_logits(self, ids: Any, step: int) -> torch.Tensor:
        self.step_asked = step
        return self.logits(ids)


def test_perplexity_of_a_known_distribution(tmp_path: Path) -> None:
    # The engine gives a token's successor 2/51 and any other 1/51. Of 29 predictions 19 are successors.
    ids = [*range(20), *[7] * 10]
    (tmp_path / "text").write_text(" ".join(map(str, ids)))
    progress: list[tuple[int, int]] = []
    engine = StepEngine(context_length=8)
    thread = EngineThread(engine)
    result = measure.perplexity(thread, Numbers(), tmp_path / "text", lambda *at: progress.append(at))  # type: ignore[arg-type]
    thread.close()
    nlls = [-math.log(2 / 51)] * 19 + [-math.log(1 / 51)] * 10
    assert result.tokens == 29
    assert result.mean_nll == pytest.approx(np.mean(nlls), rel=1e-5)
    assert result.value == pytest.approx(math.exp(np.mean(nlls)), rel=1e-5)
    assert result.error == pytest.approx(result.value * np.std(nlls, ddof=1) / math.sqrt(29), rel=1e-5)
    assert (result.window, result.stride, result.step, engine.step_asked) == (8, 4, measure.STEP, measure.STEP)
    assert progress[-1] == (29, 29)


def test_texts_that_have_no_perplexity(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, error, words in (
        ("one", PromptError, "1 tokens"),
        ("bytes", PromptError, "not UTF-8"),
        ("none", DiskError, "No such file"),
    ):
        with pytest.raises(error, match=words):
            measure.perplexity(EngineThread(PacedEngine()), Numbers(), tmp_path / name, lambda *_: None)  # type: ignore[arg-type]
