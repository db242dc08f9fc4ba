"""A job of exllamav2's dynamic generator whose tokens are chosen by our sampler.

Stands for the defects of exllamav2 0.3.2's own sampler that `engines.sampler` lists. The first of them is in everyone's
way: its top-p throws out the token that crosses the threshold and fills the room with less likely ones, so with the
notebook's settings the second likeliest token is often impossible.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch

from exl_cli.engines.sampler import Sampler


@cache
def job_class() -> type[Any]:
    """The class, made on first use: exllamav2 cannot be imported on every machine that imports this module."""
    from exllamav2.ext import none_tensor
    from exllamav2.generator import ExLlamaV2DynamicJob

    class Job(ExLlamaV2DynamicJob):  # type: ignore[misc]  # untyped, and known only here
        """One generation.

        Args:
            sampler: chooses each token.
            ids: the prompt's token ids.
            max_new_tokens: when to end at the latest.
            stop_ids: tokens that end it.
        """

        def __init__(
            self, sampler: Sampler, ids: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]
        ) -> None:
            super().__init__(
                input_ids=torch.tensor([list(ids)]), max_new_tokens=max_new_tokens, stop_conditions=sorted(stop_ids)
            )
            self._sampler = sampler

        def receive_logits(self, logits: torch.Tensor) -> tuple[Any, ...]:
            """Called by the generator with one position's logits, shape (1, 1, padded vocabulary), on the CPU."""
            history = self.sequences[0].sequence_ids.torch()[0].numpy()
            token = self._sampler.sample(logits[0, 0].numpy(), history)
            # Token; no top tokens, their probabilities, nor its own; no filter that wants to end.
            return torch.tensor([[token]]), none_tensor, none_tensor, none_tensor, False

    return Job
