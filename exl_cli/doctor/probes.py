"""Probes that may crash or hang, each called in a child process; see `system.questions`.

They import heavy modules themselves.
"""

from __future__ import annotations

import importlib
import itertools
import math
import random
import time
from pathlib import Path
from typing import Any

from exl_cli.errors import first_line
from exl_cli.models.load_options import EngineChoice, LoadOptions
from exl_cli.system import questions
from exl_cli.system.nvml import Driver, open_driver
from exl_cli.system.visible_gpus import own_uuids


def torch() -> dict[str, Any]:
    """torch's versions, the GPUs with their free memory, and how they are linked."""
    import torch

    archs = torch.cuda.get_arch_list() if torch.version.cuda else []
    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "archs": archs, "gpus": [], "why_not": ""}
    if not torch.version.cuda:
        return facts
    # Before CUDA is initialised, while this process uses no GPU memory itself.
    readings = _readings()
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return {**facts, "why_not": first_line(error)}
    gpus, uuids = [], own_uuids()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        own = uuids[index] if index < len(uuids) else ""
        uuid = next((known for known in readings if own and known.endswith(own)), own)
        capability, total = [properties.major, properties.minor], properties.total_memory
        gpu = {"index": index, "name": properties.name, "uuid": uuid, "capability": capability, "total": total}
        gpus.append({**gpu, "free": None, "processes": [], **readings.get(uuid, {})})
    return {**facts, "gpus": gpus, "links": _links([gpu["uuid"] for gpu in gpus])}


def _links(uuids: list[str]) -> list[dict[str, Any]]:
    """For each two GPUs, whether one may read the other's memory, and over what; see `Driver.link`."""
    import torch

    with open_driver() as driver:
        handles = driver.handles(uuids)
        return [
            {
                "gpus": [first, second],
                "peer": torch.cuda.can_device_access_peer(first, second),
                "link": driver.link(handles.get(uuids[first]), handles.get(uuids[second])),
            }
            for first, second in itertools.combinations(range(len(uuids)), 2)
        ]


def _readings() -> dict[str, dict[str, Any]]:
    """Memory and processes of each GPU and MIG instance, by UUID, from NVML."""
    readings: dict[str, dict[str, Any]] = {}
    with open_driver() as driver:
        for handle in driver.devices():
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
    # In a container, NVML's process ids are the host's and do not exist here.
    here = Path(f"/proc/{process.pid}").exists()
    return {"pid": process.pid, "here": here, "name": name, "bytes": process.usedGpuMemory}


def kernels() -> dict[str, Any]:
    """Compile and load one of exl's kernels for each GPU."""
    import torch

    from exl_cli.engines.exllamav2.kernels import compiler

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {"why_not": next((reason for device in devices if (reason := compiler.why_not(device))), "")}


def cpu() -> dict[str, Any]:
    """Import the CPU engine."""
    importlib.import_module("exl_cli.engines.cpu.engine")
    import transformers

    return {"transformers": transformers.__version__}


def attention() -> dict[str, Any]:
    """Choose the attention backend; runs a small Triton kernel."""
    from exl_cli.engines.exllamav2.attention.paged import backend

    chosen = backend()
    why_not = {"triton": chosen.why_not} if chosen.why_not else {}
    return {"decode": chosen.name, "prefill": chosen.name, "why_not": why_not}


def hub(timeout: float) -> dict[str, Any]:
    """Query the Hub, and the account of the stored token."""
    from huggingface_hub import HfApi, get_session, get_token

    from exl_cli.models.hub.client import Hub

    endpoint = Hub(timeout=timeout).endpoint
    status = get_session().get(f"{endpoint}/api/models?limit=1", timeout=timeout).status_code
    facts: dict[str, Any] = {"endpoint": endpoint, "status": status, "token": bool(get_token())}
    if facts["token"]:
        try:
            facts["user"] = HfApi(endpoint).whoami()["name"]
        except Exception as error:  # rejected or expired, or HF_ENDPOINT is not a Hub
            facts["refused"] = first_line(error)
    return facts


# --- a model ----------------------------------------------------------------------------------------------------------

# Simple English, which any language model predicts well.
_TEXT = (
    "Once upon a time there was a little girl who lived in a small house near the forest. Every morning she went to "
    "the river with her mother to fetch some water, and every evening they sat by the fire and told each other stories."
)
_PROMPT_TOKENS = 12
NEW_TOKENS = 32
# Compare logits at about this many positions, in the second half of the text.
_POSITIONS = 96


class _Loaded:
    """A loaded model and its test texts: plain English, and a longer one of shuffled words without repetition."""

    def __init__(self, model: str, models_dir: str | None, engine: EngineChoice, tokens: int) -> None:
        from exl_cli import loader
        from exl_cli.api.engine_thread import EngineThread
        from exl_cli.api.model import LogObserver
        from exl_cli.engines import scoring
        from exl_cli.models.tokenizer import Tokenizer

        info = loader.resolve(model, Path(models_dir) if models_dir else None)
        tokenizer, options = Tokenizer(info.path), LoadOptions(engine=engine)
        begun = time.perf_counter()
        self.engine = EngineThread(loader.load(info, tokenizer, options, LogObserver(), needed=tokens + NEW_TOKENS))
        seconds = time.perf_counter() - begun
        self.plain = tokenizer.encode(_TEXT, add_special_tokens=True)[:tokens]
        words = " ".join(random.Random(0).choices(_TEXT.split(), k=tokens))
        self.long = [*self.plain, *tokenizer.encode(words, add_special_tokens=False)][:tokens]
        perplexity = _finite(scoring.perplexity(self.engine, self.plain))
        self.facts = {"load_seconds": seconds, "perplexity": perplexity, "vocabulary": tokenizer.vocab_size}

    def logits(self, step: int) -> Any:
        """Logits at sampled positions of the long text, with `step` tokens per forward pass."""
        half = len(self.long) // 2
        return self.engine.cached_logits(self.long, step)[half :: max(1, half // _POSITIONS)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def generate(
    model: str, models_dir: str | None, engine: EngineChoice, tokens: int, logits: str | None = None
) -> dict[str, Any]:
    """Continue a text greedily, and compute perplexity and, optionally, logits.

    Args:
        model, models_dir, engine: the model and engine.
        tokens: length of the long text.
        logits: file to save its logits to, from one pass over all tokens and from one token per pass.
    """
    import torch

    from exl_cli.engines import scoring
    from exl_cli.engines.base import Request
    from exl_cli.sampling import build

    loaded = _Loaded(model, models_dir, engine, tokens)
    prompt, text, rate = loaded.plain[:_PROMPT_TOKENS], "", 0.0
    new: list[int] = []
    for chunk in loaded.engine.stream(Request(prompt, build({}, "greedy"), NEW_TOKENS, seed=0)):
        new += chunk.token_ids
        text += chunk.text
        rate = chunk.summary.generation_rate if chunk.summary else rate
    if logits is not None:
        torch.save({"prompt": loaded.logits(tokens), "decoding": loaded.logits(1)}, logits)
    # Compare decoding with one pass over prompt and response.
    shortfalls = scoring.shortfalls(loaded.engine, [*prompt, *new], len(new))
    generated = {"prompt": prompt, "tokens": new, "text": text, "tokens_per_second": rate, "shortfalls": shortfalls}
    return {**loaded.facts, **generated, "facts": loaded.engine.facts}


def compare(
    model: str, models_dir: str | None, tokens: int, prompt: list[int], new: list[int], logits: str
) -> dict[str, Any]:
    """Compare another engine's tokens and logits with the CPU engine's.

    Args:
        model, models_dir, tokens: as for `generate`.
        prompt, new: the other engine's prompt and response.
        logits: the file it saved.
    """
    import torch

    from exl_cli.engines import scoring

    loaded = _Loaded(model, models_dir, "cpu", tokens)
    shortfalls = scoring.shortfalls(loaded.engine, [*prompt, *new], len(new))
    own, distances = loaded.logits(tokens), {}
    for way, others in torch.load(logits).items():
        relative_l2, kl = map(_finite, scoring.distance(others, own))
        distances[way] = {"relative_l2": relative_l2, "kl": kl}
    return {**loaded.facts, "shortfalls": shortfalls, "distances": distances}


if __name__ == "__main__":
    questions.answer(globals())
