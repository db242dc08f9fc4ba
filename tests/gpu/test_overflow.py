"""Models that overflow float16: finite with exl's kernels, compared with exllamav2's and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinymodels
import torch
from overflow import OURS, THEIRS, agreement, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

VARIANTS = {
    "gptq": tinymodels.Variant("gptq", symmetric=True),
    "exl2": tinymodels.Variant("exl2", bits=(5, 4), group_size=64),
}
CHANNELS, LIMIT = [17, 200], 65504.0
IDS = [int(i) for i in torch.randint(100, 4000, (300,), generator=torch.Generator().manual_seed(7))]


def planted(folder: Path, variant: tinymodels.Variant, factors: dict[str, float | Tensor]) -> dict[str, Tensor]:
    """Write a model whose tensors of these names are multiplied; returns its float32 state."""
    state = tinymodels.write(folder, variant, seed=11)
    file = folder / "model.safetensors"
    stored = load_file(file)
    for part, factor in factors.items():
        for name in [name for name in state if part in name]:
            # Of a quantized layer, its scales.
            scales = ("scales", "q_scale_max") if name not in stored else ("weight",)
            for scale in scales:
                key = name.removesuffix("weight") + scale
                if key in stored:
                    stored[key] = (stored[key] * factor).to(stored[key].dtype)
            state[name] = state[name] * factor
    save_file(stored, file, {"format": "pt"})
    return state


def massive_activations(folder: Path, variant: tinymodels.Variant) -> dict[str, Tensor]:
    """A model whose hidden states are at the end of the range in two channels, and pass it as layers add to them."""
    norms = torch.full((tinymodels.HIDDEN,), 32.0)
    norms[CHANNELS] = 2.0**-7
    factors: dict[str, float | Tensor] = {"o_proj": 512.0, "down_proj": 128.0, "embed_tokens": 128.0, "norm": norms}
    state = planted(folder, variant, factors)
    stored = load_file(folder / "model.safetensors")
    ends = torch.tensor([LIMIT - 32, 32 - LIMIT])
    for tensors in (stored, state):
        embeddings = tensors["model.embed_tokens.weight"]
        embeddings[:, CHANNELS] = ends.to(embeddings.dtype)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return state


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("format_", VARIANTS)
def test_hidden_states_past_the_range(format_: str, step: int, tmp_path: Path) -> None:
    variant = VARIANTS[format_]
    state = massive_activations(tmp_path / "model", variant)
    with torch.inference_mode():
        hidden = tinymodels.reference_model(state, variant)(torch.tensor([IDS]), output_hidden_states=True)
    assert max(float(states.abs().max()) for states in hidden.hidden_states[:-1]) > LIMIT + 16
    (ours, kernels), (theirs, others) = (logits(tmp_path / "model", IDS, step, name) for name in (OURS, THEIRS))
    assert kernels == "exl's kernels"
    assert "exllamav2's modules" in others
    assert ours.isfinite().all()
    same = agreement(ours, theirs), agreement(ours, hidden.logits[0])
    print(
        f"\n{format_}, {step} at once: the same token in {100 * same[0]:.1f} %, as transformers {100 * same[1]:.1f} %"
    )
    assert min(same) >= 0.95


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("format_", VARIANTS)
def test_gated_activations_past_the_range(format_: str, step: int, tmp_path: Path) -> None:
    """exllamav2 leaves them infinite, and its next norm has nothing left to compute with: transformers' are clamped."""
    variant = VARIANTS[format_]
    state = planted(tmp_path / "model", variant, {"gate_proj": 128.0, "up_proj": 128.0, "down_proj": 2.0**-7})
    model, peaks = tinymodels.reference_model(state, variant), []

    def clamp(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        peaks.append(float(inputs[0].abs().max()))
        return (inputs[0].clamp(-LIMIT, LIMIT),)

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(clamp)
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    assert min(peaks) > 2 * LIMIT
    ours, kernels = logits(tmp_path / "model", IDS, step, OURS)
    assert kernels == "exl's kernels"
    assert ours.isfinite().all()
    same = agreement(ours, expected)
    print(f"\n{format_}, {step} at once: the same token as transformers in {100 * same:.1f} %")
    assert same >= 0.95
