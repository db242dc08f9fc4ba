"""Downloads as processes: killed, interrupted, out of disk, concurrent; their output, and the question of `exl run`."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from fakehub import FakeHub
from helpers import until
from hubtools import WEIGHTS, Fetcher, contents, download_command, model_files, shell

from exl_cli import loader
from exl_cli.api.download import Lines
from exl_cli.cli.inputs import ensure
from exl_cli.errors import DownloadError, ExitCode, ModelNotFoundError, spell
from exl_cli.models import folders
from exl_cli.models.hub.download import prepare
from exl_cli.ui.console import Console

FILES = model_files(3_000_000)
SIZE = len(FILES[WEIGHTS])
COMMAND = [sys.executable, "-m", "exl_cli", "download", "acme/tiny"]
COMMAND_LINE = (COMMAND[0], COMMAND[1:])
_COLOURS = r"(?:\x1b\[[\d;]*m)*"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.repository("acme/tiny", FILES)
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "acme_tiny"


def weights_here(folder: Path) -> int:
    sizes = [0]
    for path in folder.glob(".exl-download/*.part"):
        with contextlib.suppress(FileNotFoundError):  # a small file that has come meanwhile
            sizes.append(path.stat().st_size)
    return max(sizes)


def test_a_killed_download_resumes_with_the_missing_bytes(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    fault = hub.fault("/cdn/*", times=1, hold_at=1_000_000)
    with subprocess.Popen(COMMAND, env=shell(hub, tmp_path), stderr=subprocess.DEVNULL) as process:
        until(lambda: weights_here(folder) == 1_000_000)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ModelNotFoundError, match="only partly downloaded"):
        loader.resolve("acme/tiny", folder.parent)
    assert [entry.complete for entry in folders.entries(folder.parent)] == [True, False]
    fault.release.set()
    hub.seen.clear()

    result = download_command(hub, folder.parent, "acme/tiny")

    assert (result.exit_code, result.stdout) == (0, f"{folder}\n")
    assert "already downloaded" in result.stderr.splitlines()[0]
    assert [seen.range for seen in hub.requests("/cdn/*")] == ["bytes=1000000-"]
    assert hub.sent("/cdn/*") == SIZE - 1_000_000
    assert contents(folder) == FILES


def test_ctrl_c_at_a_terminal_keeps_progress_and_says_so(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.fault("/cdn/*", times=1, hold_at=1_500_000)
    env = shell(hub, tmp_path, TERM="xterm")
    with pexpect.spawn(*COMMAND_LINE, env=env, timeout=60, encoding="utf-8", dimensions=(24, 100)) as terminal:
        # Bytes of bytes, rate, time left; for the whole and for the file.
        line = r"{} .*1\.\d/3\.0 MB{} *{}[\d.]+ [kM]B/s *{} *{}\d:\d\d:\d\d"
        for name in ("total", WEIGHTS):
            terminal.expect(line.format(re.escape(name), *[_COLOURS] * 4))
        until(lambda: weights_here(folder) == 1_500_000)
        terminal.sendintr()
        terminal.expect(r"stopped: 1\.5 MB of 3 MB kept; run the same command to resume")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 130
    assert weights_here(folder) == 1_500_000


def test_a_full_disk_is_reported_and_the_download_resumes_later(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, 1_200_000))

    full = subprocess.run(COMMAND, env=shell(hub, tmp_path), capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 10
    assert full.stderr.splitlines()[-1] == (
        f"error: the disk is full: {WEIGHTS} stopped at 1,200,000 of {SIZE:,} bytes; "
        "free some space, then run the same command to resume"
    )
    hub.seen.clear()
    Fetcher(hub, folder.parent)("acme/tiny")
    assert [seen.range for seen in hub.requests("/cdn/*")] == ["bytes=1200000-"]
    assert contents(folder) == FILES


def test_concurrent_downloads_of_a_model_run_once(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    fault = hub.fault("/cdn/*", times=1, hold_at=1000)
    with subprocess.Popen(COMMAND, env=shell(hub, tmp_path), stderr=subprocess.PIPE, text=True) as first:
        assert fault.held.wait(60)
        second = Fetcher(hub, folder.parent)
        second.noted = fault.release.set
        assert second("acme/tiny", verify=True).fetched_bytes == 0
        assert second.notes == ["another exl process is downloading acme/tiny; waiting for it to finish"]
        assert first.wait(60) == 0
    assert hub.sent("/cdn/*") == SIZE
    assert contents(folder) == FILES


def test_offline_is_one_line(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set, so nothing can be downloaded") as caught:
        Fetcher(hub, tmp_path)("acme/tiny")
    assert caught.value.hint == "unset it; exl list shows the downloaded models"
    assert caught.value.exit_code == ExitCode.DOWNLOAD
    assert hub.seen == []


def test_without_a_login_the_error_explains_how_to_log_in(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.repository("meta/llama", FILES, gated=True)
    log_in = "log in with hf auth login, or pass token"
    for model, message, hint in (
        ("meta/llama", "is gated", f"accept its licence at {hub.url}/meta/llama, then {log_in}"),
        ("nobody/nothing", "or it is private", f"check the name; if it is private, {log_in}"),
    ):
        with pytest.raises(DownloadError, match=message) as caught:
            Fetcher(hub, tmp_path)(model)
        assert spell(caught.value.hint) == hint


def test_plain_lines_appear_at_each_tenth_at_most(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch = Fetcher(hub, tmp_path)
    plan = prepare(fetch.hub(), fetch.wanted("acme/tiny"))
    now = 100.0
    shown = Lines(Console().note, clock=lambda: now)
    shown.begin(plan)
    for seconds, count in ((0.5, 900_000), (2.0, 100_000), (5.0, 10_000), (90.0, 10_000), (0.1, 1_000_000)):
        now += seconds
        shown.advance(WEIGHTS, count)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"Downloading acme/tiny \(commit [0-9a-f]{8}\) to .*: 4 files, 3 MB", lines[0])
    assert lines[1:] == ["33 %: 1 MB of 3 MB, 400 kB/s, 5 s left", "33 %: 1.02 MB of 3 MB, 10.5 kB/s, 189 s left"]


@pytest.mark.smoke
def test_a_missing_model_is_downloaded_first_if_allowed(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(ModelNotFoundError) as caught:
        ensure("acme/tiny", tmp_path, allow=False, console=Console())
    assert caught.value.hint == "download it with exl download acme/tiny"
    assert hub.seen == []
    assert ensure("acme/tiny", tmp_path, allow=True, console=Console()).path == tmp_path / "acme_tiny"
    hub.seen.clear()
    assert ensure("acme/tiny", tmp_path, allow=False, console=Console()).name == "acme/tiny"
    assert hub.seen == []


ASK_TWICE = """
from exl_cli.cli.inputs import ensure
from exl_cli.errors import ModelNotFoundError
from exl_cli.ui.console import Console
for _ in range(2):
    try:
        print("got", ensure("acme/tiny", None, allow=False, console=Console()).name)
    except ModelNotFoundError as error:
        print(error)
"""


def test_at_a_terminal_a_person_is_asked_with_the_size(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    env = shell(hub, tmp_path, TERM="xterm")
    command = (sys.executable, ["-c", ASK_TWICE])
    with pexpect.spawn(*command, env=env, timeout=60, encoding="utf-8", dimensions=(24, 200)) as terminal:
        for answer, then in (("no", "acme/tiny is not in"), ("", "got acme/tiny")):
            terminal.expect_exact(f"acme/tiny is not downloaded yet. Download 3 MB to {folder}? [Y/n] ")
            assert not folder.exists()
            terminal.sendline(answer)
            terminal.expect_exact(then)
        terminal.expect(pexpect.EOF)
    assert contents(folder) == FILES
