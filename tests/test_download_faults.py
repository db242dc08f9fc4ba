"""Downloads from a misbehaving Hub: what is fetched, and the error line."""

from __future__ import annotations

import email.utils
import errno
import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakehub import FakeHub
from hubtools import WEIGHTS, Fetcher, contents, model_files

from exl_cli import loader
from exl_cli.errors import DiskError, ExlError, ModelNotFoundError, UsageError, spell
from exl_cli.models.hub import store
from exl_cli.models.hub.branches import describe
from exl_cli.models.hub.files import Choice
from exl_cli.models.hub.transfer import run_all

SIZE = len(model_files()[WEIGHTS])
NO_HASH = f"the Hub has no hash for {WEIGHTS}; checking only the size"


def fails(fetch: Fetcher, model: str = "acme/tiny", **options: object) -> ExlError:
    with pytest.raises(ExlError) as caught:
        fetch(model, **options)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def arrived(fetch: Fetcher) -> bool:
    return contents(fetch.models / "acme_tiny") == model_files()


def is_no_hub(fetch: Fetcher) -> bool:
    """Whether a download fails at once, with a line that says why this is not the Hub."""
    message, start = fails(fetch).message, f"{fetch.fake.url} does not behave like the Hub: "
    return message.startswith(start) and len(message) > len(start) + 5 and fetch.waits == []


# --- what passes by itself ------------------------------------------------------------------------------------------


def again(reason: str, seconds: int = 1, what: str = WEIGHTS) -> str:
    return f"{what}: {reason}; retrying in {seconds} s"


@pytest.mark.parametrize(
    ("fault", "notes", "ranges", "sent"),
    [
        ({"drop_at": 70_001}, [again("connection lost")], ["", "bytes=70001-"], SIZE),
        ({"hold_at": 50_000}, [again("timed out")], ["", "bytes=50000-"], SIZE),
        ({"trickle": 500}, [], [""], SIZE),
        (
            {"corrupt": True},
            [f"{WEIGHTS} was corrupted in transit (wrong hash); downloading it again"],
            ["", ""],
            2 * SIZE,
        ),
    ],
)
def test_a_bad_line_is_gone_on_with_at_the_very_byte(
    hub: FakeHub, fetch: Fetcher, fault: dict[str, Any], notes: list[str], ranges: list[str], sent: int
) -> None:
    hub.fault("/cdn/*", times=1, **fault)
    fetch("acme/tiny", timeout=0.5 if "hold_at" in fault else 10)
    assert arrived(fetch)
    assert [seen.range for seen in hub.requests("/cdn/*")] == ranges
    assert hub.sent("/cdn/*") == sent
    assert fetch.notes == notes
    assert fetch.bytes[WEIGHTS] == SIZE


def test_progress_renews_patience(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=12, drop_at=1000)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.waits == [1.0] * 12


def test_a_server_that_ignores_ranges_is_skipped_forward(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("/cdn/*", times=2, drop_at=70_000, ignore_range=True)
    hub.fault("/cdn/*", ignore_range=True)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert hub.sent("/cdn/*") == 2 * 70_000 + SIZE
    assert fetch.notes.count(f"{WEIGHTS}: the server cannot resume; starting over") == 2
    assert fetch.bytes[WEIGHTS] == SIZE


@pytest.mark.parametrize("sent", [{}, {"Content-Range": "bytes 5-9/10"}, {"Content-Range": "bytes ²-"}], ids=str)
def test_bytes_from_elsewhere_are_not_appended(hub: FakeHub, fetch: Fetcher, sent: dict[str, str]) -> None:
    """A 206 says where its bytes begin (RFC 9110, 15.3.7); here no hash would notice."""
    hub.repositories["acme/tiny"].claim(WEIGHTS, blobId=None, lfs=None)
    hub.hidden_headers = {"X-Linked-Etag", "ETag"}
    fetch.leave_part("acme/tiny", model_files()[WEIGHTS][:90_000])
    headers = {name: value.encode().decode("latin-1") for name, value in sent.items()}
    hub.fault("/cdn/*", times=1, status=206, headers=headers, body=bytes(SIZE - 90_000))
    fetch("acme/tiny")
    assert arrived(fetch)
    assert len(fetch.waits) == 1


@pytest.mark.parametrize(
    ("where", "what"), [("/api/models/acme/tiny/*", "acme/tiny"), ("*config.json", "config.json"), ("/cdn/*", WEIGHTS)]
)
def test_a_500_is_retried_with_a_note(hub: FakeHub, fetch: Fetcher, where: str, what: str) -> None:
    hub.fault(where, times=2, status=500)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.waits == [1.0, 2.0]
    assert fetch.notes == [again("the Hub returned an error (500)", seconds, what) for seconds in (1, 2)]


# RFC 9110, 10.2.3: a number of ASCII digits, or a date; other forms are passed over.
WAITS = {"7": 7.0, **dict.fromkeys(["²", "٣", "1e3", "-5", "nan", "Mon, 99 Jan 2026 99:00:00 GMT"], 1.0)}


def test_a_429_waits_for_retry_after(hub: FakeHub, fetch: Fetcher) -> None:
    for asked, seconds in {**WAITS, "Mon, 1 Jan 99999 00:00:00 GMT": 1.0}.items():
        hub.fault("/cdn/*", times=1, status=429, headers={"Retry-After": asked.encode().decode("latin-1")})
        fetch("acme/tiny", force=True)
        assert fetch.waits.pop() == seconds, asked
        assert fetch.notes.pop() == again("the Hub is rate-limiting requests (429)", int(seconds))
    date = email.utils.formatdate(time.time() + 90, usegmt=True)
    hub.fault("/cdn/*", times=1, status=503, headers={"Retry-After": date})
    fetch("acme/tiny", force=True)
    assert 30 < fetch.waits.pop() <= 90


@pytest.mark.parametrize("size", [90_000, SIZE + 1])
def test_a_damaged_part_does_not_survive_a_resume(fetch: Fetcher, size: int) -> None:
    fetch.leave_part("acme/tiny", b"\0" * size)
    fetch("acme/tiny")
    assert arrived(fetch)


def test_a_failure_of_the_last_thread_is_never_lost() -> None:
    def fail() -> None:
        raise OSError("gone")

    for _ in range(100):
        with pytest.raises(OSError, match="gone"):
            run_all([fail], threading.Event())


# --- hashes ---------------------------------------------------------------------------------------------------------


def test_hashes_that_the_listing_lacks_come_from_the_files_own_headers(hub: FakeHub, fetch: Fetcher) -> None:
    """X-Linked-Etag has the SHA-256 of a file in LFS, ETag git's id of any other; the fake Hub computes both."""
    repository = hub.repository("acme/tiny", {**model_files(), "train.py": b"pass"})
    for name in [*model_files(), "train.py"]:
        repository.claim(name, blobId=None, lfs=None, size=None)
    damaged = [hub.fault("*/tokenizer.json", times=2, corrupt=True), hub.fault("/cdn/*", times=1, corrupt=True)]
    (branch,) = describe(fetch.hub(), fetch.wanted("acme/tiny").repository, 4096, "fp16", [])
    assert branch.download_bytes == sum(map(len, model_files().values()))
    fetch("acme/tiny")
    assert arrived(fetch)
    assert [fault.times for fault in damaged] == [0, 0]
    again = {
        f"{name} was corrupted in transit (wrong hash); downloading it again" for name in (WEIGHTS, "tokenizer.json")
    }
    assert set(fetch.notes) <= again
    weights = fetch.models / "acme_tiny" / WEIGHTS
    weights.write_bytes(b"\0" * SIZE)
    fetch("acme/tiny", verify=True)
    assert arrived(fetch), "the hash is remembered"
    fetch("acme/tiny", choice=Choice(("*.py",)))
    assert contents(weights.parent) == {**model_files(), "train.py": b"pass"}, "what was chosen before stays"


def test_a_file_whose_hash_no_one_knows_is_said_to_be_unverified(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repositories["acme/tiny"].claim(WEIGHTS, blobId=None, lfs=None, size=None)
    hub.hidden_headers = {"X-Linked-Etag", "ETag"}
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.notes == [NO_HASH]


@pytest.mark.parametrize("etag", ['"5d8c72a5edda8d6a:3239"', 'W/"x"', '"../../evil"', f'"{"g" * 40}"'])
def test_an_etag_that_is_no_hash_is_not_taken_for_one(hub: FakeHub, fetch: Fetcher, etag: str) -> None:
    hub.repositories["acme/tiny"].claim(WEIGHTS, lfs=None, blobId=None)
    hub.fault(f"*/{WEIGHTS}", times=1, status=200, headers={"ETag": etag, "X-Linked-Size": str(SIZE)})  # to HEAD
    fetch("acme/tiny")
    assert arrived(fetch)
    assert fetch.notes == [NO_HASH]


def test_hashes_in_capitals_and_ids_of_lfs_pointers_are_understood(hub: FakeHub, fetch: Fetcher) -> None:
    """Of a file in LFS, git's id is that of its pointer, and says nothing of the content."""
    repository = hub.repositories["acme/tiny"]
    repository.card = {"license": {"an": "odd one"}}
    repository.claim("tokenizer.json", blobId=repository.files()["tokenizer.json"].blob_id.upper())
    repository.claim(WEIGHTS, lfs={"sha256": None, "size": SIZE, "pointerSize": 134})
    damaged = hub.fault("*/tokenizer.json", times=1, corrupt=True)
    fetch("acme/tiny")
    assert arrived(fetch)
    assert damaged.times == 0


# --- what does not pass ---------------------------------------------------------------------------------------------

DOUBLING = [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("fault", "message", "hint", "waits"),
    [
        (
            {"status": 503},
            "the Hub returned an error (503)",
            "try again later; run the same command to resume",
            DOUBLING,
        ),
        (
            {"status": 429, "headers": {"Retry-After": "3600"}},
            "the Hub is rate-limiting requests (429)",
            "try again in 3600 s",
            [],
        ),
        (
            {"status": 429, "headers": {"Retry-After": "9" * 400}},
            "the Hub is rate-limiting req",
            "try again later; logging in",
            [],
        ),
        ({"corrupt": True}, f"{WEIGHTS} was corrupted twice: its hash is ", "try again later", []),
        (
            {"extra": 10},
            f"downloading acme/tiny failed: received more than the {SIZE:,} bytes",
            "run the same",
            DOUBLING,
        ),
        ({"extra": -10}, "downloading acme/tiny failed: the server refuses to resume", "run the same", DOUBLING),
        (
            {"status": 403, "headers": {"X-Error-Message": "not there"}},
            "the Hub denies access to acme/tiny: not",
            "",
            [],
        ),
        (
            {"status": 200, "body": gzip.compress(bytes(10**6)), "headers": {"Content-Encoding": "gzip"}},
            "downloading acme/tiny failed",
            "",
            None,
        ),
        (
            {"status": 200, "body": b"not gzip at all", "headers": {"Content-Encoding": "gzip"}},
            "http://",
            "check HF_ENDPOINT",
            [],
        ),
    ],
)
def test_what_does_not_pass_is_given_up(
    hub: FakeHub, fetch: Fetcher, fault: dict[str, Any], message: str, hint: str, waits: list[float] | None
) -> None:
    hub.fault("/cdn/*", **fault)
    error = fails(fetch)
    assert error.message.startswith(message)
    assert error.hint.startswith(hint)
    assert waits is None or fetch.waits[-5:] == waits
    assert not (fetch.models / "acme_tiny" / WEIGHTS).exists()


def test_unknown_repositories_and_users_get_a_next_step(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("meta/llama", model_files(), gated=True)
    exl2 = hub.repository("acme/Mistral-7B-exl2", model_files())
    for branch in ("10.0bpw", "4.0bpw", "3.5bpw"):
        exl2.commit(model_files(), branch)
    accept = f"accept its licence at {hub.url}/meta/llama, then wait for its owner's approval"
    invalid = "the Hub rejects the token: Invalid credentials in Authorization header"
    for model, token, message, hint in (
        ("meta/llama", "hf_new", "meta/llama is gated", accept),
        ("acme/tiny", "hf_bad", invalid, "log in with hf auth login, or pass token"),
        (
            "acme/Mistral-7b-exl3",
            "hf",
            "the Hub has no model acme/Mistral-7b-exl3, or it is private",
            f"similar names: {exl2.id}",
        ),
        (f"{exl2.id}:4bpw", "", "no branch, tag or commit named '4bpw'", "its branches: main, 3.5bpw, 4.0bpw, 10.0bpw"),
    ):
        error = fails(fetch, model, token=token or None)
        assert message in error.message
        assert spell(error.hint) == hint
    assert isinstance(fails(fetch, choice=Choice(("*.xyz",))), UsageError)


def test_the_token_goes_to_the_hub_and_never_to_the_storage_behind_it(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("meta/llama", model_files(), gated=True)
    fetch("meta/llama", token="hf_good")
    assert contents(fetch.models / "meta_llama") == model_files()
    assert {seen.token for seen in hub.requests() if not seen.path.startswith("/cdn/")} == {"hf_good"}
    assert {seen.token for seen in hub.requests("/cdn/*")} == {""}
    with FakeHub() as other:
        for where in ("/api/*", "*config.json", "*tokenizer.json"):
            hub.fault(where, status=307, headers={"Location": f"{other.url}/a/b/c"})
            fails(fetch, "meta/llama", token="hf_good", force=True)
            hub.faults.clear()
        assert {seen.token for seen in other.seen} == {""}
        assert len(other.seen) >= 3


@pytest.mark.parametrize("where", ["/api/models/*", "*config.json", "/cdn/*"])
@pytest.mark.parametrize("address", ["", "file:///etc/passwd", "data:,x", "/loop"])
def test_a_redirection_to_nowhere_is_not_tried_again(hub: FakeHub, fetch: Fetcher, where: str, address: str) -> None:
    hub.fault(where, status=302, headers={"Location": address} if address else {})
    hub.fault("/loop", status=302, headers={"Location": address})
    assert is_no_hub(fetch)


# Each is JSON, and none is what the Hub's API documents for a model.
ANSWERS = [
    "",
    "[]",
    '"text"',
    '{"siblings": 5}',
    '{"siblings": [null]}',
    '{"siblings": [], "sha": null}',
    '{"siblings": [], "sha": ["../evil"]}',
    '{"siblings": [], "sha": "../evil"}',
    '{"siblings": ' + "[" * 100_000,
    '{"siblings": [' + '{"rfilename": "x"},' * 100_000 + '{"rfilename": "y"}]}',
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_a_listing_of_another_shape_is_not_the_hubs(hub: FakeHub, fetch: Fetcher, answer: str) -> None:
    body = (
        answer if "sha" in answer else answer.replace('{"sib', '{"id": "acme/tiny", "sha": "' + "0" * 40 + '", "sib', 1)
    )
    hub.fault("/api/models/acme/tiny/revision/*", status=200, body=body.encode())
    assert is_no_hub(fetch)


NAMES = [
    "../evil.json",
    "/etc/evil.json",
    "a/../../evil.json",
    "..\\evil.json",
    "C:evil.json",
    "a//b",
    "a/",
    "",
    "a\0.json",
]
NAMES += [
    "\ud800.json",
    "x" * 256 + ".json",
    "/".join(["x" * 200] * 6),
    "config.json",
    "config.json/x",
    "tokenizer.json/a/b",
]
# Hashes are 40 hexadecimal digits (git's SHA-1) and 64 (Git LFS: SHA-256), and nothing else is one.
HASHES = ["../../../evil", "/evil/evil", "..", "0" * 63 + "/", "0" * 39, "G" * 64, "0" * 64 + "\n", 5, ["a"]]
SIZES = [-5, 12.5, True, "12", 2**63, 10**400, float("nan"), [1]]
CLAIMS = [
    *({"rfilename": name} for name in [*NAMES, 5, None]),
    *({"blobId": value} for value in HASHES),
    *({"size": size} for size in SIZES),
    *({"lfs": {"sha256": value, "size": 5, "pointerSize": 134}} for value in HASHES),
    *({"lfs": {"sha256": "0" * 64, "size": size, "pointerSize": 134}} for size in SIZES),
    {"lfs": 5},
]


def test_an_impossible_listing_is_refused(hub: FakeHub, fetch: Fetcher, tmp_path: Path) -> None:
    repository = hub.repositories["acme/tiny"]
    for claim in CLAIMS:
        repository.commit(model_files())
        repository.claim("README.md", **claim)
        assert is_no_hub(fetch), claim
    assert hub.requests("*/resolve/*") == []
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_branches_at_no_commit_are_not_the_hubs(hub: FakeHub, fetch: Fetcher) -> None:
    refs = {"branches": [{"name": "main", "ref": "x", "targetCommit": None}], "converts": [], "tags": []}
    hub.fault("*/refs", status=200, body=json.dumps(refs).encode())
    with pytest.raises(ExlError, match="does not behave like the Hub: 'None' for a commit"):
        describe(fetch.hub(), fetch.wanted("acme/tiny").repository, 4096, "fp16", [])


@pytest.mark.parametrize(("size", "content"), [(None, b"[" * 200_000), (10**9, b"{}")])
def test_an_invalid_config_is_refused_at_once(hub: FakeHub, fetch: Fetcher, size: int | None, content: bytes) -> None:
    hub.repositories["acme/tiny"].commit({**model_files(), "config.json": content}, config=size)
    assert fails(fetch).message == "config.json of acme/tiny is not a JSON object"
    assert fetch.waits == []


def test_a_config_without_end_is_read_as_far_as_it_was_listed(hub: FakeHub, fetch: Fetcher) -> None:
    endless = hub.fault("*/config.json", status=200, body=bytes(2**25))
    assert fails(fetch).message == "downloading acme/tiny failed: config.json was corrupted in transit"
    assert endless.times < 10**9
    assert hub.sent("*/config.json") < 6 * 2**24


def test_weights_without_a_config_are_refused_before_the_download(hub: FakeHub, fetch: Fetcher) -> None:
    files = {name: content for name, content in model_files().items() if name != "config.json"}
    hub.repository("acme/bare", files)
    error = fails(fetch, "acme/bare")
    assert error.message == "acme/bare has no config.json, which is needed to run its weights"
    assert hub.requests("/cdn/*") == []
    fetch("acme/bare", choice=Choice(("*",)))
    assert contents(fetch.models / "acme_bare") == files


def test_no_route_is_one_line_at_once(tmp_path: Path) -> None:
    with FakeHub() as gone:
        elsewhere = Fetcher(gone, tmp_path / "other")
    error = fails(elsewhere)
    assert error.message == f"cannot reach {gone.url}: [Errno {errno.ECONNREFUSED}] Connection refused"
    assert error.hint == "check the network; exl list shows the downloaded models"
    assert elsewhere.waits == []


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[" * 100_000, '"../../../evil"'])
def test_a_marker_that_cannot_be_is_not_believed(fetch: Fetcher, text: str) -> None:
    fetch("acme/tiny")
    marker = fetch.models / "acme_tiny" / store.MARKER
    sha256 = json.dumps(json.loads(marker.read_text())["files"][WEIGHTS]["sha256"])
    marker.write_text(marker.read_text().replace(sha256, text))
    with pytest.raises(ModelNotFoundError, match="only partly downloaded"):
        loader.resolve("acme/tiny", fetch.models)
    assert fetch("acme/tiny").fetched_bytes == 0
    assert sha256 in marker.read_text()


def test_links_in_the_folder_are_not_followed_out_of_it(hub: FakeHub, fetch: Fetcher, tmp_path: Path) -> None:
    hub.repository("acme/tiny", {**model_files(), "additional_chat_templates/a.jinja": b"x"})
    outside, folder = tmp_path / "outside", fetch.models / "acme_tiny"
    outside.mkdir()
    folder.mkdir(parents=True)
    for link, message in (("additional_chat_templates", "leads outside it"), (store.STAGING, "is a link")):
        (folder / link).symlink_to(outside)
        assert message in fails(fetch).message
        assert list(outside.iterdir()) == []
        (folder / link).unlink()


def test_a_disk_too_small_is_reported_before_the_first_byte(hub: FakeHub, fetch: Fetcher) -> None:
    hub.repository("acme/huge", {}).commit(model_files(), model=10**18)
    error = fails(fetch, "acme/huge")
    assert isinstance(error, DiskError)
    assert error.message.startswith("acme/huge needs 1,000,000,000.00 GB more, but ")
    assert hub.requests("/cdn/*") == []
    assert not (fetch.models / "acme_huge").exists()


def test_a_failed_file_keeps_the_other_files_progress(hub: FakeHub, fetch: Fetcher) -> None:
    hub.fault("*tokenizer.json", status=404, headers={"X-Error-Code": "EntryNotFound"})
    assert fails(fetch).message == "a file of acme/tiny is no longer on the Hub"
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
