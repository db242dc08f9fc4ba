"""Generation on NVIDIA GPUs, on top of exllamav2.

exllamav2 loads the model and prefills prompts. exl schedules the sequences (`scheduler`), computes forward passes of
few tokens (`forward`) and attention over pages (`attention`), samples (`engines.sampling`), and decodes the tokens to
text (`engines.response`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from exl_cli.engines.base import Event, Request
from exl_cli.engines.exllamav2 import startup
from exl_cli.engines.exllamav2.attention import causal, paged
from exl_cli.engines.exllamav2.attention.paged import Heads, unusual
from exl_cli.engines.exllamav2.build_model import build_model, load_modules, rope_offsets
from exl_cli.engines.exllamav2.cuda_errors import explained, free_bytes, translated
from exl_cli.engines.exllamav2.draft_model import DraftModel
from exl_cli.engines.exllamav2.forward import GpuForward
from exl_cli.engines.exllamav2.forward_choice import choose_forward
from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.engines.exllamav2.prompt_lookup import PromptLookup
from exl_cli.engines.exllamav2.scheduler import Scheduler
from exl_cli.engines.exllamav2.speculation import Drafter
from exl_cli.engines.response import Response, Step, check_fits, check_known, check_settings
from exl_cli.engines.sampling.sampler import Samplers
from exl_cli.models import architecture, memory, placement
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.readings import DeviceMemory
from exl_cli.system.visible_gpus import own_uuids

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Loaded:
    """exllamav2's model on the GPU, and what runs its forward passes."""

    model: Any
    forward: GpuForward

    def unload(self) -> None:
        self.forward.close()
        self.model.unload()


class ExLlamaV2Engine:
    """A model on one or more GPUs. See `engines.base.Engine`.

    Args:
        loaded: the model.
        tokenizer: its tokenizer.
        context_length: most tokens of prompt and response.
        facts: what `facts` reports besides CUDA graphs.
        drafter: proposes draft tokens; None for no speculation.
        others: models to unload together with this one, such as a draft model.
    """

    name = "exllamav2"

    def __init__(
        self,
        loaded: _Loaded,
        tokenizer: Tokenizer,
        context_length: int,
        facts: dict[str, str],
        drafter: Drafter | None = None,
        others: Sequence[_Loaded] = (),
    ) -> None:
        self._loaded: tuple[_Loaded, ...] = (loaded, *others)
        self._tokenizer = tokenizer
        self._forward = forward = loaded.forward
        samplers = Samplers(tokenizer, forward.vocab_size)
        # Prefill in chunks of the size that exllamav2 splits prompts into anyway.
        chunk = loaded.model.config.max_input_len
        self._scheduler = Scheduler(
            forward,
            samplers.make,
            outputs=samplers.outputs,
            score=samplers.prompt_logprobs,
            drafter=drafter,
            chunk=chunk,
        )
        self._responses: dict[int, Response] = {}
        self._cancelled: deque[int] = deque()
        self.max_batch = forward.max_batch
        self.context_length = context_length
        self._facts = facts

    @property
    def facts(self) -> dict[str, str]:
        """See `engines.base.Engine.facts`. They change if a capture fails."""
        forward = self._forward
        graphs = "one per pass" if forward.captures else "none"
        if forward.why_not_captured:
            graphs = f"off since a capture failed ({forward.why_not_captured})"
        return {**self._facts, "graphs": graphs}

    def check(self, request: Request) -> None:
        check_fits(len(request.ids), self.context_length)
        check_known(request.ids, self._forward.vocab_size, self._tokenizer)
        check_settings(request, self._forward.vocab_size)
        self._scheduler.check(request, min(request.max_new_tokens, self.context_length - len(request.ids)))

    def add(self, request_id: int, request: Request) -> None:
        response = Response(request, self._tokenizer.decode_stream(request.ids), self.context_length)
        self._scheduler.add(request_id, request, response.max_new_tokens)
        self._responses[request_id] = response

    def cancel(self, request_id: int) -> None:
        self._cancelled.append(request_id)

    def step(self) -> Iterator[Event]:
        """See `engines.base.Engine.step`. The next forward pass runs while the tokens are detokenized."""
        while self._cancelled:
            request_id = self._cancelled.popleft()
            self._scheduler.cancel(request_id)
            if response := self._responses.pop(request_id, None):
                yield request_id, response.finish(cancelled=True)
        for request_id, outcome in self._scheduler.step():
            if isinstance(outcome, Step):
                if response := self._responses.get(request_id):
                    yield from self._take(request_id, response, outcome)
            elif response := self._responses.pop(request_id, None):
                yield request_id, response.finish() if outcome is None else _caused(outcome)

    def _take(self, request_id: int, response: Response, step: Step) -> Iterator[Event]:
        chunks = response.take(step)
        if response.ended:
            self._scheduler.cancel(request_id)  # at a stop string, of which the scheduler does not know
            del self._responses[request_id]
        for chunk in chunks:
            yield request_id, chunk

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self.cached_logits(ids, len(ids))

    def cached_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        model, forward = self._loaded[0].model, self._forward
        check_known(ids, forward.vocab_size, self._tokenizer)
        with translated():
            if step <= forward.max_tokens and len(ids) <= self.context_length:
                return self._paged_logits(ids, step)
            cache = type(forward.cache)(model, max_seq_len=memory.round_up(len(ids)))
            parts = []
            offset = rope_offsets(model)[forward.rope_table(len(ids))]
            offsets = torch.tensor([[offset]], dtype=torch.int) if offset else None
            for at in range(0, len(ids), step):
                tokens = torch.tensor([list(ids[at : at + step])])
                out = model.forward(tokens, cache, cpu_logits=True, position_offsets=offsets)
                parts.append(out[0, :, : model.config.vocab_size].float())
            return torch.cat(parts)

    def _paged_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        """Compute logits with decode passes; ends all requests and clears the prefix cache."""
        parts, forward = [], self._forward
        self._scheduler.reset()
        block_table = list(range(memory.round_up(len(ids)) // memory.PAGE))
        for at in range(0, len(ids), step):
            tokens = tuple(ids[at : at + step])
            forward.submit([ScheduledTokens(tokens, at, block_table, forward.rope_table(len(ids)))])
            parts.append(forward.collect()[0].clone())
        return torch.cat(parts)

    def pages(self) -> tuple[int, int]:
        return self._scheduler.num_allocated_pages, self._forward.pages

    def memory(self) -> list[DeviceMemory]:
        devices = sorted(set(self._loaded[0].model.get_cache_devices()))
        return [_memory(device) for device in devices]

    def close(self) -> None:
        loaded, self._loaded = [*self._loaded], ()
        if any(model.forward.failed for model in loaded):
            return  # the GPU hangs, and freeing memory would wait for it
        while loaded:
            with contextlib.suppress(Exception):  # the device may report an earlier error
                loaded[-1].forward.synchronize()
            loaded.pop().unload()
        gc.collect()
        torch.cuda.empty_cache()


def _caused(error: Exception) -> Exception:
    """Apply `explained`, keeping the original error as the cause."""
    other = explained(error)
    if other is not error:
        other.__cause__ = error
    return other


def _memory(device: str) -> DeviceMemory:
    index, uuids = torch.device(device).index or 0, own_uuids()
    return DeviceMemory(
        device=device,
        name=torch.cuda.get_device_name(device),
        uuid=uuids[index] if index < len(uuids) else "",
        current_bytes=torch.cuda.memory_reserved(device),
        peak_bytes=torch.cuda.max_memory_reserved(device),
    )


def load(
    info: ModelInfo,
    tokenizer: Tokenizer,
    context_length: int,
    options: LoadOptions,
    progress: Progress,
    draft: ModelInfo | None = None,
    *,
    cuts: Sequence[int] = (),
) -> ExLlamaV2Engine:
    """Load a model onto the GPUs.

    Args:
        info: a model for which `support.why_not` is empty.
        tokenizer: its tokenizer.
        context_length: most tokens of prompt and response; the KV cache is allocated for them.
        options: cache type, split over GPUs, memory saving.
        progress: called with (modules done, modules in all).
        draft: a smaller model with the same vocabulary, for speculation.
        cuts: layers that begin a stage of their own, as if on another GPU.

    Raises:
        OutOfMemoryError: the GPUs' free memory is too small.
        DamagedModelError: exllamav2 cannot make sense of the files.
    """
    devices = _devices(info, context_length, options, draft)
    causal.install()
    loaded = _load(info, context_length, options, devices, progress, cuts)
    drafter: Drafter | None = PromptLookup() if options.speculate == "ngram" else None
    others = []
    if draft is not None:
        # Stop drafting at the first RoPE switch: recomputing the draft model's cache would cost more than it gains.
        context = min(context_length, draft.extended_length)
        context = next(iter(architecture.read(draft).rope_switches(context)), context)
        try:
            placed = _devices(draft, context, dataclasses.replace(options, gpu_split=None))
            others.append(_load(draft, context, options, placed, progress))
        except BaseException:
            loaded.unload()
            raise
        drafter = DraftModel(others[0].forward, loaded.forward.vocab_size, context)
    small = loaded.forward.small
    own = "exl's own for few tokens, else " if small.attends else ""
    facts = {
        "device": ", ".join(torch.cuda.get_device_name(gpu) for gpu in dict.fromkeys(devices)),
        "dtype": "float16",
        "attention": f"{own}{loaded.forward.backend}, paged",
        "kernels": small.name + (f" ({reason})" if (reason := loaded.forward.why_not_fused) else ""),
        "cache": options.cache,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
    if len(set(devices)) > 1:
        facts["layers"] = _layers(devices)
    return ExLlamaV2Engine(loaded, tokenizer, context_length, facts, drafter, others)


def _layers(devices: Sequence[int]) -> str:
    """Where the layers of a model over several GPUs are, and how hidden states get from one to the next."""
    gpus = [*dict.fromkeys(devices)]
    places = [f"{devices.index(gpu)} to {devices.index(gpu) + devices.count(gpu) - 1} on GPU {gpu}" for gpu in gpus]
    direct = all(torch.cuda.can_device_access_peer(after, before) for before, after in pairwise(gpus))
    return f"{', '.join(places)}, {'peer access' if direct else 'through host memory'}"


def _devices(info: ModelInfo, context_length: int, options: LoadOptions, draft: ModelInfo | None = None) -> list[int]:
    """The index of each transformer layer's GPU."""
    shares = placement.place(
        info,
        context_length,
        options.cache,
        free_bytes(),
        low_mem=options.low_mem,
        draft=draft,
        sequences=options.sequences,
        sizes=options.gpu_split,
    )
    if shares is None:
        return [0] * architecture.read(info).layers
    return [share.gpu for share in shares for _ in share.layers]


def _heads(info: ModelInfo) -> Heads:
    """The head layout to test attention backends with: the model's, or a common one."""
    shape = memory.shape_of(info)
    if shape is None or shape.heads % shape.kv_heads or unusual(shape.head_dim):
        return Heads()
    return Heads(shape.heads, shape.kv_heads, shape.head_dim)


def _load(
    info: ModelInfo,
    context_length: int,
    options: LoadOptions,
    devices: Sequence[int],
    progress: Progress,
    cuts: Sequence[int] = (),
) -> _Loaded:
    heads = _heads(info)
    paged.try_ahead(heads)
    # exllamav2 prints to stdout, which belongs to the model's text.
    with contextlib.redirect_stdout(sys.stderr), translated(info, context_length):
        model, cache = _build(info, context_length, options, devices, progress)

        def backend() -> paged.Backend:
            for gpu in dict.fromkeys(devices):  # the smoke test would fail within a capture
                paged.backend(torch.device("cuda", gpu), heads)
            return paged.install_paged(heads)

        pages = _pages(context_length, options)
        # With speculation the CPU samples, for the draft model as well.
        samples = options.draft is None and options.speculate == "off"
        forward = choose_forward(model, cache, pages, memory.PAGE, backend, samples=samples, cuts=cuts)
        return _Loaded(model, forward)


def _pages(context_length: int, options: LoadOptions) -> int:
    """Number of pages for `options.sequences` sequences of this length."""
    return memory.round_up(context_length) // memory.PAGE * options.sequences


def _build(
    info: ModelInfo, context_length: int, options: LoadOptions, devices: Sequence[int], progress: Progress
) -> tuple[Any, Any]:
    """Build the model and its cache, which has one spare page more than `_pages`."""
    from exllamav2 import cache as caches

    model = build_model(info, architecture.read(info), memory.round_up(context_length), low_mem=options.low_mem)
    cache_class = {
        "fp16": caches.ExLlamaV2Cache,
        "q8": caches.ExLlamaV2Cache_Q8,
        "q6": caches.ExLlamaV2Cache_Q6,
        "q4": caches.ExLlamaV2Cache_Q4,
    }[options.cache]
    tokens = (_pages(context_length, options) + 1) * memory.PAGE
    with startup.nothing_drawn():
        cache = cache_class(model, max_seq_len=tokens, lazy=True)
        load_modules(model, cache, devices, progress)
    for gpu in dict.fromkeys(devices):
        torch.cuda.synchronize(gpu)
    return model, cache
