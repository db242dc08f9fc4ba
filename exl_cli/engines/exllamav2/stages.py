"""Stages of a model: consecutive layers on one GPU, with the stream, inputs and CUDA graphs of their part of a pass.

A pass runs its stages in order. Each receives inputs and hidden states from the one before it by a copy between the
GPUs, directly where they have access to each other's memory, else through the host. The host waits for none of this, so
while one stage computes, the one before it can begin the next pass: the next chunk of a prompt, or other sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from exl_cli.engines.exllamav2.graphs import Graphs

if TYPE_CHECKING:
    from exl_cli.engines.exllamav2.fused_forward import FusedForward
    from exl_cli.engines.exllamav2.inputs import Inputs, Received
    from exl_cli.engines.exllamav2.modules_forward import ModulesForward


class Stage:
    """Consecutive layers of a model on one GPU.

    Args:
        stream: where they run.
        layers: the layers; the last stage has the head as well.
        inputs: returns the input buffers for a pass of a given number of tokens.
        forward: computes the layers.

    Attributes:
        graphs: CUDA graphs of its part of passes; `Pipeline.prepare` says whether to capture any.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        layers: range,
        inputs: Callable[[int], Inputs | Received],
        forward: FusedForward | ModulesForward,
    ) -> None:
        self.stream, self.layers, self.inputs, self.forward = stream, layers, inputs, forward
        self.graphs = Graphs(False)

    def close(self) -> None:
        """Free the graphs, and compile no further."""
        self.graphs.clear()
        self.forward.close()

    def enter(self) -> None:
        """Make this stage's GPU and stream the current ones of this thread."""
        torch.cuda.set_stream(self.stream)

    def receive(self, before: Stage, tokens: int) -> None:
        """Copy the inputs and hidden states of a pass of `tokens` tokens from the previous stage, in stream order."""
        source, target = before.inputs(tokens), self.inputs(tokens)
        size = source.size(tokens)
        apart = self.stream.device != before.stream.device
        if not apart:
            self.stream.wait_stream(before.stream)
        self.enter()
        # Between GPUs, torch copies on the source's current stream, when both GPUs' current streams have got here, and
        # the target's waits for the copy.
        target.memory[:size].copy_(source.memory[:size], non_blocking=True)
        if not apart:
            before.stream.wait_stream(self.stream)


class Pipeline:
    """The stages of a model, in the order in which a pass runs them.

    Args:
        model: exllamav2's, loaded.
        stages: of all its layers.
        why_not_fused: why exllamav2's modules compute them, in a single stage for all GPUs; empty if exl's own kernels
            do.

    Attributes:
        stages, why_not_fused: see above.
        last_device: the GPU of the head.
        end_stream: the stream on which passes end.
        is_capturable: whether passes may be captured, and followed by a sampler. Passes of exllamav2's modules over
            several GPUs are not.
    """

    def __init__(self, model: Any, stages: Sequence[Stage], why_not_fused: str) -> None:
        from exllamav2.device import set_device_streams

        self._set_streams = set_device_streams
        self.stages, self.why_not_fused = stages, why_not_fused
        first, last = model.modules[1].device_idx, model.modules[-1].device_idx
        self.last_device = torch.device("cuda", last)
        # exllamav2's own streams, on which its modules run.
        self._first_stream, self._last_stream = stream_of(model, first), stream_of(model, last)
        self.end_stream = self._last_stream if why_not_fused else stages[-1].stream
        self.is_capturable = not why_not_fused or first == last
        # Whether a stage has another stream than exllamav2's.
        self._has_own_streams = len({stage.stream.device for stage in stages}) < len(stages)

    @property
    def captures(self) -> bool:
        """Whether passes are captured in CUDA graphs; no longer once a capture has failed."""
        return all(stage.graphs.usable for stage in self.stages)

    @property
    def why_not_captured(self) -> str:
        """Why a capture failed; empty if none did."""
        return next((stage.graphs.why_not for stage in self.stages if stage.graphs.why_not), "")

    @property
    def streams(self) -> set[torch.cuda.Stream]:
        """All streams that passes run on."""
        return {self._first_stream, self._last_stream, *(stage.stream for stage in self.stages)}

    def prepare(self, *, captures: bool) -> None:
        """Start compiling kernels in the background, and set whether passes are captured."""
        for stage in self.stages:
            stage.forward.compile_ahead()
            stage.graphs = Graphs(captures)

    def enter(self) -> None:
        """Make exllamav2's streams the current ones of this thread, and the first GPU the current one.

        The current stream is per thread, so every thread that runs passes has to do this.
        """
        self._set_streams()
        torch.cuda.set_stream(self._first_stream)

    def join(self) -> None:
        """Have the stages wait for one another, where exllamav2's modules run on other streams than theirs."""
        streams = [self._first_stream, *(stage.stream for stage in self.stages)]
        for stream in streams if self._has_own_streams else ():
            for other in streams:
                stream.wait_stream(other)

    def through(self, tokens: int) -> Iterator[Stage]:
        """The stages of a pass of this many tokens, each once it has received its input."""
        yield self.stages[0]
        for before, stage in pairwise(self.stages):
            stage.receive(before, tokens)
            yield stage

    def capture(self) -> None:
        """Capture the pass just started, if it is time."""
        for stage in self.stages:
            if stage.graphs.is_due:
                stage.enter()
                stage.graphs.capture()

    def close(self) -> None:
        """Free the graphs, and compile no further."""
        for stage in self.stages:
            stage.close()


def stream_of(model: Any, device: int) -> torch.cuda.Stream:
    """exllamav2's own stream on a GPU, given its index."""
    stream: torch.cuda.Stream = model.get_device_context(device, scratch=False).stream
    return stream


def stages_of(model: Any, cuts: Sequence[int] = ()) -> list[tuple[range, int]]:
    """The layers of a model's stages with the index of their GPU: a stage for each GPU, and one from each of `cuts` on.

    Args:
        model: exllamav2's, loaded with each layer on one GPU, GPU after GPU.
        cuts: layers.
    """
    devices = [module.device_idx for module in model.modules[1:-2:2]]
    changes = (layer for layer in range(1, len(devices)) if devices[layer] != devices[layer - 1])
    starts = sorted({0, *cuts, *changes})
    return [(range(*ends), devices[ends[0]]) for ends in pairwise([*starts, len(devices)])]
