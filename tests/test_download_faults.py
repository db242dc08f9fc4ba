"""A Hub that misbehaves in every way that one on loopback can: what is fetched, and the line a user reads."""

from __future__ import annotations

import email.utils
import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
from fakehub import FakeHub
from hubtools import WEIGHTS, Fetcher, begin, contents, model_files

from exl_cli import loader
from exl_cli.errors import DiskError, DownloadError, ExlError, ModelNotFoundError, UsageError
from exl_cli.models.hub import store
from exl_cli.models.hub.files import Choice

SIZE = len(model_files()[WEIGHTS])


@pytest.fixture
def fetch(hub: FakeHub, tmp_path: Path) -> Fetcher:
    hub.repository("acme/tiny", model_files())
    return Fetcher(hub, tmp_path / "models")


def fails(fetch: Fetcher, model: str = "acme/tiny", **options: object) -> ExlError:
    with pytest.raises(ExlError) as caught:
        fetch(model, **options)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def arrived(fetch: Fetcher) -> bool:
    return contents(fetch.models / "acme_tiny") == model_files()


# --- what passes by itself ------------------------------------------------------------------------------------------


def test_a_dropped_connection_goes_on_at_the_very_byte(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=1, drop_at=70_001)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert [seen.range for seen in hub.requests("/cdn/*")] == ["", "bytes=70001-"]
    assert hub.sent("/cdn/*") == SIZE
    assert fetch.watcher.notes == [f"{WEIGHTS}: the connection broke off; trying again in 1 s"]
    assert fetch.waits == [1.0]
    assert fetch.watcher.bytes[WEIGHTS] == SIZE


def test_progress_renews_patience(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=12, drop_at=1000)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.waits == [1.0] * 12


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=1, drop_at=70_000)
    hub.fault("/cdn/*", ignore_range=True)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert hub.sent("/cdn/*") == 70_000 + SIZE
    assert f"{WEIGHTS}: the server cannot go on in the middle: starting anew" in fetch.watcher.notes
    assert fetch.watcher.bytes[WEIGHTS] == SIZE


@pytest.mark.parametrize(
    ("where", "what"), [("/api/models/acme/tiny/*", "acme/tiny"), ("*config.json", "config.json"), ("/cdn/*", WEIGHTS)]
)
def test_a_500_is_tried_again_and_said(hub: FakeHub, fetch: Fetcher, where: str, what: str) -> None:
    hub.fault(where, times=2, status=500)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.waits == [1.0, 2.0]
    assert fetch.watcher.notes == [f"{what}: the Hub failed (500); trying again in {n} s" for n in (1, 2)]


def test_a_500_that_stays_is_given_up(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", status=503)
    error = fails(fetch)
    assert isinstance(error, DownloadError)
    assert error.message == "the Hub fails (503)"
    assert error.hint == "try again later: the same command goes on where it stopped"
    assert fetch.waits == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_429_waits_as_long_as_it_is_told(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=1, status=429, headers={"Retry-After": "7"})
    fetch("acme/tiny")
    assert fetch.waits == [7.0]
    assert fetch.watcher.notes == [f"{WEIGHTS}: the Hub limits requests (429); trying again in 7 s"]


def test_a_retry_after_may_be_a_date(hub: FakeHub, fetch: Fetcher) -> None:
    date = email.utils.formatdate(time.time() + 90, usegmt=True)
    hub.fault("/cdn/*", times=1, status=503, headers={"Retry-After": date})
    fetch("acme/tiny")
    assert len(fetch.waits) == 1
    assert 80 < fetch.waits[0] <= 90


def test_a_429_of_an_hour_is_not_waited_for(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", status=429, headers={"Retry-After": "3600"})
    error = fails(fetch)
    assert error.message == "the Hub limits requests (429)"
    assert "try again in 3600 s" in error.hint
    assert fetch.waits == []


def test_a_slow_trickle_arrives(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", trickle=500)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.waits == []


def test_a_stalled_connection_is_left_and_resumed(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=1, hold_at=50_000)
    fetch("acme/tiny", timeout=0.2)
    assert arrived(fetch)
    assert [seen.range for seen in hub.requests("/cdn/*")] == ["", "bytes=50000-"]
    assert fetch.watcher.notes == [f"{WEIGHTS}: no answer in time; trying again in 1 s"]


def test_a_file_that_arrives_wrong_is_fetched_once_more(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=1, corrupt=True)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.watcher.notes == [f"{WEIGHTS} arrived damaged (wrong hash): fetching it again"]


def test_a_damaged_part_does_not_survive_a_resume(hub: FakeHub, fetch: Fetcher) -> None:
    wanted = fetch.wanted("acme/tiny")
    file = next(file for file in fetch.hub().listing(wanted.repository).files if file.name == WEIGHTS)
    begin(wanted.folder, "acme/tiny", 1)
    store.part(wanted.folder, file).write_bytes(b"\0" * 90_000)
    fetch("acme/tiny")
    assert arrived(fetch)


def test_a_part_longer_than_its_file_is_started_anew(hub: FakeHub, fetch: Fetcher) -> None:
    wanted = fetch.wanted("acme/tiny")
    file = next(file for file in fetch.hub().listing(wanted.repository).files if file.name == WEIGHTS)
    begin(wanted.folder, "acme/tiny", 1)
    store.part(wanted.folder, file).write_bytes(b"\0" * (SIZE + 1))
    fetch("acme/tiny")
    assert arrived(fetch)


def test_hashes_that_the_listing_lacks_come_from_the_files_own_headers(hub: FakeHub, fetch: Fetcher) -> None:
    """X-Linked-Etag has the SHA-256 of a file in LFS, ETag git's id of any other; the fake Hub computes both."""
    for name in model_files():
        hub.repositories["acme/tiny"].claim(name, blobId=None, lfs=None)
    damaged = [hub.fault("*/tokenizer.json", times=2, corrupt=True), hub.fault("/cdn/*", times=1, corrupt=True)]
    fetch("acme/tiny")
    assert arrived(fetch)
    assert [fault.times for fault in damaged] == [0, 0]
    assert sorted(fetch.watcher.notes) == [
        f"{name} arrived damaged (wrong hash): fetching it again" for name in (WEIGHTS, "tokenizer.json")
    ]
    weights = fetch.models / "acme_tiny" / WEIGHTS
    weights.write_bytes(b"\0" * SIZE)
    fetch("acme/tiny", verify=True)
    assert arrived(fetch), "the hash is remembered"


def test_a_file_whose_hash_no_one_knows_is_said_to_be_unverified(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repositories["acme/tiny"].claim(WEIGHTS, blobId=None, lfs=None, size=None)
    hub.hidden_headers = {"X-Linked-Etag", "ETag"}
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.watcher.notes == [f"the Hub gives no hash of {WEIGHTS}: only the size is checked"]


@pytest.mark.parametrize("etag", ['"5d8c72a5edda8d6a:3239"', 'W/"x"', '"../../evil"', f'"{"g" * 40}"'])
def test_an_etag_that_is_no_hash_is_not_taken_for_one(hub: FakeHub, fetch: Fetcher, etag: str) -> None:
    hub.repositories["acme/tiny"].claim("tokenizer.json", blobId=None)
    hub.fault("*/tokenizer.json", times=1, status=200, headers={"ETag": etag})  # the answer to HEAD
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.watcher.notes == ["the Hub gives no hash of tokenizer.json: only the size is checked"]


# --- what does not --------------------------------------------------------------------------------------------------


def test_a_file_that_always_arrives_wrong_is_refused(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", corrupt=True)
    error = fails(fetch)
    assert error.message.startswith(f"{WEIGHTS} arrived damaged twice: its hash is ")
    assert not (fetch.models / "acme_tiny" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("extra", "message"), [(-10, f"only {SIZE - 10:,} of {SIZE:,} bytes came"), (10, f"more than the {SIZE:,} bytes")]
)
def test_a_wrong_length_is_refused(hub: FakeHub, fetch: Fetcher, extra: int, message: str) -> None:
    hub.fault("/cdn/*", extra=extra)
    error = fails(fetch)
    assert isinstance(error, DownloadError)
    assert fetch.waits[-1] == 16.0
    assert any(message in note for note in fetch.watcher.notes)
    assert not (fetch.models / "acme_tiny" / WEIGHTS).exists()


def test_a_gated_model_says_where_to_accept_and_how_to_log_in(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("meta/llama", model_files(), gated=True)
    error = fails(fetch, "meta/llama", token="hf_new")
    assert error.message == "meta/llama is gated: accept its licence first"
    assert error.hint == f"do so at {hub.url}/meta/llama, then wait for its owner's approval"
    fetch("meta/llama", token="hf_good")
    assert contents(fetch.models / "meta_llama") == model_files()


def test_a_token_goes_to_the_hub_and_never_to_the_storage_behind_it(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("meta/llama", model_files(), gated=True)
    fetch("meta/llama", token="hf_good")
    assert {seen.token for seen in hub.requests() if not seen.path.startswith("/cdn/")} == {"hf_good"}
    assert {seen.token for seen in hub.requests("/cdn/*")} == {""}


def test_a_bad_token_is_named_as_such(hub: FakeHub, fetch: Fetcher) -> None:
    error = fails(fetch, token="hf_bad")
    assert error.message == "the Hub does not accept the token: Invalid credentials in Authorization header"
    assert "hf auth login" in error.hint


def test_a_403_says_what_the_hub_says(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("*", status=403, headers={"X-Error-Message": "your country is not served"})
    assert fails(fetch).message == "the Hub denies access to acme/tiny: your country is not served"


def test_a_missing_model_suggests_near_names(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("acme/Mistral-7B-exl2", model_files())
    hub.repository("other/unrelated", model_files())
    error = fails(fetch, "acme/Mistral-7b-exl3", token="hf_any")
    assert error.message == "the Hub has no model acme/Mistral-7b-exl3, or it is private"
    assert error.hint == "near names: acme/Mistral-7B-exl2"


def test_a_missing_revision_lists_the_branches_in_order(hub: FakeHub, fetch: Fetcher) -> None:
    repository = hub.repository("acme/exl2", model_files())
    for branch in ("10.0bpw", "4.0bpw", "3.5bpw"):
        repository.commit(model_files(), branch)
    error = fails(fetch, "acme/exl2:4bpw")
    assert error.message == "acme/exl2 has no branch, tag or commit named '4bpw'"
    assert error.hint == "its branches: main, 3.5bpw, 4.0bpw, 10.0bpw"


def test_a_server_that_is_not_the_hub_is_recognised(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("*", status=200)
    error = fails(fetch)
    assert error.message.startswith(f"{hub.url} does not answer like the Hub: ")
    assert "HF_ENDPOINT" in error.hint


@pytest.mark.parametrize("where", ["/api/models/*", "*config.json", "/cdn/*"])
def test_a_redirection_to_nowhere_is_not_tried_again(hub: FakeHub, fetch: Fetcher, where: str) -> None:
    hub.fault(where, status=302)
    error = fails(fetch)
    assert error.message.startswith(f"{hub.url} does not answer like the Hub: ")
    assert len(error.message) > len(f"{hub.url} does not answer like the Hub: ") + 5
    assert fetch.waits == []


# Each is JSON, and none is what the Hub's API documents for a model.
ANSWERS = [
    [],
    "text",
    5,
    None,
    {"siblings": 5},
    {"siblings": [None]},
    {"siblings": [{"rfilename": 5}]},
    {"siblings": [{"rfilename": "config.json", "size": "x"}]},
    {"siblings": [{"rfilename": "config.json", "size": 1e400}]},
    {"siblings": [{"rfilename": "config.json", "lfs": 5}]},
    {"siblings": [], "sha": None},
    {"siblings": [], "sha": ["../evil"]},
]


@pytest.mark.parametrize("answer", ANSWERS, ids=json.dumps)
def test_a_listing_of_another_shape_is_not_the_hubs(hub: FakeHub, fetch: Fetcher, answer: object) -> None:
    body = {"id": "acme/tiny", "sha": "0" * 40, **answer} if isinstance(answer, dict) else answer
    hub.fault("/api/models/acme/tiny/revision/*", status=200, body=json.dumps(body).encode())
    error = fails(fetch)
    assert error.message.startswith(f"{hub.url} does not answer like the Hub: ")
    assert fetch.waits == []


@pytest.mark.parametrize("card", [5, [1], {"license": {"a": 1}}, "text"])
def test_an_odd_model_card_is_no_obstacle(hub: FakeHub, fetch: Fetcher, card: Any) -> None:
    hub.repositories["acme/tiny"].card = card
    fetch("acme/tiny")
    assert arrived(fetch)


@pytest.mark.parametrize("where", ["/api/models/*", "*config.json", "/cdn/*"])
@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/x", "data:,x", "javascript:1"])
def test_a_redirection_to_what_is_no_http_is_followed_by_nothing(
    hub: FakeHub, fetch: Fetcher, where: str, address: str
) -> None:
    hub.fault(where, status=302, headers={"Location": address})
    error = fails(fetch)
    assert error.message.startswith(f"{hub.url} does not answer like the Hub: ")
    assert fetch.waits == []


@pytest.mark.parametrize(
    "text", ["²", "٣", "1e3", "-5", "nan", "soon", "Mon, 99 Jan 2026 99:00:00 GMT", "Mon, 1 Jan 99999 00:00:00 GMT"]
)
def test_a_retry_after_of_another_form_is_passed_over(hub: FakeHub, fetch: Fetcher, text: str) -> None:
    """RFC 9110, 10.2.3: a number of ASCII digits, or a date."""
    hub.fault("/cdn/*", times=1, status=429, headers={"Retry-After": text.encode().decode("latin-1")})
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.waits == [1.0]


def test_an_endless_retry_after_is_not_waited_for(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", status=429, headers={"Retry-After": "9" * 400})
    assert fails(fetch).hint == "try again later; logging in raises the limit: hf auth login"
    assert fetch.waits == []


def test_a_file_of_negative_size_is_refused(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("acme/odd", {}).commit(model_files(), model=-5)
    assert fails(fetch, "acme/odd").message == f"{hub.url} does not answer like the Hub: {WEIGHTS} of -5 bytes"


def test_weights_without_a_config_are_refused_before_they_come(hub: FakeHub, fetch: Fetcher) -> None:
    files = {name: content for name, content in model_files().items() if name != "config.json"}
    hub.repository("acme/bare", files)
    error = fails(fetch, "acme/bare")
    assert error.message == "acme/bare holds no config.json, without which its weights cannot be run"
    assert hub.requests("/cdn/*") == []
    fetch("acme/bare", choice=Choice(("*",)))
    assert contents(fetch.models / "acme_bare") == files


def test_no_route_is_one_line_at_once(fetch: Fetcher, tmp_path: Path) -> None:
    with FakeHub() as gone:
        elsewhere = Fetcher(gone, tmp_path / "other")
    error = fails(elsewhere)
    assert error.message == f"cannot reach {gone.url}: [Errno {errno.ECONNREFUSED}] Connection refused"
    assert error.hint == "check the network; exl list shows the models that are here"
    assert elsewhere.waits == []


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "C:evil.json", "a//b"]
)
def test_file_names_cannot_leave_the_folder(hub: FakeHub, fetch: Fetcher, tmp_path: Path, name: str) -> None:
    hub.repository("acme/evil", {**model_files(), name: b"{}"})
    error = fails(fetch, "acme/evil")
    assert "which could be written outside its folder" in error.message
    assert not list(tmp_path.rglob("*evil.json"))
    assert not list(tmp_path.parent.glob("evil.json"))


@pytest.mark.parametrize("name", ["\ud800.json", "x" * 256 + ".json"])
def test_a_name_that_no_disk_takes_is_refused_before_anything_is_fetched(
    hub: FakeHub, fetch: Fetcher, name: str
) -> None:
    hub.repositories["acme/tiny"].claim("README.md", rfilename=name)
    assert fails(fetch).message.startswith(f"{hub.url} does not answer like the Hub: ")
    assert hub.requests("*/resolve/*") == []


@pytest.mark.parametrize(
    "path", ["../../../evil", "/evil/evil", "..", "0" * 63 + "/", "0" * 39, "G" * 64, "0" * 64 + "\n"]
)
def test_hashes_cannot_leave_the_folder_either(hub: FakeHub, fetch: Fetcher, tmp_path: Path, path: str) -> None:
    """The Hub's hashes are 40 hexadecimal digits (git's SHA-1) and 64 (Git LFS: SHA-256), and nothing else is one."""
    repository = hub.repositories["acme/tiny"]
    for name, claim in (
        (WEIGHTS, {"lfs": {"sha256": path, "size": SIZE, "pointerSize": 134}}),
        ("config.json", {"blobId": path}),
    ):
        repository.claim(name, **claim)
        error = fails(fetch)
        assert error.message.startswith(f"{hub.url} does not answer like the Hub: {name} with ")
        repository.commit(model_files())
    assert hub.requests("*/resolve/*") == []
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_a_marker_with_such_a_hash_is_not_believed(fetch: Fetcher) -> None:
    fetch("acme/tiny")
    marker = fetch.models / "acme_tiny" / store.MARKER
    value = json.loads(marker.read_text())
    value["files"][WEIGHTS]["sha256"] = "../../../evil"
    marker.write_text(json.dumps(value))
    with pytest.raises(ModelNotFoundError, match="only partly downloaded"):
        loader.resolve("acme/tiny", fetch.models)
    assert fetch("acme/tiny").fetched_bytes == 0
    assert json.loads(marker.read_text())["files"][WEIGHTS]["sha256"] != "../../../evil"


def test_links_in_the_folder_are_not_followed_out_of_it(hub: FakeHub, fetch: Fetcher, tmp_path: Path) -> None:
    hub.repository("acme/tiny", {**model_files(), "additional_chat_templates/a.jinja": b"x"})
    outside, folder = tmp_path / "outside", fetch.models / "acme_tiny"
    outside.mkdir()
    folder.mkdir(parents=True)
    (folder / "additional_chat_templates").symlink_to(outside)
    error = fails(fetch)
    assert "leads out of it" in error.message
    assert list(outside.iterdir()) == []

    (folder / "additional_chat_templates").unlink()
    (folder / ".exl-download").symlink_to(outside)
    assert isinstance(fails(fetch), DiskError)
    assert list(outside.iterdir()) == []


def test_a_disk_too_small_is_told_before_the_first_byte(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("acme/huge", {}).commit(model_files(), model=10**18)
    error = fails(fetch, "acme/huge")
    assert isinstance(error, DiskError)
    assert error.message.startswith("acme/huge needs 1,000,000,000.00 GB more, and ")
    assert hub.requests("/cdn/*") == []
    assert not (fetch.models / "acme_huge").exists()


def test_patterns_that_choose_nothing_are_refused(fetch: Fetcher) -> None:
    assert isinstance(fails(fetch, choice=Choice(("*.xyz",))), UsageError)


def test_a_failure_in_one_file_keeps_what_came_of_the_others(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("*tokenizer.json", status=404, headers={"X-Error-Code": "EntryNotFound"})
    error = fails(fetch)
    assert error.message == "a file of acme/tiny is no longer on the Hub"
    kept = store.staged_bytes(fetch.models / "acme_tiny")
    hub.faults.clear()
    outcome = fetch("acme/tiny")
    assert arrived(fetch)
    assert outcome.fetched_bytes == sum(map(len, model_files().values())) - kept


def test_a_failed_download_leaves_a_model_put_there_by_hand_usable(hub: FakeHub, fetch: Fetcher) -> None:
    folder = fetch.models / "acme_tiny"
    folder.mkdir(parents=True)
    for name, content in model_files(seed=5).items():
        (folder / name).write_bytes(content)
    hub.fault("/cdn/*", status=500)
    fails(fetch, force=True)
    assert loader.resolve("acme/tiny", fetch.models).path == folder
    assert (folder / WEIGHTS).read_bytes() == model_files(seed=5)[WEIGHTS]
    hub.faults.clear()
    fetch("acme/tiny", force=True)
    assert arrived(fetch)
