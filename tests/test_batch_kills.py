"""Batch jobs that are killed, or run into a full disk, resume with the texts of undisturbed ones.

In one process, `test_batch` has what a killed job leaves behind, and its repair.
"""

from __future__ import annotations

import random
import resource
import signal
import subprocess
from pathlib import Path

import batch_kills
import pytest
from batch_kills import read_texts, run_and_kill, write_prompts
from helpers import until


def command(prompts: Path, output: Path) -> list[str]:
    return batch_kills.command(prompts, output, program=[str(Path(__file__).with_name("scripted_batch.py"))])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    write_prompts(path, 40)
    return path


@pytest.fixture(scope="module")
def undisturbed(prompts: Path) -> dict[str, str]:
    output = prompts.with_name("undisturbed.jsonl")
    subprocess.run(command(prompts, output), check=True)
    return read_texts(output)


@pytest.mark.slow
def test_a_job_that_is_killed_ends_with_the_texts_of_an_undisturbed_one(
    prompts: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run_and_kill(command(prompts, output), output, 2, random.Random(3), longest=0.2)
    assert read_texts(output) == undisturbed
    assert len(undisturbed) == len(set(undisturbed.values())) == 40


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(prompts: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    full = subprocess.run(command(prompts, output), capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 10
    assert full.stderr.startswith(f"error: cannot write {output}: ")
    assert len(full.stderr.splitlines()) == 1
    kept = output.read_bytes()
    assert kept.endswith(b"}\n")
    assert read_texts(output).items() < undisturbed.items()
    subprocess.run(command(prompts, output), check=True)
    assert output.read_bytes().startswith(kept)
    assert read_texts(output) == undisturbed


def test_ctrl_c_keeps_whole_answers_and_says_how_to_go_on(
    prompts: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    loud = [argument for argument in command(prompts, output) if argument != "-q"]
    process = subprocess.Popen(loud, stderr=subprocess.PIPE, text=True)
    until(lambda: (output.exists() and output.stat().st_size > 0) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "run the same command to resume" in told
    assert read_texts(output).items() < undisturbed.items()
    subprocess.run(command(prompts, output), check=True)
    assert read_texts(output) == undisturbed
