"""Weights read ahead are those that exllamav2 reads itself, bit for bit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinymodels
import torch

from exl_cli.engines.exllamav2 import import_exllamav2, weights
from exl_cli.engines.exllamav2.compat_dir import folder_for_exllamav2
from exl_cli.models.info import inspect


@pytest.fixture(scope="module", autouse=True)
def _exllamav2() -> None:
    import_exllamav2.import_exllamav2()


def tensors(folder: Path, monkeypatch: pytest.MonkeyPatch, *, ahead: bool) -> tuple[dict[str, torch.Tensor], int]:
    """All that a loaded model holds, and how many tensors exllamav2 read itself."""
    from exllamav2 import stloader
    from exllamav2.cache import ExLlamaV2Cache
    from exllamav2.config import ExLlamaV2Config
    from exllamav2.model import ExLlamaV2

    read: list[Any] = []

    def stloader_read(*arguments: Any) -> None:
        read.append(arguments)
        extension.stloader_read(*arguments)

    extension = stloader.ext_c
    monkeypatch.setattr(stloader, "ext_c", SimpleNamespace(stloader_read=stloader_read))
    with folder_for_exllamav2(inspect(folder)) as view:
        config = ExLlamaV2Config(str(view))
        config.max_seq_len, config.no_sdpa, config.no_graphs = 256, True, True
        config.arch_compat_overrides(quiet=True)
        model = ExLlamaV2(config)
        cache = ExLlamaV2Cache(model, max_seq_len=256, lazy=True)
        with weights.read_ahead(model) if ahead else contextlib.nullcontext():
            model.load_autosplit(cache)
    monkeypatch.undo()
    torch.cuda.synchronize()
    found = {}
    for module in model.modules:
        for leaf in weights._leaves(module):
            for name, tensor in (getattr(leaf, "q_tensors", None) or {}).items():
                found[f"{leaf.key}.{name}"] = tensor.cpu()
            for holder in (leaf, getattr(leaf, "linear", None), getattr(leaf, "embedding", None)):
                if isinstance(tensor := getattr(holder, "weight", None), torch.Tensor):
                    found[f"{leaf.key}.weight"] = tensor.data.cpu()
    model.unload()
    return found, len(read)


def check(folder: Path, monkeypatch: pytest.MonkeyPatch, twice: int = 0) -> None:
    expected, all_of_them = tensors(folder, monkeypatch, ahead=False)
    actual, read = tensors(folder, monkeypatch, ahead=True)
    assert all_of_them > 10
    assert read == twice
    assert actual.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(actual[key], expected[key])]
    assert different == []
    assert all(actual[key].dtype == expected[key].dtype for key in expected)


def test_the_built_in_model(exl2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(exl2_dir, monkeypatch)


def test_a_gptq_model(gptq_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its embeddings are the head as well, and read again for that.
    check(gptq_dir, monkeypatch, twice=1)


@pytest.mark.parametrize("name", tinymodels.VARIANTS)
def test_every_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = tinymodels.VARIANTS[name]
    tinymodels.write(tmp_path / "model", variant, seed=3)
    # Embeddings that are the head as well are read again for that.
    check(tmp_path / "model", monkeypatch, twice=int(variant.tied))


def test_more_than_all_buffers_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of many blocks, the largest more than the buffers together."""
    monkeypatch.setattr(tinymodels, "VOCAB", 200_000)
    tinymodels.write(tmp_path / "model", tinymodels.Variant("gptq"))
    check(tmp_path / "model", monkeypatch)
