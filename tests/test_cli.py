"""The `exl` command as a user meets it: start-up, errors in one line, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import exl

from exl_cli.errors import ExitCode

HEAVY = ("torch", "transformers", "exllamav2", "huggingface_hub", "tokenizers", "safetensors", "jinja2", "pynvml")


@pytest.mark.smoke
def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from exl_cli.cli.app import app
try:
    app(["--help"])
except SystemExit:
    pass
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]"
    assert "run" in out


def test_version() -> None:
    result = exl("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("exl ")


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.fixture
def model(gptq_dir: Path, tmp_path: Path) -> Path:
    return copy_model(gptq_dir, tmp_path / "model")


def edit_config(model: Path, **changes: object) -> None:
    file = model / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def check_error(result: subprocess.CompletedProcess[str], code: ExitCode, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, no traceback."""
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    assert result.returncode == code


def test_no_such_model_suggests_the_near_one() -> None:
    check_error(exl("run", "fabel-7m", "-p", "x"), ExitCode.MODEL_NOT_FOUND, "fabel-7m", "did you mean fable-7m?")


def test_no_such_model_at_all(tmp_path: Path) -> None:
    result = exl("run", "nobody/nothing", "-p", "x", "--models-dir", str(tmp_path))
    check_error(result, ExitCode.MODEL_NOT_FOUND, "nobody/nothing", str(tmp_path))


def test_a_prompt_in_the_place_of_the_model() -> None:
    check_error(exl("run", "Once upon a time"), ExitCode.MODEL_NOT_FOUND, "Once upon a time", "with -p")


def test_no_prompt() -> None:
    check_error(exl("run"), ExitCode.PROMPT, "prompt")


def test_two_prompts() -> None:
    check_error(exl("run", "fable-7m", "one", "-p", "two"), ExitCode.USAGE, "--prompt and PROMPT")


def test_a_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    check_error(exl("run", "-f", str(tmp_path / "no.txt")), ExitCode.PROMPT, "no.txt", "No such file")


def test_a_prompt_that_is_not_text() -> None:
    check_error(exl("run", stdin=b"abc\xff\xfe"), ExitCode.PROMPT, "not UTF-8", "byte 3")


@pytest.mark.smoke
def test_a_value_out_of_range() -> None:
    check_error(exl("run", "-p", "x", "--top-p", "1.5"), ExitCode.USAGE, "top_p", "at most 1", "--top-p")


def test_an_unknown_preset() -> None:
    check_error(exl("run", "-p", "x", "--preset", "wild"), ExitCode.USAGE, "wild", "greedy")


def test_a_variable_missing_from_the_command_line() -> None:
    check_error(exl("run", "--template", "{question}?"), ExitCode.PROMPT, "question", "--var")


def test_a_variable_that_the_template_does_not_use() -> None:
    result = exl("run", "--template", "{question}?", "--var", "question=a", "--var", "qestion=b")
    check_error(result, ExitCode.PROMPT, "qestion")


def test_a_prompt_longer_than_the_context_is_refused_before_loading() -> None:
    start = time.perf_counter()
    result = exl("run", stdin=b"story " * 3000)
    check_error(result, ExitCode.PROMPT, "3,0", "1,024")
    assert "Loading" not in result.stderr
    assert time.perf_counter() - start < 5


def test_more_context_than_the_model_has() -> None:
    check_error(exl("run", "-p", "x", "--max-seq-len", "9999"), ExitCode.USAGE, "9,999", "1,024")


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    check_error(exl("run", str(model), "-p", "x"), ExitCode.DAMAGED_MODEL, "config.json", "missing")


def test_config_that_is_not_json(model: Path) -> None:
    (model / "config.json").write_text("{")
    check_error(exl("run", str(model), "-p", "x"), ExitCode.DAMAGED_MODEL, "config.json", "not valid JSON")


def test_no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    check_error(exl("run", str(model), "-p", "x"), ExitCode.DAMAGED_MODEL, "tokenizer.json")


def test_a_sentencepiece_tokenizer_alone(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    check_error(exl("run", str(model), "-p", "x"), ExitCode.UNSUPPORTED_MODEL, "tokenizer.model", "tokenizer.json")


def test_truncated_weights(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1_000_000)
    result = exl("run", str(model), "-p", "x")
    check_error(result, ExitCode.DAMAGED_MODEL, "model.safetensors", "truncated", "1,000,000")


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{not json at all"])
def test_weights_that_are_not_safetensors(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    check_error(exl("run", str(model), "-p", "x"), ExitCode.DAMAGED_MODEL, "model.safetensors")


def test_a_missing_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    check_error(exl("run", str(model), "-p", "x"), ExitCode.DAMAGED_MODEL, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "exl3"}, "EXL3"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
    ],
)
def test_other_formats_are_refused_by_name(model: Path, quantization: dict[str, object], words: str) -> None:
    edit_config(model, quantization_config=quantization)
    check_error(exl("run", str(model), "-p", "x"), ExitCode.UNSUPPORTED_MODEL, words)


@pytest.mark.parametrize(("name", "word"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "pickle")])
def test_folders_of_another_kind(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    check_error(exl("run", str(tmp_path), "-p", "x"), ExitCode.UNSUPPORTED_MODEL, word)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_the_gpu_engine_without_a_gpu() -> None:
    check_error(exl("run", "-p", "x", "--engine", "exllamav2"), ExitCode.ENGINE, "exllamav2", "--engine cpu")


def test_debug_shows_the_traceback() -> None:
    result = exl("--debug", "run", "fabel-7m", "-p", "x")
    assert "Traceback" in result.stderr
    assert "ModelNotFoundError" in result.stderr


def test_a_model_is_found_in_the_models_folder_by_both_names(model: Path) -> None:
    shutil.move(model, model.parent / "owner_name@4.0bpw")
    for name in ("owner/name:4.0bpw", "owner_name@4.0bpw"):
        result = exl("run", name, "-p", "x", "--show-prompt", "--models-dir", str(model.parent))
        assert result.returncode == 0, result.stderr
    environment = os.environ | {"EXL_MODELS_DIR": str(model.parent)}
    assert exl("run", "owner/name:4.0bpw", "-p", "x", "--show-prompt", env=environment).returncode == 0
