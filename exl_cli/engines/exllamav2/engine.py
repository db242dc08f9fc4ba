"""Generation through exllamav2's dynamic generator.

exllamav2 computes the logits. Choosing the token is ours (`engines.sampler`), and so are decoding to text, stop strings
and the end of the response (`engines.driver`): its own text handling drops what it holds back at the token limit.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from exl_cli import memory
from exl_cli.engines import driver
from exl_cli.engines.base import Chunk, DeviceMemory, Request
from exl_cli.engines.exllamav2 import attention
from exl_cli.engines.exllamav2.job import job_class
from exl_cli.engines.exllamav2.view import folder_for_exllamav2
from exl_cli.engines.options import LoadOptions
from exl_cli.engines.sampler import Samplers
from exl_cli.errors import DamagedModelError, EngineError, OutOfMemoryError, UsageError
from exl_cli.modelinfo import ModelInfo
from exl_cli.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


class ExLlamaV2Engine:
    """A model on one or more GPUs. See `engines.base.Engine`; one generation at a time."""

    name = "exllamav2"

    def __init__(self, generator: Any, tokenizer: Tokenizer, context_length: int, facts: dict[str, str]) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._samplers = Samplers(tokenizer, generator.model.config.vocab_size)
        self._lock = threading.Lock()
        self.context_length = context_length
        self.facts = facts

    def stream(self, request: Request) -> Iterator[Chunk]:
        """See `engines.base.Engine.stream`."""
        driver.check_fits(len(request.ids), self.context_length)
        decoder = self._tokenizer.decode_stream(request.ids)
        return driver.run(request, decoder, self.context_length, self._steps(request))

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float32 logits of every position, on the CPU: shape (len(ids), vocabulary)."""
        return self.cached_logits(ids, len(ids))

    def cached_logits(self, ids: Sequence[int], step: int) -> torch.Tensor:
        """See `engines.base.CachedScoring.cached_logits`."""
        model = self._generator.model
        cache = type(self._generator.cache)(model, max_seq_len=memory.round_up(len(ids)))
        parts = []
        for at in range(0, len(ids), step):
            out = model.forward(torch.tensor([list(ids[at : at + step])]), cache, cpu_logits=True)
            parts.append(out[0, :, : model.config.vocab_size].float())
        return torch.cat(parts)

    def memory(self) -> list[DeviceMemory]:
        """See `engines.base.Engine.memory`."""
        devices = sorted(set(self._generator.model.get_cache_devices()))
        return [_memory(device) for device in devices]

    def close(self) -> None:
        """See `engines.base.Engine.close`."""
        if self._generator is not None:
            self._generator.model.unload()
            self._generator = None
        gc.collect()
        torch.cuda.empty_cache()

    def _steps(self, request: Request) -> Generator[driver.Step, None, None]:
        from exllamav2.device import set_device_streams

        room = min(request.max_new_tokens, self.context_length - len(request.ids))
        job = job_class()(self._samplers.make(request), request.ids, room, request.stop_ids)
        with self._lock, _translated_errors():
            # Streams belong to threads: in a new one, what the generator does first would run on another.
            set_device_streams()
            self._generator.enqueue(job)
            try:
                yield from self._iterate(job, len(request.ids))
            except GeneratorExit:
                self._generator.cancel(job)
                raise
            except BaseException:
                # exllamav2 counts a token as cached before it computes it: after a failure the count cannot be trusted.
                self._generator.cancel(job)
                self._generator.reset_page_table()
                raise

    def _iterate(self, job: Any, prompt_tokens: int) -> Iterator[driver.Step]:
        seen = prompt_tokens
        timed = False
        while not job.is_finished:
            self._generator.iterate()
            # Read from the sequence itself: the results omit tokens whose text is being held back.
            new = job.sequences[0].sequence_ids.torch()[0, seen:].tolist()
            seen += len(new)
            if timed or job.time_first_token is None:
                yield driver.Step(tuple(new))
                continue
            timed = True
            reused = job.cached_pages * self._generator.page_size + job.cached_tokens
            # The generator synchronises the device before it notes this time.
            yield driver.Step(tuple(new), job.time_first_token - job.time_first_prefill, reused)


def _memory(device: str) -> DeviceMemory:
    properties = torch.cuda.get_device_properties(device)
    return DeviceMemory(
        device=device,
        name=properties.name,
        uuid=f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else "",
        current_bytes=torch.cuda.memory_reserved(device),
        peak_bytes=torch.cuda.max_memory_reserved(device),
    )


def load(
    info: ModelInfo, tokenizer: Tokenizer, context_length: int, options: LoadOptions, progress: Progress
) -> ExLlamaV2Engine:
    """Load a model onto the GPUs.

    Args:
        info: a model for which `support.why_not` is empty.
        tokenizer: its tokenizer.
        context_length: most tokens of prompt and response; the KV cache is allocated for them.
        options: cache type, split over GPUs, memory saving.
        progress: called with (modules done, modules in all).

    Raises:
        EngineError: exllamav2 cannot be imported.
        OutOfMemoryError: the GPUs' free memory is too small.
        DamagedModelError: exllamav2 cannot make sense of the files.
    """
    if options.gpu_split is None:
        memory.check(info, context_length, options.cache, _free_bytes(), low_mem=options.low_mem)
    # exllamav2 prints to stdout, which belongs to the model's text.
    with contextlib.redirect_stdout(sys.stderr):
        _import()
        attention.install()
        with folder_for_exllamav2(info) as folder, _translated_errors(info, context_length, options):
            generator = _build(folder, context_length, options, progress)
    facts = {
        "device": torch.cuda.get_device_name(0),
        "dtype": "float16",
        "attention": "flash-attn, paged" if generator.paged else "torch SDPA, causal",
        "cache": options.cache,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }
    return ExLlamaV2Engine(generator, tokenizer, context_length, facts)


def _import() -> None:
    try:
        importlib.import_module("exllamav2.generator")
    except Exception as error:  # its import compiles and links: anything can come out
        text = str(error) or type(error).__name__
        if "undefined symbol" in text:
            raise EngineError(
                "exllamav2's compiled extension was built for another torch",
                "install the wheel made for your torch version",
            ) from error
        raise EngineError(
            f"exllamav2 cannot be imported: {text.strip().splitlines()[-1]}",
            "install the CUDA toolkit of torch's CUDA version, g++ and ninja, or use --engine cpu",
        ) from error


def _build(folder: Any, context_length: int, options: LoadOptions, progress: Progress) -> Any:
    import exllamav2
    from exllamav2 import attn
    from exllamav2.generator import ExLlamaV2DynamicGenerator

    config = exllamav2.ExLlamaV2Config(str(folder))
    config.max_seq_len = memory.round_up(context_length)
    config.max_input_len = min(config.max_input_len, config.max_seq_len)
    config.no_sdpa = True  # see attention.py; this keeps its own branch out of reach even where that is not installed
    if options.low_mem:
        config.set_low_mem()
    config.arch_compat_overrides(quiet=True)
    model = exllamav2.ExLlamaV2(config)
    cache_class = {
        "fp16": exllamav2.ExLlamaV2Cache,
        "q8": exllamav2.ExLlamaV2Cache_Q8,
        "q6": exllamav2.ExLlamaV2Cache_Q6,
        "q4": exllamav2.ExLlamaV2Cache_Q4,
    }[options.cache]
    if options.gpu_split:
        model.load(list(options.gpu_split), callback=progress)
        cache = cache_class(model, max_seq_len=config.max_seq_len)
    else:
        cache = cache_class(model, max_seq_len=config.max_seq_len, lazy=True)
        model.load_autosplit(cache, last_id_only=False, callback=progress)
    generator = ExLlamaV2DynamicGenerator(
        model=model,
        cache=cache,
        tokenizer=exllamav2.ExLlamaV2Tokenizer(config),
        paged=attn.has_flash_attn_with_paged and not config.no_flash_attn,
    )
    torch.cuda.synchronize()
    return generator


@contextlib.contextmanager
def _translated_errors(
    info: ModelInfo | None = None, context_length: int = 0, options: LoadOptions | None = None
) -> Iterator[None]:
    """Turn what exllamav2 raises into errors that say the next step."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory(info, context_length) from error
    except (RuntimeError, AssertionError, ValueError, KeyError, TypeError) as error:
        text = str(error).strip(" #\n") or type(error).__name__
        if "Insufficient VRAM" in text or "out of memory" in text:
            raise _out_of_memory(info, context_length) from error
        if "Insufficient space in device allocation" in text:
            split = ",".join(f"{gib:g}" for gib in options.gpu_split or ()) if options else ""
            raise UsageError(
                f"the model does not fit --gpu-split {split} (GiB per GPU)",
                "raise the numbers, or use --gpu-split auto",
            ) from error
        if info is not None and not isinstance(error, RuntimeError):
            raise DamagedModelError(
                f"exllamav2 cannot load {info.path}: {text.splitlines()[0]}", "see --debug"
            ) from error
        raise EngineError(f"exllamav2 failed: {text.splitlines()[0]}", "run again with --debug to see where") from error


def _free_bytes() -> list[int]:
    """Bytes free on each GPU."""
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def _out_of_memory(info: ModelInfo | None, context_length: int) -> OutOfMemoryError:
    held = torch.cuda.memory_reserved()
    have = f"{(sum(_free_bytes()) + held) / memory.GIB:.1f} GiB of GPU memory are free"
    if info is None:
        return OutOfMemoryError(
            f"the GPU ran out of memory; {have}", "use --cache q4, a smaller --max-seq-len or --low-mem"
        )
    need = info.size_bytes / memory.GIB
    return OutOfMemoryError(
        f"{info.name} needs {need:.1f} GiB for its weights and more for a context of {context_length:,} tokens; {have}",
        "use --cache q4, a smaller --max-seq-len or --low-mem, or free the GPU (nvidia-smi shows who uses it)",
    )
