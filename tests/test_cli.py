"""The `exl` command: startup, one-line errors, exit codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import exl
from typer.testing import CliRunner, Result

from exl_cli.cli.app import app
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


@pytest.mark.smoke
def test_the_command_itself() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("exl ")
    assert " Usage: exl [OPTIONS] COMMAND" in exl("--help").stdout
    failed = exl("--debug", "run", "fabel-7m", "-p", "x")
    assert failed.returncode == ExitCode.MODEL_NOT_FOUND
    assert "Traceback" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: no model named 'fabel-7m'; did you mean fable-7m?")


@pytest.mark.parametrize("command", ["run", "serve", "rm"])
def test_help_shows_what_an_argument_is_not_its_python_type(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert " MODEL " in text
    assert "str" not in re.findall(r"[\w.]+", text)


def run(*args: str, stdin: bytes = b"", **env: str) -> Result:
    return CliRunner().invoke(app, ["run", *args], input=stdin, env=env)


def check_error(result: Result, code: ExitCode, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout."""
    assert result.stdout == ""
    (line,) = (line for line in result.stderr.splitlines() if line != "Loading model: fable-7m (EXL2 5.0 bpw)")
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert result.exit_code == code


def test_a_prompt_that_does_not_fit() -> None:
    check_error(run("-p", "story " * 3000), ExitCode.PROMPT, "3,0", "1,024")


def test_a_prompt_that_is_not_text() -> None:
    check_error(run(stdin=b"abc\xff\xfe"), ExitCode.PROMPT, "not UTF-8", "byte 3")


@pytest.fixture
def model(gptq_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gptq_dir, tmp_path / "model"))


WEIGHTS, SHARD = "model.safetensors", "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("file", "change", "code", "words"),
    [
        ("config.json", None, ExitCode.DAMAGED_MODEL, ["config.json", "missing"]),
        ("config.json", b"{", ExitCode.DAMAGED_MODEL, ["config.json", "not valid JSON"]),
        ("tokenizer.json", None, ExitCode.DAMAGED_MODEL, ["tokenizer.json"]),
        ("tokenizer.json", "tokenizer.model", ExitCode.UNSUPPORTED_MODEL, ["tokenizer.model", "tokenizer.json"]),
        (WEIGHTS, 1_000_000, ExitCode.DAMAGED_MODEL, [WEIGHTS, "truncated", "1,000,000"]),
        (WEIGHTS, b"", ExitCode.DAMAGED_MODEL, [WEIGHTS]),
        (WEIGHTS, b"abc", ExitCode.DAMAGED_MODEL, [WEIGHTS]),
        (WEIGHTS, b"\xff" * 100, ExitCode.DAMAGED_MODEL, [WEIGHTS]),
        (WEIGHTS, b"\x10\0\0\0\0\0\0\0{not json at all", ExitCode.DAMAGED_MODEL, [WEIGHTS]),
        (WEIGHTS, SHARD, ExitCode.DAMAGED_MODEL, ["model-00002-of-00002.safetensors"]),
    ],
)
def test_files_that_are_not_well(
    model: Path, file: str, change: bytes | str | int | None, code: ExitCode, words: list[str]
) -> None:
    path = model / file
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, str):
        path.rename(model / change)
    elif isinstance(change, int):
        path.write_bytes(path.read_bytes()[:change])
    else:
        path.unlink()
    check_error(run(str(model), "-p", "x"), code, *words)


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
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    check_error(run(str(model), "-p", "x"), ExitCode.UNSUPPORTED_MODEL, words)


@pytest.mark.parametrize(("name", "word"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "pickle")])
def test_folders_of_another_kind(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    check_error(run(str(tmp_path), "-p", "x"), ExitCode.UNSUPPORTED_MODEL, word)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_the_gpu_engine_without_a_gpu() -> None:
    result = run("-p", "x", "--engine", "exllamav2", "-q")
    check_error(result, ExitCode.ENGINE, "exllamav2", "--engine cpu")


def test_a_model_is_found_in_the_models_folder_by_both_names(model: Path) -> None:
    shutil.move(model, model.parent / "owner_name@4.0bpw")
    for name in ("owner/name:4.0bpw", "owner_name@4.0bpw"):
        assert run(name, "-p", "x", "--show-prompt", "--models-dir", str(model.parent)).exit_code == 0
    assert run("owner/name:4.0bpw", "-p", "x", "--show-prompt", EXL_MODELS_DIR=str(model.parent)).exit_code == 0
