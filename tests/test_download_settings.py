"""Invalid environment settings for downloads are refused by name, and tokens are never printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakehub import FakeHub
from helpers import exl
from hubtools import shell

from exl_cli.errors import ExitCode, UsageError
from exl_cli.models.hub.client import Hub


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "x"),
        ("HF_ENDPOINT", "http://"),
        ("HF_ENDPOINT", "file:///etc"),
        ("HF_ENDPOINT", "ftp://host"),
        ("HF_ENDPOINT", "http://host:99999"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "x"),
        ("HF_HUB_ETAG_TIMEOUT", "1.5s"),
        ("SSL_CERT_FILE", "/nonexistent"),
        ("SSL_CERT_FILE", "/"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=name) as caught:
        Hub()
    assert value in caught.value.message


@pytest.mark.parametrize(
    ("given", "kept"), [("a\nb", ""), ("hf_s\u00fcss", ""), ("hf secret", ""), (None, "hf_s\u00fcss")]
)
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", kept)
    with pytest.raises(UsageError, match="token contains characters" if given else "HF_TOKEN contains") as caught:
        Hub(given, endpoint=hub.url)
    assert (given or kept) not in str(caught.value)


def test_a_token_that_cannot_be_read_is_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/dev/null/token")
    with pytest.raises(UsageError, match="check HF_HOME"):
        Hub(endpoint=hub.url)


def test_a_variable_that_huggingface_hub_trips_over_when_imported_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    done = exl("download", "acme/tiny", env=shell(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="x"))
    assert done.returncode == ExitCode.USAGE
    wrong = "HF_HUB_DOWNLOAD_TIMEOUT is 'x', not a whole number of seconds"
    assert done.stderr == f"error: {wrong}; correct or unset it\n"
