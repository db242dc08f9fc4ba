"""Loads models through exllamav2's own code on the CPU, a program for `test_weights`: FOLDER RESULT, FOLDER RESULT, …

Each result has the names that the model asked its files for, in order, those that were foreseen, those that exllamav2
had to read by itself, and what it then holds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fakeextension
import torch
from safetensors.torch import save_file

fakeextension.install()

from exl_cli.engines.exllamav2 import light_import, weights  # noqa: E402

light_import.import_model()

from exllamav2.config import ExLlamaV2Config  # noqa: E402
from exllamav2.linear import ExLlamaV2Linear  # noqa: E402
from exllamav2.model import ExLlamaV2  # noqa: E402
from exllamav2.stloader import STFile  # noqa: E402


def recording(names: list[str]) -> None:
    """Put it before what exllamav2 calls to read a tensor."""
    inner = STFile.get_tensor

    def get_tensor(self: STFile, key: str, device: Any, out_dtype: Any = None) -> torch.Tensor:
        names.append(key)
        return inner(self, key, device, out_dtype)

    STFile.get_tensor = get_tensor


def leaves(module: Any) -> Any:
    """Modules without others in them."""
    inside = list(module.submodules)
    names = ("input_layernorm", "post_attention_layernorm", "gate")
    inside += [part for name in names if (part := getattr(module, name, None))]
    for part in inside:
        yield from leaves(part)
    if not inside:
        yield module


def add_weights(folder: Path) -> None:
    """Zeros for every matrix and norm that a float model of that config has."""
    config = ExLlamaV2Config()
    config.model_dir = str(folder)
    config.prepare(no_tensors=True)
    tensors = {}
    for module in ExLlamaV2(config).modules:
        for leaf in leaves(module):
            shape = (getattr(leaf, "head_dim", config.hidden_size),)
            if isinstance(leaf, ExLlamaV2Linear):
                shape = (leaf.out_features, leaf.in_features)
            if leaf.key.endswith("embed_tokens"):
                shape = (config.vocab_size, config.hidden_size)
            tensors[f"{leaf.key}.weight"] = torch.zeros(shape, dtype=torch.half)
            if getattr(leaf, "has_bias", False):
                tensors[f"{leaf.key}.bias"] = torch.zeros(leaf.out_features, dtype=torch.half)
    save_file(tensors, folder / "model.safetensors")


def held(model: ExLlamaV2) -> dict[str, torch.Tensor]:
    """What the modules hold, by the names of the files."""
    found = {}
    for module in model.modules:
        for leaf in leaves(module):
            for name, tensor in (getattr(leaf, "q_tensors", None) or {}).items():
                found[f"{leaf.key}.{name}"] = tensor
            for holder in (leaf, getattr(leaf, "linear", None), getattr(leaf, "embedding", None)):
                if isinstance(tensor := getattr(holder, "weight", None), torch.Tensor):
                    found[f"{leaf.key}.weight"] = tensor.data
    return found


asked: list[str] = []
by_itself: list[str] = []
recording(by_itself)


def load(folder: Path) -> dict[str, Any]:
    """Load one."""
    if not list(folder.glob("*.safetensors")):
        add_weights(folder)
    model = ExLlamaV2(ExLlamaV2Config(str(folder)))
    expected = list(weights.foreseen(model))
    with weights.read_ahead(model):
        if not asked:
            recording(asked)
        del asked[:], by_itself[:]
        for module in model.modules:
            module.set_device_idx(-1)
            try:
                module.load(device_context=False)
            except TypeError:  # modules without tensors of their own on the device
                module.load()
    return {"asked": [*asked], "foreseen": expected, "by_itself": [*by_itself], "held": held(model)}


for folder, result in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    torch.save(load(Path(folder)), result)
