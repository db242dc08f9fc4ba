"""A forward pass's input buffers hold exactly its own rows, whatever ran before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_cli.engines.exllamav2.forward_pass import ScheduledTokens
from exl_cli.engines.exllamav2.inputs import Embeddings, Inputs
from exl_cli.engines.exllamav2.stages import stages_of

VOCABULARY, HIDDEN, ROWS, TOKENS, WIDTH, SPARE, OFFSETS = 50, 8, 4, 8, 6, 99, [0, 300, 700]


class Embedding:
    """As much of exllamav2's embedding module as is asked for; scaled ones are more than a lookup."""

    def __init__(self, scaled: bool) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.archparams = SimpleNamespace(residual_stream_fp32=scaled, normalize_embeddings=False)
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.half)
        self.embedding.weight.data.copy_(torch.randn(VOCABULARY, HIDDEN, generator=numbers))
        self._factor = 3.0 if scaled else 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids).float() * self._factor


def make(embedding: Any, scaled: bool, **more: Any) -> Inputs:
    dtype = torch.float if scaled else torch.half
    cpu = torch.device("cpu")
    return Inputs(Embeddings(embedding, cpu), HIDDEN, dtype, ROWS, TOKENS, WIDTH, SPARE, OFFSETS, cpu, **more)


ROW = st.builds(
    ScheduledTokens,
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=2).map(tuple),
    st.integers(0, 20),
    st.lists(st.integers(0, 3), min_size=1, max_size=WIDTH - 1),
    st.integers(0, 2),
)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@given(passes=st.lists(st.lists(ROW, min_size=1, max_size=ROWS), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_a_pass_sees_only_its_own_rows(scaled: bool, with_states: bool, passes: list[list[ScheduledTokens]]) -> None:
    embedding = Embedding(scaled)
    inputs = make(embedding, scaled, with_states=with_states)
    later = inputs.received(torch.device("cpu"))
    for rows in passes:
        batch, tokens = 1 << (len(rows) - 1).bit_length(), max(len(row.ids) for row in rows)
        inputs.fill(rows, batch, tokens)
        inputs.send(batch, tokens)
        # What a later stage gets is the same.
        size = inputs.size(batch * tokens)
        later.memory[:size].copy_(inputs.memory[:size])
        for part in ("lengths", "rope_offsets", "block_table"):
            assert torch.equal(getattr(later, part), getattr(inputs, part))
        states = later.hidden[: batch * tokens].view(batch, tokens, HIDDEN)
        for index in range(batch):
            row = rows[index] if index < len(rows) else ScheduledTokens((), 0, [])
            assert inputs.lengths[index] == row.start
            assert inputs.rope_offsets[index] == OFFSETS[row.rope_table]
            assert inputs.block_table[index].tolist() == [*row.block_table, *[SPARE] * (WIDTH - len(row.block_table))]
            expected = embedding.forward(torch.tensor(row.ids, dtype=torch.long))
            assert torch.equal(states[index, : len(row.ids)], expected.to(states.dtype))


def test_a_table_that_changes_in_place_is_written_again() -> None:
    inputs, table = make(Embedding(False), False), [3, 4]
    for change in (lambda: None, lambda: table.append(7), lambda: table.__setitem__(0, 5)):
        change()
        inputs.fill([ScheduledTokens((1,), 0, table)], 1, 1)
        inputs.send(1, 1)
        assert inputs.block_table[0, : len(table)].tolist() == table


def test_what_the_kernels_read_is_aligned() -> None:
    inputs = make(Embedding(False), False)
    assert (inputs.hidden.data_ptr() - inputs.lengths.data_ptr()) % 256 == 0


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
def test_the_embeddings_of_a_prompt_are_those_of_its_tokens(scaled: bool, count: int) -> None:
    module = Embedding(scaled)
    embeddings = Embeddings(module, torch.device("cpu"))
    for seed in range(2):
        ids = torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
        expected = module.forward(ids) if scaled else module.embedding(ids)
        assert torch.equal(embeddings.of(ids.numpy()), expected[None])


@pytest.mark.parametrize(
    ("gpus", "cuts", "stages"),
    [
        ([0, 0, 0, 0], (), [(0, 4, 0)]),
        ([1, 1, 1, 1], (), [(0, 4, 1)]),
        ([0, 0, 0, 2], (), [(0, 3, 0), (3, 4, 2)]),
        ([0, 1, 1, 2], (2,), [(0, 1, 0), (1, 2, 1), (2, 3, 1), (3, 4, 2)]),
    ],
)
def test_each_gpu_has_a_stage(gpus: list[int], cuts: tuple[int, ...], stages: list[tuple[int, int, int]]) -> None:
    # exllamav2's modules: embeddings on the CPU, attention and MLP of each layer, norm and head.
    places = [-1, *(gpu for gpu in gpus for _ in range(2)), gpus[-1], gpus[-1]]
    model = SimpleNamespace(modules=[SimpleNamespace(device_idx=place) for place in places])
    assert [(layers.start, layers.stop, gpu) for layers, gpu in stages_of(model, cuts)] == stages
