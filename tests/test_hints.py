"""Error messages about a model's files name the problem and a next step that helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tinymodels import Variant, write
from typer.testing import CliRunner, Result

from exl_cli.cli.app import app
from exl_cli.errors import ExitCode

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 14000000\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def exl(*arguments: str) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def folder(gptq_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(gptq_dir, tmp_path / "model")


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["*.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    next(folder.glob(name)).write_text(POINTER)  # as the specification of Git LFS gives it
    run = exl("run", str(folder), "-p", "x", "--engine", "cpu")
    assert run.exit_code == ExitCode.DAMAGED_MODEL
    assert "is a Git LFS pointer, not the file itself; run git lfs pull" in run.stderr


def test_a_config_without_an_architecture_says_what_to_add(folder: Path) -> None:
    change(folder / "config.json", lambda config: config.pop("architectures"))
    assert (
        'add the name of its transformers class, e.g. "architectures": ["LlamaForCausalLM"]'
        in exl("show", str(folder)).stderr
    )


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_rope_type_is_named(folder: Path, key: str) -> None:
    rope = {"rope_type": "spiral", "factor": 2.0, "rope_theta": 10000.0}
    change(folder / "config.json", lambda config: (config.pop("rope_parameters", None), config.update({key: rope})))
    assert "unknown RoPE type 'spiral'" in " ".join(exl("show", str(folder)).stdout.split())
    run = exl("run", str(folder), "-p", "x", "--engine", "cpu")
    assert run.exit_code == ExitCode.DAMAGED_MODEL
    assert "names the RoPE type 'spiral', which transformers does not know; update transformers" in run.stderr


def test_an_untied_model_without_a_head_is_not_to_be_downloaded_again(gptq_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gptq_dir, tmp_path / "tied", ignore=shutil.ignore_patterns("*.safetensors"))
    write(folder, Variant("float", tied=True))
    change(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    run = exl("run", str(folder), "-p", "x", "--raw", "--engine", "cpu")
    assert run.exit_code == ExitCode.DAMAGED_MODEL
    assert "no weights for lm_head.weight" in run.stderr
    assert 'set "tie_word_embeddings": true in config.json' in run.stderr


def test_values_of_a_generation_config_that_are_left_out_are_named(folder: Path) -> None:
    values = {"temperature": "hot", "top_p": 7, "top_k": 40, "eos_token_id": "2", "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(values))
    run = exl("run", str(folder), "-p", "x", "-n", "1", "--engine", "cpu")
    assert run.exit_code == 0
    named = [line.split()[2] for line in run.stderr.splitlines() if line.startswith("generation_config.json: ")]
    assert sorted(named) == ["eos_token_id", "temperature", "top_p"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }", "the model's chat template is broken: unexpected '}'"),
        ("{{ messages.nothing.at_all }}", "the model's chat template failed:"),
        ("{{ raise_exception('only tools') }}", ""),
        ("{{ messages[0].content }}", ""),
    ],
)
def test_show_says_when_no_conversation_can_be_rendered(folder: Path, template: str, said: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    run = exl("show", str(folder))
    assert run.exit_code == 0
    assert (said in run.stderr) if said else run.stderr == ""


def test_a_model_in_the_hub_cache_runs_by_name(gptq_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as huggingface_hub does, which finds it there too."""
    from huggingface_hub import try_to_load_from_cache

    repository = tmp_path / "home" / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(gptq_dir, repository / "snapshots" / COMMIT)
    there = try_to_load_from_cache("owner/name", "config.json", cache_dir=tmp_path / "home" / "hub")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("EXL_MODELS_DIR", str(tmp_path / "models"))
    for name in ("owner/name", f"owner/name:{COMMIT}"):
        shown = json.loads(exl("show", name, "--json").stdout)
        assert (shown["name"], shown["path"]) == (name, str(Path(str(there)).parent))
    assert exl("show", "owner/name:other").exit_code == ExitCode.MODEL_NOT_FOUND
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert exl("show", "owner/name").exit_code == ExitCode.MODEL_NOT_FOUND
