"""`exl download --branches`: describe branches without fetching weights."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakehub import FakeHub, Repository
from fakehub_handler import Seen
from helpers import MISTRAL_7B
from hubtools import Fetcher, config, download_command

from exl_cli.errors import ExitCode
from exl_cli.models.hub.branches import Branch, describe, fit_warning
from exl_cli.models.memory import Gpu
from exl_cli.system.units import GIB

# Here with the sizes of real quantizations of it.
MISTRAL: dict[str, Any] = {**MISTRAL_7B, "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768}
SMALL = {"tokenizer.json": b'{"model": {}}', "README.md": b"# Mistral\n"}


def quantized(method: str, **more: Any) -> bytes:
    return config(**MISTRAL, quantization_config={"quant_method": method, **more})


@pytest.fixture
def repository(hub: FakeHub) -> Repository:
    made = hub.repository("acme/mistral")
    made.commit({"README.md": b"one branch per size", "measurement.json": b"{}"})
    exl2 = {"config.json": quantized("exl2", bits=4.0, head_bits=6), "output.safetensors": b"w", **SMALL}
    made.commit(exl2, "4.0bpw", output=4_100_000_000)
    gptq = {"config.json": config(**MISTRAL), "model.safetensors": b"w", **SMALL}
    gptq["quantize_config.json"] = b'{"bits": 4, "group_size": 32, "desc_act": true}'
    made.commit(gptq, "gptq-4bit-32g", model=4_570_000_000)
    made.commit({**gptq, "quantize_config.json": b'{"bits": 8, "group_size": 128}'}, "gptq-8bit", model=7_600_000_000)
    made.commit({"config.json": quantized("awq"), "model.safetensors": b"w", **SMALL}, "awq", model=4_000_000_000)
    made.commit({"config.json": config(**MISTRAL), "model.safetensors": b"v", **SMALL}, "fp16", model=14_480_000_000)
    return made


@pytest.fixture
def branches(hub: FakeHub, repository: Repository, tmp_path: Path) -> dict[str, Branch]:
    fetch = Fetcher(hub, tmp_path)
    wanted = fetch.wanted(repository.id)
    return {branch.name: branch for branch in describe(fetch.hub(), wanted.repository, 4096, "fp16", [8 * GIB])}


def test_each_branch_tells_its_quantization(branches: dict[str, Branch], repository: Repository) -> None:
    assert list(branches) == ["main", "4.0bpw", "awq", "fp16", "gptq-4bit-32g", "gptq-8bit"]
    exl2, gptq = branches["4.0bpw"], branches["gptq-4bit-32g"]
    assert (exl2.format_name, exl2.bits, exl2.head_bits, exl2.desc_act) == ("EXL2 4.0 bpw", 4.0, 6, None)
    assert (gptq.format_name, gptq.bits, gptq.group_size, gptq.desc_act) == ("GPTQ 4-bit g32 act-order", 4.0, 32, True)
    assert (branches["fp16"].format_name, branches["fp16"].bits) == ("float16", 16.0)
    assert exl2.context_length == 32768
    assert exl2.commit == repository.branches["4.0bpw"]
    assert (branches["main"].problem, branches["main"].vram_bytes) == ("has no weights", None)
    assert branches["awq"].problem == "has AWQ weights, which exl does not support"
    assert branches["gptq-8bit"].problem.startswith("is 8-bit GPTQ")


def test_download_bytes_count_the_files_to_fetch(branches: dict[str, Branch]) -> None:
    small = sum(map(len, SMALL.values()))
    exl2_config = len(quantized("exl2", bits=4.0, head_bits=6))
    assert branches["4.0bpw"].download_bytes == 4_100_000_000 + small + exl2_config
    assert branches["fp16"].download_bytes == 14_480_000_000 + small + len(config(**MISTRAL))


def test_memory_grows_with_the_weights_and_decides_what_fits(branches: dict[str, Branch]) -> None:
    def vram(name: str) -> int:
        value = branches[name].vram_bytes
        assert value is not None
        return value

    # Other than by the weights these differ by the quantized models' scratch buffer alone.
    assert vram("gptq-4bit-32g") - vram("4.0bpw") == pytest.approx(470_000_000, rel=0.05)
    assert 4.5 * GIB < vram("4.0bpw") < 6.5 * GIB
    assert [name for name, branch in branches.items() if branch.fits] == ["4.0bpw", "gptq-4bit-32g"]
    assert branches["fp16"].fits is False


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"{", "config.json is not a JSON object"),
        (b"[]", "config.json is not a JSON object"),
        (config(**{**MISTRAL, "quantization_config": {"quant_method": "gptq", "bits": {}}}), ""),
        (None, "has no config.json, which is needed to run its weights"),
    ],
)
def test_a_bad_branch_does_not_hide_the_others(
    hub: FakeHub, repository: Repository, tmp_path: Path, bad: bytes | None, problem: str
) -> None:
    files = {"model.safetensors": b"w", **SMALL, **({} if bad is None else {"config.json": bad})}
    repository.commit(files, "bad", model=1_000_000)
    fetch = Fetcher(hub, tmp_path)
    repository_wanted = fetch.wanted(repository.id).repository
    branches = {branch.name: branch for branch in describe(fetch.hub(), repository_wanted, 4096, "fp16", [])}
    assert branches["4.0bpw"].format_name == "EXL2 4.0 bpw"
    assert branches["bad"].commit == repository.branches["bad"]
    if problem:
        assert (branches["bad"].problem, branches["bad"].format_name) == (problem, "")


def test_ctrl_c_waits_for_no_branch(hub: FakeHub, repository: Repository, fetch: Fetcher) -> None:
    hub.fault("*/revision/*", hold_at=1)

    def interrupt(seen: Seen) -> None:
        if "/revision/" in seen.path:
            hub.watch = lambda seen: None
            os.kill(os.getpid(), signal.SIGINT)

    hub.watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        describe(fetch.hub(timeout=100), fetch.wanted(repository.id).repository, 4096, "fp16", [])


def test_only_small_files_are_read(hub: FakeHub, branches: dict[str, Branch]) -> None:
    assert hub.requests("/cdn/*") == []
    read = {seen.path.rpartition("/")[2] for seen in hub.requests("*/resolve/*")}
    assert read == {"config.json", "quantize_config.json"}


def test_an_old_exl2_branch_is_recognised_by_name_and_size(hub: FakeHub, tmp_path: Path) -> None:
    made = hub.repository("acme/old", {"README.md": b"#"})
    # turboderp/Mistral-7B-exl2, branch 4.0bpw: 3.7 GB for 4.0 bits and a 6-bit head.
    made.commit({"config.json": config(**MISTRAL), "output.safetensors": b"w"}, "4.0bpw", output=3_850_000_000)
    fetch = Fetcher(hub, tmp_path)
    _, branch = describe(fetch.hub(), fetch.wanted("acme/old").repository, 4096, "fp16", [])
    assert branch.format_name == "EXL2 4.0 bpw"
    assert branch.bits == pytest.approx(4.0, rel=0.03)
    assert branch.fits is None


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards as NVIDIA's library tells of them."""
    memory = {"GPU-aaaa": 6 * GIB, "GPU-bbbb": 80 * GIB}
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(memory),
        nvmlDeviceGetHandleByIndex=list(memory).__getitem__,
        nvmlDeviceGetUUID=str,
        nvmlDeviceGetName="Card {}".format,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=memory[handle], free=memory[handle] - GIB),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order of these


@pytest.mark.usefixtures("cards")
def test_the_table_names_the_local_gpus(hub: FakeHub, repository: Repository, tmp_path: Path) -> None:
    ask = partial(download_command, hub, tmp_path, repository.id, "--branches")
    result = ask("--cache", "q4", CUDA_VISIBLE_DEVICES="GPU-aaaa", COLUMNS="120")
    assert result.exit_code == 0
    assert result.stderr == "GPU memory: Card GPU-aaaa, 6.0 GiB\n"
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines() if line.strip()}
    assert rows["4.0bpw"].startswith("EXL2 4.0 bpw 4.1 GB ")
    assert rows["4.0bpw"].endswith("yes")
    assert rows["fp16"].endswith("no")
    assert rows["awq"].startswith("has AWQ weights, which exl does not support")

    both = ask("--json", CUDA_VISIBLE_DEVICES="0,1")
    assert {branch["name"]: branch["fits"] for branch in json.loads(both.stdout)}["fp16"] is True
    assert ask(CUDA_VISIBLE_DEVICES="").stderr == "no NVIDIA GPU found; use --vram 24 to check for one with 24 GiB\n"
    assert ask("--vram", "much").exit_code == ExitCode.USAGE


@pytest.mark.parametrize("odd", [{"hidden_size": 10**400}, {"quantization_config": [1]}, {"architectures": {"a": 1}}])
def test_an_odd_config_is_no_obstacle_to_a_download(hub: FakeHub, tmp_path: Path, odd: dict[str, Any]) -> None:
    hub.repository("acme/odd", {"config.json": config(**{**MISTRAL, **odd}), "model.safetensors": b"w", **SMALL})
    fetch = Fetcher(hub, tmp_path)
    fetch("acme/odd")
    assert (tmp_path / "acme_odd" / "model.safetensors").read_bytes() == b"w"
    assert fetch.plan is not None
    assert isinstance(fit_warning(fetch.plan, [Gpu("card", GIB, GIB)]), str)


@pytest.mark.usefixtures("cards")
def test_a_download_that_will_not_fit_is_reported_first(
    hub: FakeHub, fetch: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    large = {**MISTRAL, "hidden_size": 32768, "vocab_size": 128_000}
    hub.repository("acme/wide", {"config.json": config(**large), "model.safetensors": b"w", **SMALL})
    fetch("acme/wide")
    (line,) = fetch.notes
    assert line.startswith("acme/wide will need about ")
    assert line.endswith(" but this machine has 6 GiB; exl download acme/wide --branches shows what fits")
