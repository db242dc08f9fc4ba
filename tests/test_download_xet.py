"""Downloads from xet storage, with hf-xet's own storage in a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakehub import FakeHub
from hubtools import WEIGHTS, Fetcher, contents, model_files

hf_xet = pytest.importorskip("hf_xet")

FILES = model_files(2_000_000)
SIZE = len(FILES[WEIGHTS])


@pytest.fixture
def fetch(hub: FakeHub, tmp_path: Path) -> Fetcher:
    return Fetcher(hub, tmp_path / "models")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.delenv("SSL_CERT_DIR")  # without the system's certificates hf-xet makes no client
    storage = tmp_path / "storage"
    storage.mkdir()
    with FakeHub() as fake:
        fake.xet_endpoint = f"local://{storage}"
        made = fake.repository("acme/tiny", FILES)
        with hf_xet.XetSession().new_upload_commit(endpoint=fake.xet_endpoint) as commit:
            upload = commit.start_upload_bytes(FILES[WEIGHTS])
        made.files()[WEIGHTS].xet_hash = upload.result().xet_info.hash
        yield fake


def test_a_file_in_xet_storage_downloads_and_resumes(hub: FakeHub, fetch: Fetcher) -> None:
    fetch.leave_part("acme/tiny", FILES[WEIGHTS][:1_234_567])
    fetch("acme/tiny")
    assert contents(fetch.models / "acme_tiny") == FILES
    assert fetch.bytes[WEIGHTS] == SIZE - 1_234_567
    assert (fetch.notes, fetch.waits) == ([], [])
    assert hub.requests("/cdn/*") == []


def test_where_xet_storage_cannot_be_reached_plain_http_takes_over(hub: FakeHub, fetch: Fetcher) -> None:
    hub.xet_endpoint = "http://127.0.0.1:9"
    fetch("acme/tiny")
    assert contents(fetch.models / "acme_tiny") == FILES
    assert "hf-xet keeps failing; continuing over plain HTTP" in fetch.notes
    assert hub.sent("/cdn/*") == SIZE


def test_the_token_is_sent_to_no_address_but_the_hubs(hub: FakeHub, fetch: Fetcher) -> None:
    """Where access to xet storage is to be renewed, a header says."""
    sha256 = hub.repositories["acme/tiny"].files()[WEIGHTS].sha256
    with FakeHub() as other:
        route = {"X-Xet-Hash": "0" * 64, "Link": f'<{other.url}/renew>; rel="xet-auth"'}
        storage = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha256}"
        hub.fault(f"*/{WEIGHTS}", status=302, headers={**route, "Location": storage})
        fetch("acme/tiny", token="hf_secret")
        assert other.seen == []
    assert contents(fetch.models / "acme_tiny") == FILES
