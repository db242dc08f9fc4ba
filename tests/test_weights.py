"""exllamav2's weights read ahead: through its own code, on the CPU, each tensor is the file's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinymodels
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(importlib.util.find_spec("exllamav2") is None, reason="exllamav2 is not installed")

QUANTIZED = ("exl2-every-width", "exl2-3bit-sharded", "exl2-bias", "gptq-act-order", "gptq-bias", "gptq-tied")
FLOAT = ("float32-sharded", "bfloat16-tied")
# Those whose modules are built in another way.
OTHERS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "CohereForCausalLM": {"logit_scale": 0.5, "layer_norm_eps": 1e-5},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 64, "sliding_window": 512},
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    for name in QUANTIZED + FLOAT:
        tinymodels.write(root / name, tinymodels.VARIANTS[name])
    for name, special in OTHERS.items():
        config = tinymodels.config_of(tinymodels.Variant("float", config={"head_dim": 64, "vocab_size": 512}))
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({**config, **special, "architectures": [name]}))
    folders = sorted(root.iterdir())
    arguments = [text for folder in folders for text in (folder, folder / "result.pt")]
    program = Path(__file__).parent / "load_on_cpu.py"
    subprocess.run([sys.executable, program, *arguments], check=True, stdout=subprocess.DEVNULL)
    return {folder.name: {"folder": folder, **torch.load(folder / "result.pt")} for folder in folders}


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOAT, *OTHERS])
def test_what_exllamav2_asks_for_is_foreseen(loaded: dict[str, dict[str, Any]], name: str) -> None:
    found = loaded[name]
    assert found["asked"] == found["foreseen"]
    # Embeddings that serve as the head as well are read twice, the second time late.
    assert found["by_itself"] == (["model.embed_tokens.weight"] if name.endswith("tied") else [])


@pytest.mark.parametrize("name", [name for name in QUANTIZED + FLOAT if not name.startswith("exl2")])
def test_tensors_are_the_files(loaded: dict[str, dict[str, Any]], name: str) -> None:
    stored, held = _stored(loaded[name]["folder"]), loaded[name]["held"]
    compared = stored.keys() & held.keys()
    assert len(compared) >= 20
    for key in compared:
        expected = stored[key].half() if stored[key].is_floating_point() else stored[key]
        assert torch.equal(held[key], expected), key


@pytest.mark.parametrize("name", [name for name in QUANTIZED if name.startswith("exl2")])
def test_columns_of_exl2_matrices_before_another_are_in_its_order(loaded: dict[str, dict[str, Any]], name: str) -> None:
    """As `ext_stloader.cpp` puts them: column c is what was column `map[c]`, the map being the order of the rows."""
    stored, held = _stored(loaded[name]["folder"]), loaded[name]["held"]
    for key, tensor in stored.items():
        if not key.endswith((".q_weight", ".q_scale")):
            continue
        expected = tensor.numpy()
        if "gate_proj" in key or "up_proj" in key:
            down = key.rpartition(".mlp.")[0] + ".mlp.down_proj.q_invperm"
            order = np.argsort(stored[down].numpy())
            assert (order != np.arange(len(order))).any()
            if key.endswith("q_weight"):
                expected = expected[:, order]
            else:
                nibbles = expected.view(np.uint32)[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
                ordered = nibbles.reshape(len(expected), -1)[:, order].reshape(nibbles.shape)
                expected = (ordered << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)
        np.testing.assert_array_equal(held[key].numpy(), expected, err_msg=key)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def test_modules_without_memory_draw_nothing() -> None:
    """Or torch's compiler is imported for it."""
    code = """
import sys
import torch
from exl_cli.engines.exllamav2.weights import nothing_drawn
with nothing_drawn():
    torch.nn.Embedding(8, 8, device="meta")
    torch.nn.Linear(8, 8, bias=True, device="meta")
    real = torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8)
assert all(module.weight.std() > 0.01 for module in real)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
