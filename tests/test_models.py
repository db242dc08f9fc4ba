"""`exl list`, `exl show`, `exl rm`, and completion of model names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from fakehub import FakeHub
from helpers import nvidia_gpus
from hubtools import Fetcher, begin, config
from typer.testing import CliRunner, Result

from exl_cli import loader
from exl_cli.cli.app import app
from exl_cli.errors import DiskError, ModelNotFoundError, UsageError
from exl_cli.models import folders, memory
from exl_cli.models.hub import names, store


@pytest.fixture(scope="module")
def stock(gptq_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with two downloads, a folder put there by hand, half a download and a damaged model."""
    models = tmp_path_factory.mktemp("stock")
    files = {path.name: path.read_bytes() for path in gptq_dir.iterdir()}
    with FakeHub() as hub:
        repository = hub.repository("acme/fable", files, card={"license": "apache-2.0"})
        repository.commit({**files, "README.md": b"# other"}, "b/2")
        fetch = Fetcher(hub, models)
        fetch("acme/fable")
        fetch("acme/fable:b/2")
    shutil.copytree(gptq_dir, models / "mine")
    begin(models / "acme_half@4.0bpw", "acme/half", 2_000_000, "4.0bpw")
    (models / "acme_half@4.0bpw" / store.STAGING / "x.part").write_bytes(b"x" * 500_000)
    (models / "broken").mkdir()
    (models / "broken" / "config.json").write_bytes(config())
    (models / "notes.txt").write_text("not a model")
    return models


@pytest.fixture
def models(stock: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(stock, tmp_path / "models")


def command(models: Path, *args: str) -> Result:
    return CliRunner().invoke(app, [*args, "--models-dir", str(models)], env={"COLUMNS": "200"})


def test_list_shows_local_models_and_their_state(stock: Path) -> None:
    models, result = stock, command(stock, "list", "--json")
    listed = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert list(listed) == ["fable-7m", "acme/fable", "acme/fable:b/2", "acme/half:4.0bpw", "broken", "mine"]
    fable = listed["acme/fable"]
    assert (fable["format_name"], fable["parameters"], fable["context_length"]) == ("GPTQ 4-bit g128", 7_344_384, 1024)
    assert fable["path"] == str(models / "acme_fable")
    assert (fable["repository"], fable["revision"], len(fable["commit"])) == ("acme/fable", "main", 40)
    assert listed["acme/fable:b/2"]["revision"] == "b/2"
    assert (listed["mine"]["repository"], listed["mine"]["complete"]) == (None, True)
    assert (listed["acme/half:4.0bpw"]["complete"], listed["acme/half:4.0bpw"]["disk_bytes"] > 500_000) == (False, True)
    assert "no .safetensors file" in listed["broken"]["problem"]

    table = command(stock, "list").stdout
    rows = {line.split()[0]: line for line in table.splitlines() if line.strip()}
    assert rows["fable-7m"].split()[1:4] == ["EXL2", "5.0", "bpw"]
    assert "7.34M" in rows["acme/fable"]
    assert rows["acme/fable"].rstrip().endswith(str(models / "acme_fable"))
    assert "500 kB of 2 MB" in rows["acme/half:4.0bpw"]


def test_list_shows_the_path_of_a_broken_folder_once(tmp_path: Path, gptq_dir: Path) -> None:
    shutil.copytree(gptq_dir, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    table = command(tmp_path, "list").stdout
    assert " model.safetensors is truncated" in table
    assert table.count(str(tmp_path)) == 1


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


BAD_FOLDERS = {
    "config-pipe": (lambda path: _fifo(path / "config.json"), "config.json is not a regular file"),
    "weights-pipe": (lambda path: _fifo(path / "model.safetensors"), "model.safetensors is not a regular file"),
    "config-device": (lambda path: _relink(path / "config.json", Path("/dev/zero")), "config.json is not a regular"),
    "deep": (lambda path: (path / "config.json").write_text("[" * 5000), "config.json is nested too deeply"),
    "deep-header": (lambda path: _write_header(path, "[" * 5000), "has an unreadable header"),
    "endless": (lambda path: _write_header(path, ENDLESS), "has an invalid entry for tensor 'x'"),
    "deep-marker": (lambda path: (path / store.MARKER).write_text("[" * 100_000), "only partly downloaded"),
    "config-gone": (lambda path: _relink(path / "config.json", Path("../gone.json")), "points to ../gone.json, which"),
}
ENDLESS = '{"x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 1e400]}}'


def _relink(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _write_header(path: Path, header: str) -> None:
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())


def test_list_shows_each_bad_folder_with_its_problem_and_all_the_others(tmp_path: Path, gptq_dir: Path) -> None:
    for name, (spoil, _) in BAD_FOLDERS.items():
        shutil.copytree(gptq_dir, tmp_path / name)
        spoil(tmp_path / name)
    (tmp_path / "link-gone").symlink_to("/nowhere/model")
    (tmp_path / "whole").symlink_to(gptq_dir)

    result = command(tmp_path, "list", "--json")

    assert result.exit_code == 0, result.output
    listed = {entry["name"]: entry["problem"] for entry in json.loads(result.stdout)}
    wanted = {name: problem for name, (_, problem) in BAD_FOLDERS.items()}
    assert list(listed) == ["fable-7m", *sorted([*wanted, "link-gone", "whole"])]
    assert (listed["fable-7m"], listed["whole"]) == (None, None)
    assert listed["link-gone"] == f"{tmp_path / 'link-gone'} points to /nowhere/model, which does not exist"
    for name, problem in wanted.items():
        assert problem in listed[name]


@pytest.fixture
def with_a_private_one(tmp_path: Path, gptq_dir: Path) -> Iterator[Path]:
    """A folder with two models, of which one, "private", may not be looked into."""
    if os.geteuid() == 0:
        pytest.skip("root may look into everything")
    for name in ("private", "whole"):
        shutil.copytree(gptq_dir, tmp_path / name)
    (tmp_path / "private").chmod(0)
    yield tmp_path
    tmp_path.chmod(0o700)
    (tmp_path / "private").chmod(0o700)


def test_list_shows_a_folder_that_may_not_be_looked_into(with_a_private_one: Path) -> None:
    folder = with_a_private_one
    result = command(folder, "list", "--json")
    folder.chmod(0)
    refused = command(folder, "list")
    listed = {entry["name"]: entry["problem"] for entry in json.loads(result.stdout)}
    assert listed == {"fable-7m": None, "private": "unreadable: Permission denied", "whole": None}
    assert (refused.exit_code, refused.stdout) == (10, "")
    assert f"cannot read {folder}: Permission denied" in refused.stderr


def test_a_folder_that_may_not_be_looked_into_is_an_error_of_its_own_model_only(with_a_private_one: Path) -> None:
    folder = with_a_private_one
    refused = command(folder, "show", "private")
    near = command(folder, "show", "whoel")
    folder.chmod(0)
    hidden = command(folder, "show", "whole")
    assert (refused.exit_code, near.exit_code, hidden.exit_code) == (5, 3, 10)
    assert f"cannot read {folder / 'private'}: Permission denied" in refused.stderr
    assert "did you mean whole?" in near.stderr
    assert f"cannot read {folder}: Permission denied" in hidden.stderr


@pytest.mark.parametrize("name", ["weights-pipe", "config-device", "config-gone"])
def test_rm_removes_what_list_shows_as_broken(tmp_path: Path, gptq_dir: Path, name: str) -> None:
    shutil.copytree(gptq_dir, tmp_path / name)
    BAD_FOLDERS[name][0](tmp_path / name)
    result = command(tmp_path, "rm", name, "--yes")
    assert (result.exit_code, (tmp_path / name).exists()) == (0, False)


def test_links_count_with_the_size_of_their_targets(tmp_path: Path, gptq_dir: Path) -> None:
    # The layout of the Hub's own cache.
    blobs, linked = tmp_path / "blobs", tmp_path / "models" / "linked"
    shutil.copytree(gptq_dir, blobs)
    linked.mkdir(parents=True)
    for file in blobs.iterdir():
        (linked / file.name).symlink_to(file)
    (linked / "copy.safetensors").symlink_to("model.safetensors")  # counts once
    total = sum(file.stat().st_size for file in blobs.iterdir())

    listed = command(linked.parent, "list", "--json")
    assert {entry["name"]: entry["disk_bytes"] for entry in json.loads(listed.stdout)}["linked"] == total
    (linked / "copy.safetensors").unlink()
    assert json.loads(command(linked.parent, "show", "linked", "--json").stdout)["disk_bytes"] == total
    # What is freed is the links alone.
    removed = command(linked.parent, "rm", "linked", "--yes")
    assert re.search(r"\((\d+) B\)", removed.stderr)


@pytest.mark.parametrize("args", [("list",), ("show",), ("show", "mine")])
def test_lines_in_a_pipe_have_no_trailing_blanks(tmp_path: Path, gptq_dir: Path, args: tuple[str, ...]) -> None:
    shutil.copytree(gptq_dir, tmp_path / "mine")
    (tmp_path / "mine" / "chat_template.jinja").write_text("{# a #}\n\n{{ messages }}\n")
    result = command(tmp_path, *args)
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if line != line.rstrip()] == []


def test_a_licence_that_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    (tmp_path / "LICENSE").symlink_to("/dev/zero")
    assert folders.licence(tmp_path, None) == ""


def test_show_tells_everything_known(stock: Path) -> None:
    models, shown = stock, json.loads(command(stock, "show", "acme/fable", "--json").stdout)
    assert (shown["licence"], shown["group_size"], shown["desc_act"]) == ("apache-2.0", 128, False)
    assert shown["chat_template"] == (models / "acme_fable" / "chat_template.jinja").read_text()
    estimated = memory.estimate(loader.resolve("acme/fable", models), 1024, "q4")
    assert estimated is not None
    assert shown["vram_bytes"]["1024"]["q4"] == estimated.total
    assert shown["config"]["num_hidden_layers"] == 8

    text = command(stock, "show", "acme/fable").stdout
    for part in ("GPTQ 4-bit g128", "7,344,384", "1,024 tokens", "apache-2.0", "<|im_start|>", "q4 cache", "8 layers"):
        assert part in text
    assert command(stock, "show", "acme/half:4.0bpw").exit_code == 3
    assert "EXL2 5.0 bpw, 6-bit head" in command(stock, "show").stdout


def test_show_tells_what_each_gpu_would_hold(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = memory.estimate(loader.resolve("acme/fable", stock), 1024)
    assert needed is not None
    total = needed.total - 1  # one byte too few for a single GPU
    nvidia_gpus(monkeypatch, [total] * 2)
    first, second = json.loads(command(stock, "show", "acme/fable", "--json").stdout)["gpu_split"]
    assert (first["gpu"], second["gpu"]) == (0, 1)
    assert (first["layers"][0], first["layers"][1] + 1, second["layers"][1]) == (0, second["layers"][0], 7)
    assert first["weights_bytes"] + second["weights_bytes"] == needed.weights
    assert max(first["vram_bytes"], second["vram_bytes"]) <= total
    text = command(stock, "show", "acme/fable").stdout
    assert re.search(r"VRAM at 1,024 tokens, fp16 cache", text)
    assert re.search(rf"1 Card 1 .* {second['layers'][0]} to 7 .* GiB of {total / 2**30:.1f} GiB", text)


def test_the_licence_is_found_wherever_it_is_stated(tmp_path: Path) -> None:
    assert folders.licence(tmp_path, None) == ""
    (tmp_path / "LICENSE").write_text("\n   MIT License\n")
    assert folders.licence(tmp_path, None) == "MIT License"
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: 'llama3'\n---\nlicense: no\n")
    assert folders.licence(tmp_path, None) == "llama3"
    assert folders.licence(tmp_path, store.Marker(names.Repository("a", "b"), "c", {}, "gemma")) == "gemma"


def test_rm_removes_only_the_named_model(models: Path) -> None:
    here = {path.name for path in models.iterdir()} | {".exl-locks"}
    for name, folder in (
        ("acme/fable", "acme_fable"),
        ("acme/fable:b/2", "acme_fable@b_2"),
        ("mine", "mine"),
        ("acme/half:4.0bpw", "acme_half@4.0bpw"),
        ("broken", "broken"),
    ):
        result = command(models, "rm", name, "--yes")
        assert result.exit_code == 0
        assert result.stderr.startswith(f"removed {models / folder} (")
        here -= {folder}
        assert {path.name for path in models.iterdir()} == here


def test_rm_of_a_path_means_a_folder_directly_in_the_models_folder(models: Path) -> None:
    assert folders.find_to_remove(str(models / "mine"), models) == models / "mine"
    for name in (
        str(models.parent),
        str(models),
        str(models / "mine" / ".."),
        "..",
        ".",
        "../models/mine/x",
        "/",
        "a/b/c",
    ):
        with pytest.raises((UsageError, ModelNotFoundError)):
            folders.find_to_remove(name, models)


def test_rm_of_a_model_elsewhere_is_refused_however_it_is_named(models: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(models / "mine", elsewhere / "m")
    (models / "link").symlink_to(elsewhere)
    for name in (
        elsewhere / "m",
        models / ".." / "elsewhere" / "m",
        models / "link" / "m",
        models / "mine" / ".." / "..",
    ):
        with pytest.raises(UsageError, match="is not directly in"):
            folders.find_to_remove(str(name), models)


def test_rm_refuses_folders_that_are_not_models(models: Path, tmp_path: Path) -> None:
    (models / "photos").mkdir()
    (models / "photos" / "cat.jpg").write_bytes(b"cat")
    for name in ("photos", "notes.txt", "nothing", "fable-7m", "acme/unknown"):
        with pytest.raises((UsageError, ModelNotFoundError)):
            folders.find_to_remove(name, models)
    assert (models / "photos" / "cat.jpg").exists()


def test_rm_of_a_link_removes_the_link_alone(models: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(models / "mine", outside / "deep")
    (models / "linked").symlink_to(outside)
    (models / "mine" / "inner").symlink_to(outside)

    folders.remove(folders.find_to_remove("linked", models))
    folders.remove(folders.find_to_remove("mine", models))

    assert not os.path.lexists(models / "linked")
    assert not (models / "mine").exists()
    assert (outside / "deep" / "config.json").exists()


def test_rm_waits_for_no_download(models: Path) -> None:
    with store.lock(models / "mine", None), pytest.raises(DiskError, match="another exl process is using"):
        folders.remove(models / "mine")
    assert (models / "mine" / "config.json").exists()


def test_rm_asks_and_an_empty_answer_is_no(models: Path) -> None:
    piped = command(models, "rm", "mine")
    asks = "error: cannot ask for confirmation without a terminal; add --yes\n"
    assert (piped.exit_code, piped.stderr) == (2, asks)
    thrice = "from exl_cli.cli.app import app\nfor _ in range(3): app(['rm', 'mine'], standalone_mode=False)"
    env = {**os.environ, "EXL_MODELS_DIR": str(models), "TERM": "xterm"}
    with pexpect.spawn(
        sys.executable, ["-c", thrice], env=env, timeout=60, encoding="utf-8", dimensions=(24, 200)
    ) as terminal:
        for answer, said in (("", "nothing removed"), ("n", "nothing removed"), ("y", "removed")):
            terminal.expect_exact("[y/N] ")
            assert (models / "mine").exists()
            terminal.sendline(answer)
            terminal.expect_exact(said)
        terminal.expect(pexpect.EOF)
    assert not (models / "mine").exists()


def test_the_shell_completes_names_of_models_that_can_be_run(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXL_MODELS_DIR", str(stock))
    asked = {"_EXL_COMPLETE": "complete_bash", "COMP_WORDS": "exl run acme/f", "COMP_CWORD": "2"}
    script = "import sys; sys.argv[0] = 'exl'; from exl_cli.cli.app import app; app(prog_name='exl')"
    env = {**os.environ, **asked}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.stdout.split() == ["acme/fable", "acme/fable:b/2"]
    for text, expected in {"acme_": ["acme_fable@b_2"], "f": ["fable-7m"], "m": ["mine"], "acme/half": []}.items():
        assert folders.complete_model(text) == expected
