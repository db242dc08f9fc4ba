"""Downloads with files already present: complete, partial, damaged."""

from __future__ import annotations

import json

import pytest
from fakehub import FakeHub
from hubtools import WEIGHTS, Fetcher, begin, config, contents, model_files

from exl_cli import loader
from exl_cli.errors import DiskError, DownloadError, ModelNotFoundError, spell
from exl_cli.models import folders
from exl_cli.models.hub import store
from exl_cli.models.hub.download import prepare
from exl_cli.models.hub.files import Choice


def test_complete_files_are_not_requested_again(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("acme/tiny", {**model_files(), "training.py": b"print()"})
    fetch("acme/tiny")
    hub.seen.clear()
    for choice, names in (
        (Choice(), set(model_files())),
        (Choice(exclude=("*.md",)), {"config.json", "tokenizer.json", WEIGHTS}),
        (Choice(include=("*.json",)), {"config.json", "tokenizer.json"}),
    ):
        outcome = fetch("acme/tiny", choice=choice)
        assert {file.name for file in outcome.files} == names
        assert outcome.fetched_bytes == 0
    assert hub.seen == []

    (fetch.models / "acme_tiny" / "tokenizer.json").unlink()
    fetch("acme/tiny", choice=Choice(include=("config.json",)))
    assert hub.seen == [], "of what is not chosen nothing matters"
    assert fetch("acme/tiny", choice=Choice(include=("*.json",))).fetched_bytes > 0
    fetch("acme/tiny", choice=Choice(include=("*.py",)))
    assert hub.sent("*/training.py") == 7


@pytest.mark.parametrize("verify", [False, True])
def test_a_wider_choice_later_fetches_only_the_rest(hub: FakeHub, fetch: Fetcher, verify: bool) -> None:
    fetch("acme/tiny", choice=Choice(("*.json",)))
    hub.seen.clear()
    fetch("acme/tiny", verify=verify)
    assert contents(fetch.models / "acme_tiny") == model_files()
    assert hub.sent("*tokenizer.json") == 0
    assert fetch("acme/tiny").fetched_bytes == 0


def test_an_older_marker_is_completed(hub: FakeHub, fetch: Fetcher) -> None:
    """The first markers did not name the files that were left on the Hub, and could name themselves among the rest."""
    fetch("acme/tiny")
    marker = fetch.models / "acme_tiny" / ".exl.json"
    older = json.loads(marker.read_text())
    del older["others"]
    older["files"][".exl.json"] = {"size": 2, "blob_id": "", "sha256": ""}
    marker.write_text(json.dumps(older))
    assert loader.resolve("acme/tiny", fetch.models)
    for requests in (2, 0):
        hub.seen.clear()
        assert fetch("acme/tiny").fetched_bytes == 0
        assert len(hub.seen) == requests


def test_a_file_named_like_the_marker_is_left_where_it_is(hub: FakeHub, fetch: Fetcher) -> None:
    theirs = {".exl.json": b"{}", ".EXL.json": b"[]", ".exl-download/x.json": b"{}"}
    hub.repository("acme/tiny", {**model_files(), **theirs})
    for choice in (Choice(), Choice(include=("*",))):
        fetch("acme/tiny", choice=choice)
        assert contents(fetch.models / "acme_tiny") == model_files()
        hub.seen.clear()
        assert fetch("acme/tiny", choice=choice).fetched_bytes == 0
        assert hub.seen == []


def test_a_branch_that_moved_is_followed_with_force_only(hub: FakeHub, fetch: Fetcher) -> None:
    repository = hub.repository("acme/tiny", {**model_files(seed=1), "old.json": b"{}"})
    fetch("acme/tiny")
    second = repository.commit(model_files(seed=2))

    assert fetch("acme/tiny").commit != second
    outcome = fetch("acme/tiny", force=True)

    assert outcome.commit == second
    assert contents(fetch.models / "acme_tiny") == model_files(seed=2)


def test_a_missing_or_cut_file_is_fetched_again_from_the_same_commit(hub: FakeHub, fetch: Fetcher) -> None:
    repository = hub.repository("acme/tiny", model_files(seed=1))
    fetch("acme/tiny")
    repository.commit(model_files(seed=2))
    folder = fetch.models / "acme_tiny"
    (folder / "tokenizer.json").unlink()
    (folder / WEIGHTS).write_bytes(b"cut")
    hub.seen.clear()

    outcome = fetch("acme/tiny")

    assert contents(folder) == model_files(seed=1)
    assert outcome.fetched_bytes == len(model_files()[WEIGHTS]) + len(model_files()["tokenizer.json"])
    assert f"{folder / WEIGHTS} has changed since it was downloaded; downloading it again" in fetch.notes


def test_verify_finds_and_mends_a_changed_byte_and_is_silent_otherwise(hub: FakeHub, fetch: Fetcher) -> None:
    fetch("acme/tiny")
    folder = fetch.models / "acme_tiny"
    hub.seen.clear()
    assert fetch("acme/tiny", verify=True).fetched_bytes == 0
    assert hub.seen == []
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)

    assert fetch("acme/tiny").fetched_bytes == 0, "sizes alone do not tell"
    outcome = fetch("acme/tiny", verify=True)

    assert outcome.fetched_bytes == len(weights)
    assert contents(folder) == model_files()


def test_a_folder_put_there_by_hand_is_used_and_never_overwritten_unasked(hub: FakeHub, fetch: Fetcher) -> None:
    files = model_files()
    folder = fetch.models / "acme_tiny"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes(config(my="own"))

    assert fetch("acme/tiny").commit == ""
    assert hub.seen == []
    with pytest.raises(DownloadError, match=r"was not downloaded by exl, and its config.json differs") as caught:
        fetch("acme/tiny", verify=True)
    assert spell(caught.value.hint) == "replace them with force"
    assert (folder / "config.json").read_bytes() == config(my="own")
    fetch("acme/tiny", force=True)
    assert contents(folder) == files


def test_files_that_another_program_left_are_adopted(hub: FakeHub, fetch: Fetcher) -> None:
    files = model_files()
    folder = fetch.models / "acme_tiny"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(files[WEIGHTS])

    outcome = fetch("acme/tiny")

    assert hub.sent("/cdn/*") == 0
    assert contents(folder) == files
    assert outcome.fetched_bytes == sum(map(len, files.values())) - len(files[WEIGHTS])


def test_repositories_with_the_same_folder_name_are_distinguished(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("a_b/c", model_files())
    hub.repository("a/b_c", model_files(seed=2))
    fetch("a_b/c")

    with pytest.raises(DownloadError, match=r"contains a_b/c, not a/b_c"):
        fetch("a/b_c")
    with pytest.raises(ModelNotFoundError):
        loader.resolve("a/b_c", fetch.models)


def test_a_plan_lists_local_files_and_writes_nothing(hub: FakeHub, fetch: Fetcher) -> None:
    plan = prepare(fetch.hub(), fetch.wanted("acme/tiny"))
    assert plan.remaining == plan.total == sum(map(len, model_files().values()))
    assert not fetch.models.exists()

    file = next(item.file for item in plan.items if item.file.name == WEIGHTS)
    begin(plan.wanted.folder, "acme/tiny", plan.total)
    store.part(plan.wanted.folder, file).write_bytes(b"x" * 1000)
    again = prepare(fetch.hub(), fetch.wanted("acme/tiny"))
    assert again.remaining == plan.total - 1000
    assert {item.file.name: item.state for item in again.items}[WEIGHTS] == "partial"


def test_a_partial_download_is_never_used_as_a_model(hub: FakeHub, fetch: Fetcher) -> None:
    fetch("acme/tiny")
    folder = fetch.models / "acme_tiny"
    # As a kill leaves it between the first and the last file that move to their places.
    begin(folder, "acme/tiny", 1)
    (folder / ".exl.json").unlink()

    for name in ("acme/tiny", "acme_tiny", str(folder)):
        with pytest.raises(ModelNotFoundError, match="only partly downloaded") as caught:
            loader.resolve(name, fetch.models)
        assert "exl download acme/tiny" in caught.value.hint
    assert folders.known_models(fetch.models) == [folders.BUILTIN]
    hub.seen.clear()
    assert fetch("acme/tiny").fetched_bytes == 0, "what moved already is recognised by its hash"
    assert hub.sent("/cdn/*") == 0
    assert loader.resolve("acme/tiny", fetch.models).path == folder


def test_a_failure_while_files_move_to_their_places_leaves_no_model(hub: FakeHub, fetch: Fetcher) -> None:
    folder = fetch.models / "acme_tiny"
    (folder / WEIGHTS / "in the way").mkdir(parents=True)
    with pytest.raises(DiskError, match="Is a directory"):
        fetch("acme/tiny", force=True)
    assert not (folder / "config.json").exists(), "the file that makes a folder a model moves last"
    with pytest.raises(ModelNotFoundError, match="only partly downloaded"):
        loader.resolve("acme/tiny", fetch.models)
    (folder / WEIGHTS / "in the way").rmdir()
    (folder / WEIGHTS).rmdir()
    hub.seen.clear()
    fetch("acme/tiny")
    assert contents(folder) == model_files()
    assert hub.sent("/cdn/*") == 0
