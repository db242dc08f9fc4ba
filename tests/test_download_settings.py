"""Settings of the environment that cannot be: refused at once, by name, and no token is ever printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakehub import FakeHub
from helpers import exl
from hubtools import model_files, shell

from exl_cli.errors import ExitCode, UsageError
from exl_cli.models.hub.client import Hub


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "x"),
        ("HF_ENDPOINT", "http://"),
        ("HF_ENDPOINT", "file:///etc"),
        ("HF_ENDPOINT", "http://host:99999"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "x"),
        ("HF_HUB_ETAG_TIMEOUT", "1.5s"),
        ("SSL_CERT_FILE", "/nonexistent"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=name) as caught:
        Hub()
    assert value in caught.value.message


@pytest.mark.parametrize("endpoint", ["x", "ftp://host", "https://"])
def test_a_wrong_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        Hub(endpoint=endpoint)


@pytest.mark.parametrize("token", ["a\nb", "hf_s\u00fcss", "hf secret"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(hub: FakeHub, token: str) -> None:
    with pytest.raises(UsageError, match="token holds characters") as caught:
        Hub(token, endpoint=hub.url)
    assert token not in str(caught.value)


def test_a_wrong_home_and_a_wrong_token_of_the_environment(hub: FakeHub, tmp_path: Path) -> None:
    """In processes of their own: these are read when huggingface_hub is imported."""
    hub.repository("acme/tiny", model_files())
    for more, word in (
        ({"HF_HOME": "/dev/null"}, "check HF_HOME"),
        ({"HF_TOKEN": "hf_s\u00fcss"}, "HF_TOKEN holds characters"),
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "x"}, "HF_HUB_DOWNLOAD_TIMEOUT is 'x'"),
    ):
        done = exl("download", "acme/tiny", env=shell(hub, tmp_path, **more))
        assert done.returncode == ExitCode.USAGE
        assert word in done.stderr
        assert done.stderr.count("\n") == 1
        assert "hf_s" not in done.stderr
    assert hub.requests() == []
