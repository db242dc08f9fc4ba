"""All checks in order, the slow ones side by side, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl_cli.doctor import extension, gpu, machine, model, probes
from exl_cli.doctor.check_result import CheckResult, Verdict, verdict
from exl_cli.doctor.probes import Answer
from exl_cli.engines.exllamav2.extension import compiled, environment, toolchain
from exl_cli.errors import ExitCode, param
from exl_cli.system.machine import usable_cores
from exl_cli.system.units import GIB

# A model is read from disk, and may be gigabytes.
_MODEL_TIMES = 5
_MOST_AT_ONCE = 4
_ROOMY = 4 * GIB


@dataclass
class Doctor:
    """One examination.

    Args:
        model: to check besides the machine, as `loader.resolve` takes it.
        models_dir: likewise.
        seconds: the time limit of each question; loading a model has five times as long.
        terminal: the one that this runs on.
        on_wait: takes the name of a check that takes long.
    """

    model: str | None
    models_dir: Path | None
    seconds: float
    terminal: machine.Terminal
    on_wait: Callable[[str], None]
    _results: list[CheckResult] = field(default_factory=list)
    _extension: extension.State | None = None

    def results(self) -> Iterator[CheckResult]:
        """Every result as soon as it and those before it are there."""
        pool = ThreadPoolExecutor(min(_MOST_AT_ONCE, usable_cores() + 1))
        # On an all but full GPU the probes take turns: each holds half a GiB for CUDA itself.
        lane = ThreadPoolExecutor(1)
        try:
            for result in self._run(pool, lane):
                self._results.append(result)
                yield result
        finally:
            for threads in (pool, lane):
                threads.shutdown(wait=False, cancel_futures=True)
            probes.stop()

    def _run(self, pool: ThreadPoolExecutor, lane: ThreadPoolExecutor) -> Iterator[CheckResult]:
        torch = environment.torch_here()

        def ask(probe: str, arguments: Mapping[str, Any] | None = None) -> Future[Answer]:
            return pool.submit(probes.ask, probe, self.seconds, arguments)

        asked = {"torch": ask("torch"), "cpu": ask("cpu"), "hub": ask("hub", {"timeout": min(10.0, self.seconds)})}
        yield machine.python()
        yield machine.processor()
        answer = self._wait("torch", asked["torch"])
        yield gpu.torch(torch, answer)
        yield gpu.driver(torch)
        cards = gpu.gpus(answer, torch)
        yield from cards
        usable = [card for card in cards if "capability" in card.details]
        if min((card.details["free"] or 0 for card in usable), default=0) > _ROOMY:
            lane = pool
        here_gpu = bool(usable) and any(not card.blocks for card in cards)
        yield extension.exllamav2()
        if here_gpu:
            names = ["attention", "kernels", "triton"]
            asked |= {name: lane.submit(probes.ask, name, self.seconds) for name in names}
        capabilities = [(int(c.details["capability"][0]), int(c.details["capability"][1])) for c in usable]
        if torch is not None and torch.cuda is not None:
            yield from self._check_extension(torch, capabilities, lane, here_gpu)
        yield from self._check_tools()

        def answered(name: str, what: str) -> Answer | None:
            return self._wait(what, asked[name]) if name in asked else None

        chosen = answered("attention", "the attention kernels")
        yield gpu.attention(chosen)
        yield gpu.decoding(answered("kernels", "the decoding kernels"))
        yield gpu.triton(answered("triton", "Triton"), chosen)
        yield gpu.flash_attn()
        yield machine.cpu_engine(self._wait("the CPU engine", asked["cpu"]))
        yield machine.models(self.models_dir)
        yield machine.hub(self._wait("the Hub", asked["hub"]))
        yield machine.terminal(self.terminal)
        if self.model is not None and self.verdict != "none":
            yield from self._check_model(self.model, cards)

    def _check_extension(
        self,
        torch: environment.Torch,
        capabilities: list[compiled.Capability],
        lane: ThreadPoolExecutor,
        compute: bool,
    ) -> Iterator[CheckResult]:
        here = compiled.find(torch, capabilities)
        tried = None
        if here.usable and here.path:
            arguments = {"library": str(here.path), "compute": compute}
            tried = self._wait("the extension", lane.submit(probes.ask, "extension", self.seconds, arguments))
        state = extension.State(here, tried, toolchain.find(torch), torch, capabilities)
        self._extension = state
        root = environment.build_root()
        yield extension.extension(state)
        if result := extension.build_lock(root):
            yield result
        if capabilities and not state.ready and (result := extension.build_folder(root)):
            yield result

    def _check_tools(self) -> Iterator[CheckResult]:
        state = self._extension
        if state is None:
            yield CheckResult("nvcc", "skip", "of no use to a torch without CUDA")
        needed = state is not None and bool(state.capabilities) and not state.ready
        for tool in state.tools if state else (toolchain.compiler(), toolchain.ninja(), toolchain.headers()):
            yield extension.tool(tool, needed=needed)

    def _check_model(self, name: str, cards: list[CheckResult]) -> Iterator[CheckResult]:
        gpu_works = self.verdict == "gpu"
        on_gpu = gpu_works and self._extension is not None and self._extension.ready

        def ask(probe: str, seconds: float, arguments: dict[str, Any]) -> Answer:
            self.on_wait(f"{name} ({arguments.get('engine', 'cpu')})")
            return probes.ask(probe, seconds, arguments)

        if gpu_works and not on_gpu:
            yield CheckResult("On the GPU", "skip", "not tried before the extension is compiled", "exl build")
        free = [int(card.details["free"]) for card in cards if card.details.get("free") is not None]
        seconds = self.seconds * _MODEL_TIMES
        yield from model.check(name, self.models_dir, free, gpu=on_gpu, ask=ask, seconds=seconds)

    def _wait(self, what: str, future: Future[Answer]) -> Answer:
        self.on_wait(what)
        return future.result()

    @property
    def verdict(self) -> Verdict:
        """Where `exl run` will work, as far as checked."""
        return verdict(self._results)

    @property
    def exit_code(self) -> ExitCode:
        """The verdict as an exit code."""
        return {"gpu": ExitCode.OK, "cpu": ExitCode.CPU_ONLY, "none": ExitCode.CANNOT_RUN}[self.verdict]

    def summary(self) -> str:
        """The verdict in a sentence."""
        if self.verdict == "none":
            return f"exl run does not work here: {self._first('all')}"
        if self.verdict == "cpu":
            # Whether `--engine auto` would choose the GPU, and fail there.
            gpus = any(result.check.startswith("GPU ") for result in self._results)
            engine = f" ({param('engine')} cpu)" if gpus and environment.exllamav2_version() is not None else ""
            return f"exl run works on the CPU only{engine}: {self._first('gpu')}"
        if self._extension is not None and not self._extension.ready:
            return "exl run works on the GPU, and compiles exllamav2's extension first; exl build does that now"
        return "exl run works on the GPU"

    def _first(self, blocked: str) -> str:
        # A failure says more than a check that does not apply because of it.
        order = ("fail", "warn", "skip", "ok")
        results = sorted((r for r in self._results if r.blocks == blocked), key=lambda r: order.index(r.status))
        return f"{results[0].check}: {results[0].message}" if results else ""
