"""The questions that may crash or hang, each asked in a child process with a time limit: `ask`.

The functions below `ask` run in that child. Each returns JSON-ready facts, and imports what it needs by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_cli.engines.exllamav2.extension import failures
from exl_cli.errors import ExlError, param
from exl_cli.models.load_options import EngineChoice, LoadOptions
from exl_cli.system import processes
from exl_cli.system.nvml import Driver, open_driver

_asked: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Answer:
    """How a question ended.

    Attributes:
        value: the facts; None where there is no answer.
        problem: why there is none, in a few words: "crashed (SIGSEGV)", "hung: no answer in 30 s", an exception's text.
        kind: of the problem: "hang", "crash" or "error".
    """

    value: dict[str, Any] | None
    problem: str = ""
    kind: str = ""

    @property
    def said(self) -> str:
        """The problem without an exception's class: "exl_cli.errors.EngineError: …"."""
        head, colon, rest = self.problem.partition(": ")
        return rest if self.kind == "error" and colon and " " not in head else self.problem

    @property
    def failure(self) -> str:
        """The problem as a predicate: "crashed (SIGSEGV)", "fails: no such file"."""
        return f"fails: {self.said}" if self.kind == "error" else self.problem

    def fix(self, otherwise: str) -> str:
        """The next step: more patience where it hung."""
        slow = f"exl doctor {param('timeout')} 300, in case this machine is slow"
        return slow if self.kind == "hang" else otherwise


def ask(
    probe: str, seconds: float, arguments: Mapping[str, Any] | None = None, module: str = "exl_cli.doctor.probes"
) -> Answer:
    """Run a probe in a separate process and session.

    Args:
        probe: the function's name.
        seconds: after which it counts as hanging.
        arguments: the function's, JSON-ready.
        module: where it is.
    """
    process = subprocess.Popen(  # noqa: S603
        processes.command(module, probe, json.dumps(dict(arguments or {}))),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _asked.add(process)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer(None, f"hung: no answer in {seconds:g} s", "hang")
    finally:
        _asked.discard(process)
        if process.poll() is None:
            _kill(process)
            process.communicate()
    if process.returncode < 0:
        return Answer(None, f"crashed ({processes.signal_name(-process.returncode)})", "crash")
    if process.returncode:
        said = failures.last_line(err.decode("utf-8", "replace"))
        return Answer(None, said or f"ended with code {process.returncode}", "error")
    try:
        return Answer(dict(json.loads(failures.last_line(out.decode("utf-8", "replace")))))
    except ValueError:
        return Answer(None, "ended without an answer", "error")


def stop() -> None:
    """Kill every question that any thread still waits for."""
    for process in list(_asked):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


# --- the machine ------------------------------------------------------------------------------------------------------


def torch() -> dict[str, Any]:
    """Torch, its CUDA, and the GPUs as they are before this process takes any of their memory."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "archs": torch.cuda.get_arch_list() if torch.version.cuda else [],
        "gpus": [],
        "why_not": "",
    }
    if not torch.version.cuda:
        return facts
    # Before CUDA starts: then this process is not among those that use it.
    readings = _readings()
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        facts["why_not"] = str(error).strip().splitlines()[0]
        return facts
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else ""
        gpu = {
            "index": index,
            "name": properties.name,
            "uuid": uuid,
            "capability": [properties.major, properties.minor],
            "total": properties.total_memory,
            "free": None,
            "processes": [],
        }
        facts["gpus"].append({**gpu, **readings.get(uuid, {})})
    return facts


def _readings() -> dict[str, dict[str, Any]]:
    """Memory and processes of each GPU by its UUID, from the driver."""
    readings: dict[str, dict[str, Any]] = {}
    with open_driver() as driver:
        for handle in driver.gpus():
            if memory := driver.ask("DeviceGetMemoryInfo", handle):
                running = driver.ask("DeviceGetComputeRunningProcesses", handle) or []
                readings[str(driver.ask("DeviceGetUUID", handle))] = {
                    "free": int(memory.free),
                    "total": int(memory.total),
                    "processes": [_process(driver, process) for process in running],
                }
    return readings


def _process(driver: Driver, process: Any) -> dict[str, Any]:
    name = str(driver.ask("SystemGetProcessName", process.pid) or "").rpartition("/")[2].split(" ")[0]
    # A container numbers processes separately: there the driver's are of no use.
    here = Path(f"/proc/{process.pid}").exists()
    return {"pid": process.pid, "here": here, "name": name, "bytes": process.usedGpuMemory}


def kernels() -> dict[str, Any]:
    """exl's own decoding kernels, one of them compiled and loaded for each GPU; why not, where that fails."""
    import torch

    from exl_cli.engines.exllamav2.kernels import compiler

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {"why_not": next((reason for device in devices if (reason := compiler.why_not(device))), "")}


def cpu() -> dict[str, Any]:
    """The CPU engine, imported."""
    importlib.import_module("exl_cli.engines.cpu.engine")
    import transformers

    return {"transformers": transformers.__version__}


def extension(library: str, compute: bool) -> dict[str, Any]:
    """exllamav2's compiled extension, loaded and, where a GPU has room, made to compute."""
    from exl_cli.engines.exllamav2.extension import smoke_test

    module = smoke_test.load(Path(library))
    return {"gpus": smoke_test.compute(module) if compute else []}


def triton() -> dict[str, Any]:
    """Triton, imported."""
    import triton

    return {"version": triton.__version__}


def attention() -> dict[str, Any]:
    """What will compute attention; Triton is tried on a small case."""
    from exl_cli.engines.exllamav2.attention.paged import backend

    chosen = backend()
    why_not = {"triton": chosen.why_not} if chosen.why_not else {}
    return {"decode": chosen.name, "prefill": chosen.name, "why_not": why_not}


def hub(timeout: float) -> dict[str, Any]:
    """Whether the Hub answers, and who it takes the user for."""
    from huggingface_hub import HfApi, get_session, get_token

    from exl_cli.models.hub.client import Hub

    endpoint = Hub(timeout=timeout).endpoint
    status = get_session().get(f"{endpoint}/api/models?limit=1", timeout=timeout).status_code
    facts: dict[str, Any] = {"endpoint": endpoint, "status": status, "token": bool(get_token())}
    if facts["token"]:
        try:
            facts["user"] = HfApi(endpoint).whoami()["name"]
        except Exception as error:  # refused, expired, or of a service that is not the Hub
            facts["refused"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return facts


# --- a model ----------------------------------------------------------------------------------------------------------

# Children's English, which every language model has read.
_TEXT = (
    "Once upon a time there was a little girl who lived in a small house near the forest. Every morning she went to "
    "the river with her mother to fetch some water, and every evening they sat by the fire and told each other stories."
)
_PROMPT_TOKENS = 12
_LONGEST = 256


def _load(model: str, models_dir: str | None, engine: EngineChoice) -> tuple[Any, list[int], dict[str, Any]]:
    """The engine, the text's ids, and the facts that both questions about a model have in common."""
    from exl_cli import loader
    from exl_cli.api.engine_thread import EngineThread
    from exl_cli.api.model import LogObserver
    from exl_cli.engines import scoring
    from exl_cli.models.tokenizer import Tokenizer

    info = loader.resolve(model, Path(models_dir) if models_dir else None)
    tokenizer = Tokenizer(info.path)
    begun = time.perf_counter()
    loaded = EngineThread(loader.load(info, tokenizer, LoadOptions(engine=engine), LogObserver(), needed=_LONGEST))
    seconds = time.perf_counter() - begun
    ids = tokenizer.encode(_TEXT, add_special_tokens=True)[:_LONGEST]
    perplexity = scoring.perplexity(loaded, ids)
    nan = perplexity != perplexity
    return (
        loaded,
        ids,
        {
            "load_seconds": seconds,
            "perplexity": None if nan else perplexity,
            "vocabulary": tokenizer.vocab_size,
        },
    )


def generate(model: str, models_dir: str | None, engine: EngineChoice, new_tokens: int) -> dict[str, Any]:
    """A model reads a text and continues its beginning greedily."""
    from exl_cli.engines.base import Request as _Request
    from exl_cli.sampling import build

    loaded, ids, facts = _load(model, models_dir, engine)
    prompt = ids[:_PROMPT_TOKENS]
    tokens: list[int] = []
    text, rate = "", 0.0
    for chunk in loaded.stream(_Request(prompt, build({}, "greedy"), new_tokens, seed=0)):
        tokens += chunk.token_ids
        text += chunk.text
        rate = chunk.summary.generation_rate if chunk.summary else rate
    generated = {"prompt": prompt, "tokens": tokens, "text": text, "tokens_per_second": rate}
    return {**facts, **generated, "facts": loaded.facts}


def compare(model: str, models_dir: str | None, prompt: list[int], tokens: list[int]) -> dict[str, Any]:
    """How the CPU engine ranks what another has generated."""
    from exl_cli.engines import scoring

    loaded, _, facts = _load(model, models_dir, "cpu")
    return {**facts, "shortfalls": scoring.shortfalls(loaded, [*prompt, *tokens], len(tokens))}


def main() -> None:
    """The child: `NAME ARGUMENTS`, the latter a JSON object."""
    # Libraries print to stdout, from C as well: the answer goes where they cannot reach.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        facts = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    except ExlError as error:
        # A traceback would spell parameters by name; here they stay marked for the CLI.
        said = "; ".join(filter(None, (error.message, error.hint)))
        sys.stderr.buffer.write(f"exl_cli.errors.{type(error).__name__}: {said}\n".encode())
        sys.exit(1)
    answer.write(json.dumps(facts) + "\n")
    answer.flush()
    # The question is answered: nothing that an exit handler does may still change how this ends.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
