"""Which layers of a model go to which GPU, and what is said where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import nvidia_gpus

from exl_cli import loader
from exl_cli.errors import ExlError, OutOfMemoryError, UsageError, spell
from exl_cli.models import memory, placement
from exl_cli.models.info import ModelInfo, inspect
from exl_cli.models.load_options import CacheType, LoadOptions
from exl_cli.models.placement import Share
from exl_cli.system.units import GIB, MIB

# Llama 3 70B at 4.0 bpw: 80 layers, about 32 GiB of them, and a head of 0.8 GiB (6 bits).
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SEVENTY = ModelInfo(
    "seventy", Path("seventy"), "exl2", "LlamaForCausalLM", 0, 4.0, 8192, 37 * GIB, {}, head_bits=6, config=LLAMA_70B
)
CARD = 24 * GIB


def place(free: list[float], context: int = 4096, cache: CacheType = "fp16", **given: Any) -> list[Share]:
    shares = placement.place(SEVENTY, context, cache, [round(gib * GIB) for gib in free], **given)
    assert shares is not None
    return shares


def test_a_model_that_fits_one_gpu_stays_on_the_first_that_has_room() -> None:
    assert [(share.gpu, share.layers) for share in place([80, 80])] == [(0, range(80))]
    assert [(share.gpu, share.layers) for share in place([8, 80])] == [(1, range(80))]


def test_equal_gpus_hold_equal_parts_and_as_few_as_possible_are_used() -> None:
    first, second = place([23.5, 23.5, 23.5])
    assert (first.gpu, second.gpu) == (0, 1)
    assert (first.layers.start, first.layers.stop, second.layers.stop) == (0, second.layers.start, 80)
    layer = first.weights // len(first.layers)
    # The head and the logits take the room of about three layers on the second.
    assert abs(first.allocated - second.allocated) < 2 * layer
    assert len(first.layers) > len(second.layers)


@pytest.mark.parametrize("free", [[12.0, 30.0], [30.0, 12.0], [10.0, 20.0, 20.0]])
def test_unequal_gpus_are_filled_to_the_same_proportion(free: list[float]) -> None:
    shares = place(free)
    assert sum(len(share.layers) for share in shares) == 80
    filled = [share.allocated / (free[share.gpu] * GIB) for share in shares]
    assert max(filled) <= 1
    assert max(filled) - min(filled) < 0.1


def test_cache_scratch_and_activations_count_on_each_gpu() -> None:
    needed = memory.estimate(SEVENTY, 4096, "q8")
    assert needed is not None
    first, second = place([23.5, 23.5], cache="q8")
    # All layers once, with their cache; and on each GPU what a single one would need once.
    both = first.allocated + second.allocated
    once = needed.scratch + 448 * MIB
    assert needed.allocated + once < both < needed.allocated + once + GIB
    long_context, _ = place([31.5, 31.5], context=8192, sequences=4)
    short_context, _ = place([31.5, 31.5], context=8192)
    # 3 more contexts of 8,192 tokens, 8 heads of 128, keys and values of 2 bytes.
    per_layer = 3 * 8192 * 8 * 128 * 2 * 2
    assert long_context.allocated - short_context.allocated == pytest.approx(
        1.03 * per_layer * len(long_context.layers), abs=GIB
    )


def test_sizes_are_weights_per_gpu_in_order() -> None:
    first, second = place([80, 80], sizes=(10, 30))
    assert first.weights <= 10 * GIB < first.weights + first.weights / len(first.layers)
    assert (first.gpu, second.gpu, second.layers.stop) == (0, 1, 80)
    (only,) = place([10, 80], sizes=(0, 40))
    assert (only.gpu, only.layers) == (1, range(80))


def failure(error: type[ExlError], free: list[float], **given: Any) -> tuple[str, str]:
    with pytest.raises(error) as caught:
        place(free, **given)
    return spell(caught.value.message), spell(caught.value.hint)


def test_an_error_names_the_gpu_that_is_too_small_and_a_split_that_fits() -> None:
    message, hint = failure(OutOfMemoryError, [23.5, 18.7], sizes=(14, 40))
    needs = place([80, 80], sizes=(14, 40))[1]
    assert message == (
        f"seventy does not fit gpu_split 14,40: GPU 1 has 18.7 GiB free but needs {needs.allocated / GIB:.1f} GiB "
        f"({needs.weights / GIB:.1f} GiB of weights)"
    )
    assert hint.endswith(" fits; see what else uses the GPU with nvidia-smi")
    offered = tuple(map(float, hint.split()[1].split(",")))
    assert len(place([23.5, 18.7], sizes=offered)) == 2
    _, hint = failure(OutOfMemoryError, [60, 10], sizes=(10, 40))
    assert hint == "gpu_split auto fits; see what else uses the GPU with nvidia-smi"
    _, hint = failure(OutOfMemoryError, [16, 16], sizes=(20, 20))
    assert hint == "no split fits: use cache q4, a smaller max_seq_len or a smaller quantization"


def test_sizes_that_are_too_small_or_too_many_are_refused() -> None:
    message, hint = failure(UsageError, [80, 80], sizes=(10, 10))
    assert message.startswith("seventy does not fit gpu_split 10,10: its weights take 3")
    assert hint == "raise the numbers (GiB of weights per GPU), or use gpu_split auto"
    message, _ = failure(UsageError, [80], sizes=(20, 20))
    assert message == "gpu_split 20,20 is for 2 GPUs, but this machine has 1"


def test_without_room_the_memory_of_each_gpu_is_said() -> None:
    message, _ = failure(OutOfMemoryError, [12, 16])
    assert message.endswith("but 28.0 GiB is free on 2 GPUs (12.0 GiB + 16.0 GiB)")


def test_the_largest_context_on_two_gpus_fits_and_one_page_more_does_not() -> None:
    free = [20.5 * GIB, 20.5 * GIB]
    largest = placement.largest_context(SEVENTY, [round(count) for count in free])
    assert 0 < largest < SEVENTY.context_length
    assert len(place([20.5, 20.5], context=largest)) == 2
    with pytest.raises(OutOfMemoryError):
        place([20.5, 20.5], context=largest + memory.PAGE)


@pytest.mark.parametrize(
    ("split", "count"),
    [(None, 64), ((1.0,), 64), ((0.002, 1.0), 128)],  # GiB; the model has 4 MiB of weights
)
def test_many_sequences_take_no_gpu_that_one_does_not_need(
    gptq_dir: Path, monkeypatch: pytest.MonkeyPatch, split: tuple[float, ...] | None, count: int
) -> None:
    model = inspect(gptq_dir)
    needed = memory.estimate(model, 100 * 1024)
    assert needed is not None
    nvidia_gpus(monkeypatch, [needed.total] * 2)
    options = LoadOptions(engine="exllamav2", max_seq_len=1024, gpu_split=split)
    assert loader.fitting_sequences(model, options, (256, 128, 64, 1)) == count


def test_an_engine_takes_as_many_gpus_as_its_model_needs(gptq_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = inspect(gptq_dir), LoadOptions(max_seq_len=1024)
    needed = memory.estimate(model, 1024)
    assert needed is not None
    for total, count in ((needed.total, 1), (needed.total - 1, 2), (needed.total // 2, 1)):
        nvidia_gpus(monkeypatch, [total] * 4)
        assert loader.gpus_per_engine(model, options) == count
    assert loader.gpus_per_engine(model, LoadOptions(gpu_split=(0.002, 1, 1))) == 3
    assert loader.gpus_per_engine(model, LoadOptions(engine="cpu")) == 1


def test_tensors_count_in_their_layer_and_the_head_is_with_the_last(exl2_dir: Path) -> None:
    model = inspect(exl2_dir)
    needed = memory.estimate(model, 256)
    assert needed is not None
    assert sum(needed.parts.layers) + needed.parts.head == needed.weights
    # Tensors of a layer are counted where they are.
    expected = [
        sum(tensor.nbytes for tensor in model.tensors.values() if f".layers.{layer}." in tensor.name)
        for layer in range(len(needed.parts.layers))
    ]
    assert list(needed.parts.layers) == expected
    count = len(expected)
    shares = placement.place(model, 256, "fp16", [8 * GIB, 8 * GIB], sizes=(1.001 * expected[0] / GIB, 4))
    assert shares is not None
    assert [share.layers for share in shares] == [range(1), range(1, count)]
