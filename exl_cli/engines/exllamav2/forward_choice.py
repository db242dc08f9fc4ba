"""Choose between exl's own kernels, in stages, and exllamav2's modules for a model's forward passes.

exl's kernels support models built like Llama (`layers.why_not`), and are used if they are faster (`kernel_choice`).
Several stages, and mixtures of experts, also have to agree with exllamav2's modules in a trial while the model is
loaded. If mixtures do not, or are not supported, exllamav2 computes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache as cached
from functools import partial
from typing import Any

import torch

from exl_cli.engines.exllamav2 import fused_forward, layers
from exl_cli.engines.exllamav2.attention.paged import Backend
from exl_cli.engines.exllamav2.build_model import rope_switches
from exl_cli.engines.exllamav2.cuda_errors import cause
from exl_cli.engines.exllamav2.forward import GpuForward
from exl_cli.engines.exllamav2.forward_pass import PENDING, ScheduledTokens
from exl_cli.engines.exllamav2.graphs import key_bound
from exl_cli.engines.exllamav2.inputs import InputBuffers
from exl_cli.engines.exllamav2.logits import soft_cap
from exl_cli.engines.exllamav2.modules_forward import ModulesForward
from exl_cli.engines.exllamav2.stages import Pipeline, Stage, stages_of, stream_of
from exl_cli.errors import EngineError

# Largest relative difference between exl's kernels and exllamav2's modules; lost data differ by as much as there is.
_MOST_DIFFERENCE = 0.1
# Between experts that are nearly equal, rounding decides: in models of 32 to 94 layers with random weights, simulated,
# that changed logits by up to 0.2.
_MOST_DIFFERENCE_OF_EXPERTS = 0.5
_log = logging.getLogger(__name__)


def choose_forward(
    model: Any,
    cache: Any,
    pages: int,
    page_size: int,
    backend: Callable[[], Backend],
    *,
    samples: bool = True,
    cuts: Sequence[int] = (),
) -> GpuForward:
    """Build the `ModelRunner` of a loaded model.

    Args:
        model, cache: exllamav2's; the cache has one spare page more than `pages`, for padding tokens.
        pages: pages that the scheduler may use.
        page_size: positions per page.
        backend: chooses the attention backend; called once the other kernels are ready.
        samples: whether tokens may be sampled on the device.
        cuts: layers that begin a stage although the one before them is on the same GPU.
    """
    inputs = InputBuffers(model, pages, page_size, torch.device("cuda", model.modules[1].device_idx))
    modules = ModulesForward(model, cache, page_size)
    attention = cached(backend)

    def forward_through(pipeline: Pipeline) -> GpuForward:
        return GpuForward(model, cache, pages, page_size, inputs, modules, pipeline, attention(), samples=samples)

    has_experts = bool(model.config.num_experts)
    why_not, why_not_experts = layers.why_not(model), layers.experts_why_not(model)
    failed = None
    while not why_not:
        own_experts = has_experts and not why_not_experts
        pipeline, reason = _fused(model, cache, page_size, inputs, modules, cuts, why_not_experts)
        if pipeline is not None:
            forward = forward_through(pipeline)
            if not own_experts and len(pipeline.stages) == 1:
                return forward
            most = _MOST_DIFFERENCE_OF_EXPERTS if has_experts else _MOST_DIFFERENCE
            reason = _why_not_trusted(forward, partial(_logits_of_modules, model, inputs, modules, pipeline), most)
            if not reason:
                return forward
            failed = forward.failed
            pipeline.close()
            del forward  # frees its memory
        del pipeline
        if own_experts and not failed:
            why_not_experts = reason
        else:
            why_not = reason
    _log.info("passes through exllamav2's modules: %s", why_not)
    forward = forward_through(_whole(model, inputs, modules, why_not))
    forward.failed = failed
    return forward


def _whole(model: Any, inputs: InputBuffers, modules: ModulesForward, why_not_fused: str) -> Pipeline:
    """All layers by exllamav2's modules, on whatever GPUs they are."""
    stream = stream_of(model, inputs.device.index)
    stage = Stage(stream, range(model.config.num_hidden_layers), inputs.of, modules)
    return Pipeline(model, [stage], why_not_fused)


def _fused(
    model: Any,
    cache: Any,
    page_size: int,
    inputs: InputBuffers,
    modules: ModulesForward,
    cuts: Sequence[int],
    why_not_experts: str,
) -> tuple[Pipeline | None, str]:
    """Stages of exl's kernels, or None and why: they do not work, or exllamav2's are the better choice for one."""
    stages, reason = list[Stage](), ""
    # A quantized cache and exllamav2's modules compute in buffers that exist once per GPU, so stages on the same GPU
    # run on the same stream.
    shared = cache.has_scales or why_not_experts
    try:
        for span, device in stages_of(model, cuts):
            stream = stream_of(model, device)
            alone = all(stage.stream.device != stream.device for stage in stages)
            if not alone and not shared:
                stream = torch.cuda.Stream(stream.device)  # type: ignore[no-untyped-call]
            stage_inputs = inputs.received(stream.device) if stages else inputs.of
            torch.cuda.set_stream(stream)
            forward = fused_forward.FusedForward(
                model, cache, page_size, stage_inputs, modules, span, scratch=alone, why_not_experts=why_not_experts
            )
            reason = reason or forward.why_not()
            stages.append(Stage(stream, span, stage_inputs, forward))
    except EngineError as error:
        reason = error.message
    finally:
        torch.cuda.set_stream(stream_of(model, inputs.device.index))
    return (None, reason) if reason else (Pipeline(model, stages, ""), "")


def _why_not_trusted(
    forward: GpuForward, expect: Callable[[ScheduledTokens], torch.Tensor], most_difference: float
) -> str:
    """Why the stages do not compute what exllamav2's modules do; empty if they do.

    Computes one token by an ordinary pass, the pass that is captured, its graph, and with the token where the last GPU
    would leave it: so a link or a driver that loses or reorders data shows before any text does.

    Args:
        forward: passes through the stages.
        expect: computes the logits of a row of one token by exllamav2's modules.
        most_difference: relative, of logits that count as equal.
    """
    row, token = ScheduledTokens((0,), 0, [0]), torch.zeros(1, dtype=torch.int32, pin_memory=True)
    try:
        results = []
        for _ in range(3):
            forward.submit([row])
            results.append(forward.collect()[0, 0].clone())
        if forward.pends:
            forward.submit_pending(ScheduledTokens((PENDING,), 0, [0]), token.data_ptr())
            results.append(forward.collect()[0, 0].clone())
        expected = expect(row)
    except Exception as error:  # of torch, the driver or the kernels
        return f"trying them failed: {cause(error)}"
    if not bool(expected.isfinite().all()):
        return ""  # nothing to compare with
    for result in results:
        if not float((result - expected).norm()) <= most_difference * float(expected.norm()):
            return "they do not compute what exllamav2's modules do"
    return ""


@torch.inference_mode()
def _logits_of_modules(
    model: Any, buffers: InputBuffers, modules: ModulesForward, pipeline: Pipeline, row: ScheduledTokens
) -> torch.Tensor:
    """The logits of a row of one token by exllamav2's modules, in turn with the stages of `pipeline`."""
    pipeline.enter()
    pipeline.join()
    inputs = buffers.of(1)
    inputs.fill([row], 1, 1)
    inputs.send(1, 1)
    offsets = inputs.rope_offsets[:1] if rope_switches(model) else None
    bound = key_bound(1, buffers.table_keys)
    out = modules.run(inputs.hidden[:1], inputs.lengths[:1], inputs.block_table[:1], 1, bound, offsets)
    logits = out[0, : model.config.vocab_size].float()
    soft_cap(logits, model.config.final_logit_softcapping)
    pipeline.join()
    return logits.cpu()
