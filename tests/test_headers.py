"""Invalid safetensors headers and index files are refused in one line, per the specification."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from exl_cli.errors import DamagedModelError, ExlError, UnsupportedModelError
from exl_cli.models.chat_template import load_chat_template
from exl_cli.models.info import inspect

NORM, FIRST = "model.norm.weight", "model.layers.0.input_layernorm.weight"
Header = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path, gptq_dir: Path) -> Path:
    return shutil.copytree(gptq_dir, tmp_path / "model")


def rewrite(folder: Path, change: Callable[[Header], object]) -> Path:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    return file


LIES: dict[str, tuple[Callable[[Header], object], str]] = {
    "overlap": (lambda h: h[NORM].update(data_offsets=h[FIRST]["data_offsets"]), "its tensors overlap"),
    "gap": (lambda h: h.pop(NORM), "its tensors have a gap"),
    "type of another size": (lambda h: h[NORM].update(dtype="F32"), "512 bytes, which does not match [256] of F32"),
    "unknown type": (lambda h: h[NORM].update(dtype="Q7"), "has an invalid entry for tensor"),
    "no type": (lambda h: h[NORM].update(dtype=["F16"]), "has an invalid entry for tensor"),
    "other shape": (lambda h: h[NORM].update(shape=[255]), "512 bytes, which does not match [255] of BF16"),
    "negative shape": (lambda h: h[NORM].update(shape=[-16, -16]), "has an invalid entry for tensor"),
    "broken numbers": (lambda h: h[NORM].update(shape=[256.5]), "has an invalid entry for tensor"),
    "endless dimensions": (lambda h: h[NORM].update(shape=[9] * 1_000_000), "has an invalid entry for tensor"),
    "backwards": (lambda h: h[NORM].update(data_offsets=[512, 0]), "has an invalid entry for tensor"),
    "far away": (lambda h: h[NORM].update(data_offsets=[2**60, 2**60 + 512]), "its tensors have a gap"),
    "nothing": (lambda h: h.update({NORM: None}), "has an invalid entry for tensor"),
}


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(folder: Path, change: Callable[[Header], object], message: str) -> None:
    file = rewrite(folder, change)
    with pytest.raises(SafetensorError), safe_open(file, "np"):
        pass  # the format's own library refuses it as well
    with pytest.raises(DamagedModelError) as caught:
        inspect(folder)
    assert message in caught.value.message
    assert len(str(caught.value)) < 600


def test_weights_that_are_whole_numbers_are_refused(folder: Path) -> None:
    rewrite(folder, lambda h: h[NORM].update(dtype="I16"))
    with pytest.raises(UnsupportedModelError, match="has I16 weights"):
        inspect(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(DamagedModelError, match=r"twice, in model\.safetensors and in other\.safetensors"):
        inspect(folder)


@pytest.mark.parametrize(
    "file",
    [
        *("a" * 5000, "nul\0.safetensors", "", "..", "/etc/passwd", "config.json", 7, ["a"], None),
        *("gone.safetensors", "model-00001-of-20000.safetensors", "model-1-of-99999999999.safetensors"),
    ],
)
def test_an_index_that_names_no_weights_is_refused(folder: Path, file: object) -> None:
    index = {"weight_map": {NORM: file, FIRST: "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    began = time.process_time()
    with pytest.raises(DamagedModelError) as refused:
        inspect(folder)
    assert len(str(refused.value)) < 600
    assert time.process_time() - began < 10


def test_a_header_of_more_tensors_than_any_model_has(folder: Path) -> None:
    header = json.dumps({f"t{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(150_001)})
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    began = time.process_time()
    with pytest.raises(DamagedModelError, match="describes 150,001 tensors"):
        inspect(folder)
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
        *("tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/rag.jinja"),
    ],
)
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
    (folder / name).write_text(pointer)
    with pytest.raises(ExlError, match=f"{Path(name).name} is a Git LFS pointer, not the file itself"):
        load_chat_template(inspect(folder).path)
