"""A folder as exllamav2 wants to read it.

exllamav2 0.3.2 takes a folder and reads it by the conventions of early 2025. Where a model follows newer or older ones
it computes something else without saying so:

- transformers 5 writes rotary settings as `rope_parameters`; exllamav2 knows `rope_theta` and `rope_scaling` only and
  falls back to a base of 10,000;
- GPTQ made before 2024 keeps its settings in `quantize_config.json`, where exllamav2 does not look for the zero-point
  convention;
- it loads every .safetensors file there is, also a second copy of the weights (Mistral's `consolidated.safetensors`);
- it stops with an assertion where config.json names two architectures or both `type` and `rope_type`.

So it gets a temporary folder of links to the right files and a config.json in its own terms.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exl_cli.models.config import quantization_of
from exl_cli.models.info import ModelInfo


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in exllamav2's terms: same meaning, older names."""
    out = _legacy_rope(config)
    if isinstance(out.get("text_config"), dict):
        out["text_config"] = _legacy_rope(out["text_config"])
    if isinstance(out.get("architectures"), list):
        out["architectures"] = out["architectures"][:1]
    return out


def _legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    out = dict(config)
    rope = out.get("rope_parameters")
    if isinstance(rope, dict) and "full_attention" not in rope:
        if rope.get("rope_theta") is not None:
            out.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("partial_rotary_factor") is not None:
            out.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default" and not out.get("rope_scaling"):
            out["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    scaling = out.get("rope_scaling")
    if isinstance(scaling, dict):
        if "rope_type" in scaling and "type" in scaling:
            scaling = {k: v for k, v in scaling.items() if k != "type"}
            out["rope_scaling"] = scaling
        original = scaling.get("original_max_position_embeddings")
        if original is not None:
            out.setdefault("original_max_position_embeddings", original)
    return out


@contextmanager
def folder_for_exllamav2(info: ModelInfo) -> Iterator[Path]:
    """A temporary folder of links to the model's files; it must exist until the weights are loaded."""
    with tempfile.TemporaryDirectory(prefix="exl-") as name:
        folder = Path(name)
        for file in info.path.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
                (folder / file.name).symlink_to(file.resolve())
        for file in {tensor.file for tensor in info.tensors.values()}:
            (folder / file.name).symlink_to(file.resolve())
        config = legacy_config(info.config)
        if info.format == "gptq":
            # It trusts what is declared here; zero_offset is what the tensors say.
            stored = "gptq" if info.zero_offset else "gptq_v2"
            config["quantization_config"] = {**quantization_of(config), "checkpoint_format": stored}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder
