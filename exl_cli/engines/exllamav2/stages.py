"""Stages of a model: consecutive layers on one GPU, with the stream, inputs and CUDA graphs of their part of a pass.

A pass runs its stages in order. Each receives inputs and hidden states from the one before it by a copy between the
GPUs, directly where they have access to each other's memory, else through the host. The host waits for none of this, so
while one stage computes, the one before it can begin the next pass: the next chunk of a prompt, or other sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        graphs: CUDA graphs of passes; none before this is set.
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
