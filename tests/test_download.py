"""Successful downloads: which files, and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakehub import FakeHub
from hubtools import Fetcher, config, contents, download_command, model_files, safetensors

from exl_cli import loader
from exl_cli.errors import DownloadError, UnsupportedModelError, UsageError
from exl_cli.models import folders
from exl_cli.models.hub import names
from exl_cli.models.hub.files import Choice


def test_a_model_arrives_byte_for_byte_and_can_be_resolved(hub: FakeHub, fetch: Fetcher) -> None:
    files = model_files()
    commit = hub.repository("acme/tiny", files, card={"license": "apache-2.0"}).branches["main"]

    outcome = fetch("acme/tiny")

    folder = fetch.models / "acme_tiny"
    assert contents(folder) == files
    assert (outcome.commit, outcome.fetched_bytes) == (commit, sum(map(len, files.values())))
    assert fetch.bytes == {name: len(content) for name, content in files.items()}
    assert loader.resolve("acme/tiny", fetch.models).path == folder
    marker = json.loads((folder / ".exl.json").read_text())
    assert (marker["repository"], marker["commit"], marker["license"]) == ("acme/tiny", commit, "apache-2.0")
    assert {name: entry["size"] for name, entry in marker["files"].items()} == {n: len(c) for n, c in files.items()}


def test_only_what_inference_needs_is_fetched(hub: FakeHub, fetch: Fetcher) -> None:
    wanted = {
        **model_files(),
        "model.safetensors.index.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/tools.jinja": b"{{ tools }}",
        "tokenizer.model": b"sp",
        "merges.txt": b"a b",
        "LICENSE.txt": b"Apache",
        "USE_POLICY.md": b"be good",
    }
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": safetensors(1000, 9),
        "onnx/model.safetensors": safetensors(1000, 8),
        "checkpoint-500/config.json": b"{}",
        "model-q4.gguf": b"GGUF",
        "training.py": b"print()",
        "figure.png": b"png",
        ".gitattributes": b"*.bin lfs",
    }
    hub.repository("acme/mixed", {**wanted, **unwanted})

    fetch("acme/mixed")

    assert contents(fetch.models / "acme_mixed") == wanted


def test_weights_that_only_mistral_names_are_fetched(hub: FakeHub, fetch: Fetcher) -> None:
    files = {"config.json": config(), "consolidated.safetensors": safetensors(1000)}
    hub.repository("acme/mistral", files)
    fetch("acme/mistral")
    assert contents(fetch.models / "acme_mistral") == files


def test_include_and_exclude_choose_but_never_a_pickle(hub: FakeHub, fetch: Fetcher) -> None:
    files = {**model_files(), "extra/notes.md": b"notes", "pytorch_model.bin": b"pickle", "old.PT": b"pickle"}
    hub.repository("acme/tiny", files)

    fetch("acme/tiny", choice=Choice(("*.md", "*.bin", "*.PT"), ("READ*",)))

    assert contents(fetch.models / "acme_tiny") == {"extra/notes.md": b"notes"}
    assert [note for note in fetch.notes if "pickle" in note] == [
        "skipping old.PT, pytorch_model.bin: pickles can run code when opened"
    ]


def test_two_quantizations_live_side_by_side(hub: FakeHub, fetch: Fetcher) -> None:
    repository = hub.repository("acme/exl2", model_files(seed=1))
    repository.commit(model_files(seed=2), "4.0bpw")
    repository.commit(model_files(seed=3), "wip/b")

    fetch("acme/exl2")
    fetch("acme/exl2:4.0bpw")
    fetch("acme/exl2:wip/b")

    for seed, folder in ((1, "acme_exl2"), (2, "acme_exl2@4.0bpw"), (3, "acme_exl2@wip_b")):
        assert contents(fetch.models / folder) == model_files(seed=seed)
    assert loader.resolve("acme/exl2:4.0bpw", fetch.models).path.name == "acme_exl2@4.0bpw"
    assert folders.known_models(fetch.models)[1:] == ["acme_exl2", "acme_exl2@4.0bpw", "acme_exl2@wip_b"]


@pytest.mark.parametrize(
    ("files", "error", "what"),
    [
        ({"config.json": config(), "pytorch_model.bin": b"x"}, UnsupportedModelError, "only pickled weights"),
        ({"config.json": config(), "model.gguf": b"x"}, UnsupportedModelError, "GGUF"),
        ({"README.md": b"see the branches", "measurement.json": b"{}"}, DownloadError, "has no weights"),
        (
            {**model_files(), "config.json": config(quantization_config={"quant_method": "awq"})},
            UnsupportedModelError,
            "AWQ",
        ),
        (
            {**model_files(), "quantize_config.json": b'{"bits": 3, "group_size": 128}'},
            UnsupportedModelError,
            "is 3-bit GPTQ",
        ),
    ],
)
def test_what_exl_cannot_run_is_refused_before_anything_large_is_fetched(
    hub: FakeHub, fetch: Fetcher, files: dict[str, bytes], error: type[Exception], what: str
) -> None:
    hub.repository("acme/other", files)
    with pytest.raises(error, match=what):
        fetch("acme/other")
    assert hub.requests("/cdn/*") == []
    assert not (fetch.models / "acme_other").exists()


@pytest.mark.parametrize(
    ("text", "revision", "expected"),
    [
        ("acme/tiny", None, ("acme/tiny", "main", "acme_tiny")),
        ("acme/tiny:4.0bpw", None, ("acme/tiny", "4.0bpw", "acme_tiny@4.0bpw")),
        ("acme/tiny", "refs/pr/3", ("acme/tiny", "refs/pr/3", "acme_tiny@refs_pr_3")),
        ("https://huggingface.co/acme/tiny", None, ("acme/tiny", "main", "acme_tiny")),
        ("https://huggingface.co/acme/tiny/tree/4.0bpw", None, ("acme/tiny", "4.0bpw", "acme_tiny@4.0bpw")),
    ],
)
def test_repositories_are_named_as_people_write_them(
    text: str, revision: str | None, expected: tuple[str, str, str]
) -> None:
    repository = names.require(text, revision)
    assert (repository.id, repository.revision, repository.folder) == expected


@pytest.mark.parametrize("text", ["tiny", "a/b/c", "../tiny", "a/..", "a/b:", "/a", "a b/c", "", "a/b--c", "a/b.git"])
def test_what_names_no_repository_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        names.require(text)


@pytest.mark.parametrize(
    ("text", "revision", "message"),
    [
        ("acme/tiny:a", "b", "names revision a, but revision is b"),
        *(("acme/tiny", odd, "is not a revision") for odd in ("../x", "a/../b", "a?b", "a#b", "a b", "-x", "a\n")),
        ("acme/tiny", "x" * 97, "a revision cannot have 97 characters"),
    ],
)
def test_a_revision_that_cannot_be_is_refused(text: str, revision: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        names.require(text, revision)


def test_the_command_prints_the_folder_and_json(hub: FakeHub, tmp_path: Path) -> None:
    files = model_files()
    commit, folder = hub.repository("acme/tiny", files).branches["main"], tmp_path / "acme_tiny"

    plan = json.loads(download_command(hub, tmp_path, "acme/tiny", "--dry-run", "--json").stdout)
    assert (plan["remaining_bytes"], plan["path"]) == (sum(map(len, files.values())), str(folder))
    assert {entry["name"]: entry["state"] for entry in plan["files"]} == dict.fromkeys(files, "missing")
    assert not folder.exists()

    first = download_command(hub, tmp_path, "acme/tiny")
    assert (first.exit_code, first.stdout) == (0, f"{folder}\n")
    lines = first.stderr.splitlines()
    here = f"{plan['total_bytes'] / 1e3:.0f} kB"
    assert lines[0] == f"Downloading acme/tiny (commit {commit[:8]}) to {folder}: 4 files, {here}"
    assert lines[-1].startswith(f"downloaded acme/tiny to {folder}: ")

    hub.seen.clear()
    again = download_command(hub, tmp_path, "acme/tiny", "--json", "--quiet")
    assert (again.exit_code, again.stderr, hub.seen) == (0, "", [])
    told = json.loads(again.stdout)
    assert (told["commit"], told["downloaded_bytes"], told["path"]) == (commit, 0, str(folder))
