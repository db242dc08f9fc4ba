"""The reference engine: GPTQ, EXL2 and float models on the CPU through transformers.

Weights are dequantized at load time, so no low-bit kernels are involved: slow for large models, but correct, and what
the other engines are tested against.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from exl_cli.engines.base import Request, TokenLogprobs
from exl_cli.engines.cpu import converted_names, transformers_model
from exl_cli.engines.cpu.kv_cache import KvCache
from exl_cli.engines.response import (
    Decoder,
    GeneratorEngine,
    Step,
    check_known,
    check_settings,
    new_token_limit,
)
from exl_cli.engines.sampling.sampler import Samplers
from exl_cli.errors import DamagedModelError, OutOfMemoryError, UnsupportedModelError
from exl_cli.models.formats import exl2, gptq
from exl_cli.models.info import ModelInfo
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.system.machine import available_memory
from exl_cli.system.readings import DeviceMemory
from exl_cli.system.units import gib

# Tokens per prefill step.
_PREFILL_CHUNK = 128

Progress = Callable[[int, int], None]


class _Cancelled(Exception):  # noqa: N818 - a signal between our own frames, not an error
    pass


class CpuEngine(GeneratorEngine):
    """A model on the CPU, one request at a time; see `engines.base.Engine`."""

    name = "cpu"

    def __init__(self, model: Any, tokenizer: Tokenizer, context_length: int) -> None:
        super().__init__()
        self._model = model
        self._tokenizer = tokenizer
        self._rows: int = model.get_input_embeddings().num_embeddings
        self._samplers = Samplers(tokenizer, model.config.get_text_config().vocab_size)
        self._cache: KvCache | None = KvCache(model.config)
        self._kv_name = _kv_parameter(type(model))
        self._rotary = [module for module in model.modules() if hasattr(module, "max_seq_len_cached")]
        self.context_length = context_length
        self.facts = {
            "device": "cpu",
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": str(model.config._attn_implementation),
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        }

    def check(self, request: Request) -> None:
        super().check(request)
        check_known(request.ids, self._rows, self._tokenizer)
        check_settings(request, self._rows)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        check_known(ids, self._rows, self._tokenizer)
        with torch.inference_mode():
            self._forget_length()
            out = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False)
            logits: torch.Tensor = out.logits[0].float()
        return logits

    def memory(self) -> list[DeviceMemory]:
        return []

    def close(self) -> None:
        self._model = self._cache = None
        gc.collect()

    def _decoder(self, request: Request) -> Decoder:
        return self._tokenizer.decode_stream(request.ids)

    def _steps(self, request: Request, is_cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        sampler = self._samplers.make(request)
        cache = self._cache
        if cache is None:
            raise RuntimeError("the engine is closed")
        hooks = self._watch(is_cancelled)
        ids = list(request.ids)
        end = len(ids) + new_token_limit(request, self.context_length)
        outputs = self._samplers.outputs(request)
        scored: list[TokenLogprobs] = []
        start = time.perf_counter()
        try:
            if request.prompt_logprobs is not None:
                cache.reset()
            reused = cache.rewind(ids, request.cache_salt)
            # With length-dependent RoPE, chunks would use the frequencies of shorter sequences: one chunk then.
            chunk = _PREFILL_CHUNK if len(ids) <= cache.fixed_until else len(ids)
            for begin in range(reused, len(ids) - 1, chunk):
                prefix = ids[: min(begin + chunk, len(ids) - 1)]
                if request.prompt_logprobs is None:
                    self._forward(prefix, cache)
                else:
                    rows = self._forward(prefix, cache, every=True).numpy()
                    scored += self._samplers.prompt_logprobs(request, begin, rows)
                yield Step()
            seconds = time.perf_counter() - start
            yield Step(prompt_seconds=seconds, reused_tokens=reused, prompt_logprobs=tuple(scored))
            while True:
                logits = self._forward(ids, cache).numpy()[0]
                if outputs is None:
                    ids.append(sampler.sample(logits, ids))
                    yield Step((ids[-1],))
                    continue
                ids.append(sampler.sample(logits, ids, outputs.ruled_out(len(ids))))
                if outputs.take(ids, outputs.logprobs(logits, ids[-1])):
                    cache.rewind(ids, request.cache_salt)
                ended = len(ids) >= end or ids[-1] in request.stop_ids
                tokens, logprobs = outputs.release(ended=ended)
                yield Step(tokens, logprobs=logprobs)
        except _Cancelled:
            return
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _forward(self, ids: list[int], cache: KvCache, *, every: bool = False) -> torch.Tensor:
        """Compute the tokens that are not cached. Float32 logits [n, vocabulary] of all of them, or of the last."""

        def compute(new: list[int], states: Any) -> Any:
            tokens = {"input_ids": torch.tensor([new]), self._kv_name: states}
            return self._model(**tokens, use_cache=True, logits_to_keep=0 if every else 1)

        self._forget_length()
        logits: torch.Tensor = cache.extend(ids, compute).logits[0].float()
        return logits

    def _forget_length(self) -> None:
        """Reset dynamic RoPE, for which transformers remembers the longest sequence so far."""
        for module in self._rotary:
            module.max_seq_len_cached = 0

    def _watch(self, is_cancelled: Callable[[], bool]) -> list[Any]:
        """Check for cancellation before each layer: one forward pass of a large model can take many seconds."""

        def check(*_: object) -> None:
            if is_cancelled():
                raise _Cancelled

        layers = [m for m in self._model.modules() if type(m).__name__.endswith("DecoderLayer")]
        return [layer.register_forward_pre_hook(check) for layer in layers]


def _kv_parameter(model_class: Any) -> str:
    """Name of the KV cache parameter of a model's forward: `cache` since transformers 5.24, before that others.

    Raises:
        UnsupportedModelError: the model takes no KV cache.
    """
    parameters = inspect.signature(model_class.forward).parameters
    for name in ("cache", "cache_params", "past_key_values"):
        if name in parameters:
            return name
    raise UnsupportedModelError(
        f"{model_class.__name__} has no KV cache in transformers, which exl needs", "choose another model"
    )


def load(info: ModelInfo, tokenizer: Tokenizer, context_length: int, progress: Progress) -> CpuEngine:
    """Dequantize a model's weights into a transformers model.

    Args:
        info: the model.
        tokenizer: its tokenizer.
        context_length: most tokens per request; the KV cache grows as needed.
        progress: called with (layers done, layers in total).

    Raises:
        UnsupportedModelError: transformers has no text-generation class for the architecture.
        OutOfMemoryError: the dequantized weights would not fit into memory.
        DamagedModelError: a tensor is missing, has the wrong shape or cannot be read, or config.json is invalid.
    """
    config, model_class = transformers_model.choose_class(info)
    _kv_parameter(model_class)
    dtype = _choose_dtype(info)
    try:
        state = converted_names.restore(info.config, _state_dict(info, dtype, progress))
    except (KeyError, RuntimeError) as error:
        raise DamagedModelError(
            f"{info.path}: parts of a fused weight do not match: {error}",
            "download the model again, or take config.json from its repository",
        ) from error
    if head := next((name for name in ("lm_head.weight", "language_model.lm_head.weight") if name in state), None):
        # EXL2 quantizes a tied head separately from the embeddings, and pads it to a multiple of 32 rows.
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        state[head] = state[head][: config.get_text_config().vocab_size]
    model = transformers_model.build(info, config, model_class, state, dtype)
    return CpuEngine(model, tokenizer, context_length)


def _choose_dtype(info: ModelInfo) -> torch.dtype:
    """float32 if the dequantized weights fit into free memory, else bfloat16."""
    free = available_memory()
    if free is None:
        return torch.float32
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        # 5 % for activations and the KV cache.
        if info.parameters * size * 1.05 < free:
            return dtype
    raise OutOfMemoryError(
        f"{info.name} needs {gib(info.parameters * 2)} of memory on the CPU, but {gib(free)} is free",
        "run it on a GPU, or choose a smaller model",
    )


def _state_dict(info: ModelInfo, dtype: torch.dtype, progress: Progress) -> dict[str, torch.Tensor]:
    """All tensors, dequantized, under the names in the files."""
    from safetensors import SafetensorError, safe_open

    groups: dict[str, list[str]] = {}
    for name in sorted(info.tensors):
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    state: dict[str, torch.Tensor] = {}
    try:
        files = {file: safe_open(file, framework="pt") for file in {t.file for t in info.tensors.values()}}
        for done, (layer, names) in enumerate(groups.items()):
            progress(done, len(groups))
            parts = {name.rpartition(".")[2]: files[info.tensors[name].file].get_tensor(name) for name in names}
            if "q_weight" in parts or "qweight" in parts:
                _unpack(layer, parts, info, dtype, state)
            else:
                for part, tensor in parts.items():
                    state[f"{layer}.{part}"] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    except (SafetensorError, OSError) as error:
        raise DamagedModelError(f"{info.path}: cannot read the weights: {error}", "download it again") from error
    progress(len(groups), len(groups))
    return state


def _unpack(
    layer: str, parts: dict[str, torch.Tensor], info: ModelInfo, dtype: torch.dtype, state: dict[str, torch.Tensor]
) -> None:
    if "q_weight" in parts:
        weight = exl2.unpack(parts, dtype=dtype, name=layer)
    else:
        weight = gptq.unpack(parts, zero_offset=info.zero_offset, group_size=info.group_size, dtype=dtype, name=layer)
    if converted_names.is_transposed(str(info.config.get("model_type")), layer):
        weight = weight.T
    state[f"{layer}.weight"] = weight
    if "bias" in parts:
        state[f"{layer}.bias"] = parts["bias"].to(dtype)
