"""The GPU memory estimate, against exllamav2's tensor shapes and file sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import MISTRAL_7B
from safetensors import safe_open

from exl_cli.errors import OutOfMemoryError, spell
from exl_cli.models import memory, placement
from exl_cli.models.info import Format, ModelInfo, inspect
from exl_cli.models.load_options import CacheType
from exl_cli.models.memory import PAGE
from exl_cli.system.units import GIB

LLAMA_2_7B = {**MISTRAL_7B, "intermediate_size": 11008, "num_key_value_heads": 32}


def info(config: dict[str, Any], size: int = 4_100_000_000, form: Format = "exl2", context: int = 32768) -> ModelInfo:
    return ModelInfo("seven", Path("seven"), form, "MistralForCausalLM", 0, 4.0, context, size, {}, config=config)


def estimate(model: ModelInfo, context: int, cache: CacheType = "fp16") -> memory.Estimate:
    found = memory.estimate(model, context, cache)
    assert found is not None
    return found


def test_float16_cache_size_is_the_textbook_formula() -> None:
    assert estimate(info(LLAMA_2_7B), 4096).cache == 2 * GIB  # half a MiB for each token
    assert estimate(info(MISTRAL_7B), 4096).cache == GIB // 2  # a quarter of that, with 8 of 32 heads


@pytest.mark.parametrize(("cache", "key_bytes", "value_bytes"), [("q8", 1, 1), ("q6", 1, 0.5), ("q4", 0.5, 0.5)])
def test_quantized_cache_size_is_that_of_its_tensors(cache: CacheType, key_bytes: float, value_bytes: float) -> None:
    # cache.py: states of (tokens, 8 heads, 128 / weights per byte), scales of (tokens, 8, 128 / 32) in float16, for
    # keys and values of 32 layers; and one layer's keys and values in float16.
    tokens, width = 16384, 8 * 128
    states = tokens * width * (key_bytes + value_bytes)
    scales = 2 * tokens * width // 32 * 2
    one_layer = 2 * tokens * width * 2
    assert estimate(info(MISTRAL_7B), tokens, cache).cache == 32 * (states + scales) + one_layer


def test_what_many_sequences_take_is_counted_where_a_prompts_logits_take_less() -> None:
    vocabulary = 256_000
    model = info({**MISTRAL_7B, "vocab_size": vocabulary})
    # 256 rows of logits, as they come and in float32, and two more floats of each for the sampler.
    assert estimate(model, 256).working > 256 * vocabulary * (2 + 4 + 2 * 4)
    # exllamav2 computes the logits of a whole chunk while it loads, which are more.
    assert estimate(model, 4096).working == estimate(model, 8192).working


def test_rows_of_experts_are_counted() -> None:
    dense, mixture = (estimate(info({**MISTRAL_7B, **more}), 4096) for more in ({}, {"num_experts_per_tok": 2}))
    # The inner rows of 512 tokens for two experts each, in float16.
    assert mixture.working - dense.working >= 2 * 512 * 2 * 14336
    assert mixture.parts.each - dense.parts.each == mixture.working - dense.working


def test_context_is_rounded_up_to_whole_pages() -> None:
    model = info(MISTRAL_7B)
    assert estimate(model, 4001) == estimate(model, 4096)
    assert estimate(model, 4097).cache == estimate(model, 4096 + PAGE).cache


def test_weights_are_the_tensors_without_the_embeddings(exl2_dir: Path, gptq_dir: Path) -> None:
    embeddings = 4096 * 256 * 2
    for folder, head in ((exl2_dir, 0), (gptq_dir, embeddings)):
        total, names = 0, set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    names.add(name)
                    tensor = opened.get_tensor(name)
                    total += 0 if "embed_tokens" in name else tensor.nbytes
        # The GPTQ file leaves out the tied head, of which exllamav2 makes a matrix of its own.
        assert any("lm_head" in name for name in names) == (head == 0)
        assert estimate(inspect(folder), 1024).weights == total + head


def test_without_tensors_the_file_size_is_used() -> None:
    embeddings = 32000 * 4096 * 2
    assert estimate(info(MISTRAL_7B), 4096).weights == 4_100_000_000 - embeddings
    tied = info({**MISTRAL_7B, "tie_word_embeddings": True}, form="gptq")
    assert estimate(tied, 4096).weights == 4_100_000_000


def test_scratch_is_that_of_the_hungriest_module() -> None:
    # linear.py: the head dequantizes 4096 x 32000 to float16, more than the MLP's 251 MB.
    assert estimate(info(MISTRAL_7B), 4096).scratch == 4096 * 32000 * 2
    # mlp.py: hidden states, two intermediate ones for 2,048 rows, and one dequantized matrix.
    small_head = info({**MISTRAL_7B, "vocab_size": 1000})
    assert estimate(small_head, 4096).scratch == 2 * 2048 * (4096 + 2 * 14336) + 2 * 4096 * 14336
    assert estimate(info(MISTRAL_7B, form="float"), 4096).scratch == 0


def test_a_model_that_does_not_tell_its_dimensions_has_no_estimate() -> None:
    unknown = info({"hidden_size": 4096})
    assert memory.estimate(unknown, 4096) is None
    assert placement.place(unknown, 4096, "fp16", [1]) is None


@pytest.mark.parametrize("cache", memory.CACHE_TYPES)
@pytest.mark.parametrize("free", [5.5, 6.5, 8.0])
def test_the_largest_context_fits_and_one_page_more_does_not(cache: CacheType, free: float) -> None:
    model, bytes_free = info(MISTRAL_7B), [round(free * GIB)]
    largest = placement.largest_context(model, bytes_free, cache)
    assert largest % PAGE == 0
    (share,) = placement.place(model, largest, cache, bytes_free) or ()
    assert share.allocated == estimate(model, largest, cache).allocated
    if largest < model.context_length:
        with pytest.raises(OutOfMemoryError):
            placement.place(model, largest + PAGE, cache, bytes_free)


def test_the_largest_context_is_between_zero_and_the_models() -> None:
    model = info(MISTRAL_7B, context=8192)
    assert placement.largest_context(model, [80 * GIB]) == 8192
    assert placement.largest_context(model, [3 * GIB]) == 0


def test_the_error_states_needed_and_free_memory_and_what_fits() -> None:
    model, free = info(MISTRAL_7B), [6 * GIB]
    with pytest.raises(OutOfMemoryError) as caught:
        placement.place(model, 32768, "fp16", free)
    needed = estimate(model, 32768).allocated / GIB
    assert caught.value.message == (
        f"seven needs about {needed:.1f} GiB of GPU memory for a context of 32,768 tokens with fp16 cache, "
        "but 6.0 GiB is free"
    )
    assert spell(caught.value.hint).startswith(
        f"max_seq_len {placement.largest_context(model, free)} is the largest context that fits; cache q4 fits "
    )
    with pytest.raises(OutOfMemoryError, match=r"3\.0 GiB is free") as caught:
        placement.place(model, 4096, "fp16", [3 * GIB])
    assert caught.value.hint.startswith("no context fits: use a smaller quantization")


def test_the_refusal_of_many_sequences_says_how_many_would_fit() -> None:
    model, free = info(MISTRAL_7B), [8 * GIB]
    with pytest.raises(OutOfMemoryError) as caught:
        placement.place(model, 4000, "fp16", free, sequences=16)
    needed = estimate(model, 16 * 4096).allocated / GIB
    assert caught.value.message == (
        f"seven needs about {needed:.1f} GiB of GPU memory for 16 contexts of 4,000 tokens with fp16 cache, "
        "but 8.0 GiB is free"
    )
    hint = spell(caught.value.hint)
    most = int(hint.split()[1])
    assert hint == f"sequences {most} is the most that fits; see what else uses the GPU with nvidia-smi"
    assert placement.place(model, 4000, "fp16", free, sequences=most) is not None
    with pytest.raises(OutOfMemoryError):
        placement.place(model, 4000, "fp16", free, sequences=most + 1)
    with pytest.raises(OutOfMemoryError, match="3 contexts of 32,768 tokens") as caught:
        placement.place(model, 32768, "fp16", [6 * GIB], sequences=3)
    assert "is the largest context that fits" in caught.value.hint


def test_a_draft_models_cache_has_room_for_as_many_sequences() -> None:
    draft = info(MISTRAL_7B, size=600_000_000, context=2048)
    cache = estimate(draft, 2048).cache
    more = placement.beside(draft, 4096, sequences=5) - placement.beside(draft, 4096)
    assert more == pytest.approx(4 * cache * 1.03, rel=1e-6)
