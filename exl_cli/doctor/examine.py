"""All checks in order, those that take long side by side, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl_cli.doctor import child, compiled, gpu, kernels, machine, model
from exl_cli.doctor.child import Answer
from exl_cli.doctor.finding import Finding, Verdict, verdict
from exl_cli.engines.exllamav2.extension import compiled as extension
from exl_cli.engines.exllamav2.extension import environment, lock, toolchain
from exl_cli.errors import ExitCode
from exl_cli.system.machine import usable_cores
from exl_cli.system.units import GIB

# A model is read from disk, and may be gigabytes.
_MODEL_TIMES = 5
_MOST_AT_ONCE = 4
_ROOMY = 4 * GIB


@dataclass
class Examination:
    """One visit.

    Args:
        model: what to check besides the machine, as `loader.resolve` takes it; None for nothing.
        models_dir: likewise.
        seconds: the time limit of each question; loading a model has five times as long.
        terminal: the one that this runs on.
        telling: is told what is being waited for.
    """

    model: str | None
    models_dir: Path | None
    seconds: float
    terminal: machine.Terminal
    telling: Callable[[str], None]
    found: list[Finding] = field(default_factory=list)
    state: compiled.State | None = None

    def findings(self) -> Iterator[Finding]:
        """Every finding as soon as it and those before it are there."""
        pool = ThreadPoolExecutor(min(_MOST_AT_ONCE, usable_cores() + 1))
        # What computes on the GPU takes turns where that is all but full: each holds half a GiB for CUDA itself.
        lane = ThreadPoolExecutor(1)
        try:
            for finding in self._run(pool, lane):
                self.found.append(finding)
                yield finding
        finally:
            for threads in (pool, lane):
                threads.shutdown(wait=False, cancel_futures=True)
            child.stop()

    def _run(self, pool: ThreadPoolExecutor, lane: ThreadPoolExecutor) -> Iterator[Finding]:
        torch = environment.torch_here()

        def ask(probe: str, arguments: Mapping[str, Any] | None = None) -> Future[Answer]:
            return pool.submit(child.ask, probe, self.seconds, arguments)

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
        yield compiled.exllamav2()
        if here_gpu:
            names = ["attention", "kernels", "triton", *(["flash_attn"] if kernels.has_flash_attn() else [])]
            asked |= {name: lane.submit(child.ask, name, self.seconds) for name in names}
        capabilities = [(int(c.details["capability"][0]), int(c.details["capability"][1])) for c in usable]
        if torch is not None and torch.cuda is not None:
            yield from self._extension(torch, capabilities, lane, compute=here_gpu)
        yield from self._tools(torch)

        def answered(name: str, what: str) -> Answer | None:
            return self._wait(what, asked[name]) if name in asked else None

        chosen = answered("attention", "the attention kernels")
        yield kernels.attention(chosen)
        yield kernels.decoding(answered("kernels", "the decoding kernels"))
        yield kernels.triton(answered("triton", "Triton"), chosen)
        yield kernels.flash_attn(answered("flash_attn", "flash-attn"))
        yield machine.cpu_engine(self._wait("the CPU engine", asked["cpu"]))
        yield machine.models(self.models_dir)
        yield machine.hub(self._wait("the Hub", asked["hub"]))
        yield machine.terminal(self.terminal)
        if self.model is not None and verdict(self.found) != "none":
            yield from self._model(cards)

    def _extension(
        self,
        torch: environment.Torch,
        capabilities: list[extension.Capability],
        lane: ThreadPoolExecutor,
        *,
        compute: bool,
    ) -> Iterator[Finding]:
        folder = environment.build_folder(torch)
        found = extension.find(torch, capabilities, folder)
        tried = None
        if found.usable and found.path:
            arguments = {"library": str(found.path), "compute": compute}
            tried = self._wait("the extension", lane.submit(child.ask, "extension", self.seconds, arguments))
        self.state = compiled.State(found, tried, lock.look(folder), toolchain.find(torch), torch, capabilities)
        yield compiled.finding(self.state)
        if line := compiled.lock_finding(self.state):
            yield line
        if capabilities and not self.state.ready and (problem := compiled.folder_finding(folder)):
            yield problem

    def _tools(self, torch: environment.Torch | None) -> Iterator[Finding]:
        needed = self.state is not None and bool(self.state.capabilities) and not self.state.ready
        if self.state is not None and self.state.tools is not None:
            tools = self.state.tools.tools
        else:
            tools = (toolchain.compiler(), toolchain.ninja(), toolchain.headers())
            yield Finding("nvcc", "skip", "of no use to a torch without CUDA")
        for tool in tools:
            yield compiled.tool(tool, needed=needed)

    def _model(self, cards: list[Finding]) -> Iterator[Finding]:
        on_gpu = verdict(self.found) == "gpu" and self.state is not None and self.state.ready

        def ask(probe: str, seconds: float, arguments: dict[str, Any]) -> Answer:
            self.telling(f"{self.model} ({arguments.get('engine', 'cpu')})")
            return child.ask(probe, seconds, arguments)

        if not on_gpu and verdict(self.found) == "gpu":
            yield Finding("On the GPU", "skip", "not tried before the extension is compiled", "exl build")
        free = [int(card.details["free"]) for card in cards if card.details.get("free") is not None]
        yield from model.check(
            str(self.model), self.models_dir, free, gpu=on_gpu, ask=ask, seconds=self.seconds * _MODEL_TIMES
        )

    def _wait(self, what: str, future: Future[Answer]) -> Answer:
        self.telling(what)
        return future.result()

    @property
    def verdict(self) -> Verdict:
        """Where `exl run` will work."""
        return verdict(self.found)

    @property
    def exit_code(self) -> ExitCode:
        """The verdict as an exit code."""
        codes = {"gpu": ExitCode.OK, "cpu": ExitCode.CPU_ONLY, "none": ExitCode.CANNOT_RUN}
        return codes[self.verdict]

    def summary(self) -> str:
        """The verdict in a sentence."""
        if self.verdict == "none":
            return f"exl run does not work here: {self._first('all')}"
        if self.verdict == "cpu":
            flag = " (--engine cpu)" if self._would_take_the_gpu() else ""
            return f"exl run works on the CPU only{flag}: {self._first('gpu')}"
        if self.state is not None and not self.state.ready:
            return "exl run works on the GPU, and compiles exllamav2's extension first; exl build does that now"
        return "exl run works on the GPU"

    def _first(self, blocked: str) -> str:
        # A failure says more than what does not apply because of it.
        order = ("fail", "warn", "skip", "ok")
        found = sorted((f for f in self.found if f.blocks == blocked), key=lambda f: order.index(f.status))
        return f"{found[0].check}: {found[0].found}" if found else ""

    def _would_take_the_gpu(self) -> bool:
        """Whether `--engine auto` would choose the GPU, and fail there."""
        return any(f.check.startswith("GPU ") for f in self.found) and environment.exllamav2_version() is not None
