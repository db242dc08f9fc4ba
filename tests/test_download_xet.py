"""Files in xet storage, with hf-xet's own storage on a local folder in the place of the remote one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakehub import FakeHub
from hubtools import WEIGHTS, Fetcher, begin, contents, model_files

from exl_cli.models.hub import store

hf_xet = pytest.importorskip("hf_xet")

FILES = model_files(2_000_000)
SIZE = len(FILES[WEIGHTS])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    storage = tmp_path / "storage"
    storage.mkdir()
    with FakeHub() as fake:
        fake.xet_endpoint = f"local://{storage}"
        made = fake.repository("acme/tiny", FILES)
        with hf_xet.XetSession().new_upload_commit(endpoint=fake.xet_endpoint) as commit:
            upload = commit.start_upload_bytes(FILES[WEIGHTS])
        entry = next(entry for entry in made.commits[made.branches["main"]] if entry.name == WEIGHTS)
        entry.xet_hash = upload.result().xet_info.hash
        yield fake


def test_a_file_in_xet_storage_arrives_and_goes_on_where_it_stopped(hub: FakeHub, fetch: Fetcher) -> None:
    wanted = fetch.wanted("acme/tiny")
    file = next(file for file in fetch.hub().listing(wanted.repository).files if file.name == WEIGHTS)
    begin(wanted.folder, "acme/tiny", 1)
    store.part(wanted.folder, file).write_bytes(FILES[WEIGHTS][:1_234_567])

    fetch("acme/tiny")

    assert contents(wanted.folder) == FILES
    assert fetch.watcher.bytes[WEIGHTS] == SIZE - 1_234_567
    assert (fetch.watcher.notes, fetch.waits) == ([], [])
    assert hub.requests("/cdn/*") == []


def test_where_xet_storage_cannot_be_reached_plain_http_takes_over(hub: FakeHub, fetch: Fetcher) -> None:
    hub.xet_endpoint = "http://127.0.0.1:9"
    fetch("acme/tiny")
    assert contents(fetch.models / "acme_tiny") == FILES
    assert "hf-xet keeps failing: going on over plain HTTP" in fetch.watcher.notes
    assert hub.sent("/cdn/*") == SIZE
