"""Run all checks in order, the slow ones in parallel, and draw the conclusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from exl_cli.doctor import extension, gpu, machine, model, probes
from exl_cli.doctor.check_result import CheckResult
from exl_cli.engines.exllamav2.extension import compiled, smoke_test
from exl_cli.errors import ExitCode, param
from exl_cli.system import questions
from exl_cli.system.machine import usable_cores
from exl_cli.system.questions import Answer, Respondent
from exl_cli.system.units import GIB

# Time limit for loading a model, in multiples of the usual one.
_MODEL_TIMES = 5
_MAX_PARALLEL = 4
# With less free GPU memory, probes run one at a time.
_ROOMY = 4 * GIB

Verdict = Literal["gpu", "cpu", "none"]


@dataclass
class Doctor:
    """One run of the checks.

    Args:
        model: also check this model; see `loader.resolve`.
        models_dir: see `loader.resolve`.
        seconds: time limit per probe; a model gets five times as long.
        terminal: properties of the terminal.
        on_wait: called with the name of a slow check before waiting for it.
    """

    model: str | None
    models_dir: Path | None
    seconds: float
    terminal: machine.Terminal
    on_wait: Callable[[str], None]
    # Imports torch and transformers once, for the checks of both and for a model on the CPU.
    _cpu: Respondent = field(default_factory=lambda: Respondent(probes.__name__))
    _results: list[CheckResult] = field(default_factory=list)
    _ready: bool = False

    def results(self) -> Iterator[CheckResult]:
        """Yield the results in order, each as soon as it is ready."""
        pool = ThreadPoolExecutor(min(_MAX_PARALLEL, usable_cores() + 1))
        # Every probe needs half a GiB for its CUDA context, so on a nearly full GPU they run one at a time.
        lane = ThreadPoolExecutor(1)
        imports = ThreadPoolExecutor(1)
        try:
            for result in self._run(pool, lane, imports):
                self._results.append(result)
                yield result
        finally:
            for threads in (pool, lane, imports):
                threads.shutdown(wait=False, cancel_futures=True)
            questions.stop()

    def _run(self, pool: Executor, lane: Executor, imports: Executor) -> Iterator[CheckResult]:
        torch = compiled.torch_here()
        asked: dict[str, Future[Answer]] = {
            "torch": imports.submit(self._ask_torch),
            "cpu": imports.submit(self._cpu.ask, "cpu", self.seconds),
            "hub": self._ask(pool, "hub", {"timeout": min(10.0, self.seconds)}),
        }
        yield machine.python()
        yield machine.processor()
        answer = self._wait("torch", asked["torch"])
        yield gpu.torch(torch, answer)
        yield gpu.driver(torch)
        cards = gpu.gpus(answer, torch)
        yield from cards
        yield from gpu.links(answer)
        usable = [card for card in cards if "capability" in card.details]
        free = [int(card.details["free"]) for card in usable if card.details["free"] is not None]
        if len(free) == len(usable) and min(free, default=0) > _ROOMY:
            lane = pool
        works = bool(usable) and any(not card.blocks for card in cards)
        yield extension.exllamav2()
        if works:
            asked |= {name: self._ask(lane, name) for name in ("attention", "kernels")}

        def try_out(library: Path) -> Answer:
            arguments = {"library": str(library), "compute": works}
            return self._wait("the extension", self._ask(lane, "examine", arguments, smoke_test.__name__))

        capabilities = [(int(c.details["capability"][0]), int(c.details["capability"][1])) for c in usable]
        self._ready = yield from extension.check(torch, capabilities, try_out)
        attention = self._wait("the attention kernels", asked["attention"]) if works else None
        yield gpu.attention(attention)
        yield gpu.decoding(self._wait("the decoding kernels", asked["kernels"]) if works else None)
        yield gpu.triton(attention)
        yield gpu.flash_attn()
        yield machine.cpu_engine(self._wait("the CPU engine", asked["cpu"]))
        yield machine.models(self.models_dir)
        yield machine.hub(self._wait("the Hub", asked["hub"]))
        yield machine.terminal(self.terminal)
        if self.model is not None and self.verdict != "none":
            yield from self._check_model(self.model, free)

    def _check_model(self, name: str, free: list[int]) -> Iterator[CheckResult]:
        def ask(probe: str, arguments: dict[str, Any]) -> Answer:
            self.on_wait(f"{name} ({arguments.get('engine', 'cpu')})")
            seconds = self.seconds * _MODEL_TIMES
            if works:
                return questions.ask(probes.__name__, probe, seconds, arguments)
            return self._cpu.ask(probe, seconds, arguments)

        works = self.verdict == "gpu"
        if works and not self._ready:
            yield CheckResult("On the GPU", "skip", "skipped: the extension is not compiled yet", "exl build")
        yield from model.check(name, self.models_dir, free, gpu=works and self._ready, ask=ask)

    def _ask_torch(self) -> Answer:
        answer = self._cpu.ask("torch", self.seconds)
        if answer.value and answer.value["gpus"]:  # give their memory back
            self._cpu.close()
        return answer

    def _ask(
        self, pool: Executor, probe: str, arguments: Mapping[str, Any] | None = None, module: str = probes.__name__
    ) -> Future[Answer]:
        return pool.submit(questions.ask, module, probe, self.seconds, arguments)

    def _wait(self, what: str, future: Future[Answer]) -> Answer:
        self.on_wait(what)
        return future.result()

    @property
    def verdict(self) -> Verdict:
        """Where `exl run` works: "gpu", "cpu" or "none"."""
        blocked = {result.blocks for result in self._results}
        return "none" if "all" in blocked else "cpu" if "gpu" in blocked else "gpu"

    @property
    def exit_code(self) -> ExitCode:
        return {"gpu": ExitCode.OK, "cpu": ExitCode.CPU_ONLY, "none": ExitCode.CANNOT_RUN}[self.verdict]

    def summary(self) -> str:
        """The verdict as a sentence."""
        if self.verdict == "none":
            return f"exl run does not work on this machine ({self._first('all')})"
        if self.verdict == "cpu":
            # With a GPU and exllamav2 present, `--engine auto` would choose the GPU and fail: suggest `--engine cpu`.
            gpus = any(result.check.startswith("GPU ") for result in self._results)
            engine = f", with {param('engine')} cpu" if gpus and compiled.exllamav2_version() is not None else ""
            return f"exl run works on the CPU only{engine} ({self._first('gpu')})"
        if not self._ready:
            return (
                "exl run works on the GPU, but the first run compiles exllamav2's extension; run exl build to do it now"
            )
        return "exl run works on the GPU"

    def _first(self, blocked: str) -> str:
        # A failure explains more than the checks that were skipped because of it.
        order = ("fail", "warn", "skip", "ok")
        first = min((r for r in self._results if r.blocks == blocked), key=lambda r: order.index(r.status))
        return f"{first.check}: {first.message}"
