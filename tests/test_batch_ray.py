"""Batch jobs on a Ray cluster of three nodes, all of them on this machine, that loses actors, a node and the driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_kills import command, read_texts, write_prompts
from fakes import ScriptedEngine
from helpers import until
from typer.testing import CliRunner

from exl_cli.cli.app import app
from exl_cli.cli.options import State
from exl_cli.engines.base import Engine, Request
from exl_cli.models.info import ModelInfo
from exl_cli.models.tokenizer import Tokenizer

pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        # Actors import this module, whose engines they run.
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def actors(node: Any) -> list[int]:
    """The processes of actors on a node, children of its raylet."""
    (raylet,) = node.all_processes["raylet"]
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == raylet.process.pid and b"ray::Worker" in (folder / "cmdline").read_bytes():
                pids.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return pids


class RayJob:
    """`exl batch` on a cluster."""

    def __init__(self, cluster: Any, prompts: Path, output: Path) -> None:
        self.output = output
        flags = [flag for flag in command(prompts, output) if flag != "-q"]
        self.process = subprocess.Popen([*flags, "--ray", cluster.address], stderr=subprocess.PIPE, text=True)

    def written(self) -> int:
        """Answers in the output and its parts."""
        files = [self.output, *self.output.with_name(f"{self.output.name}.exl.parts").glob("*.jsonl")]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def wait_for(self, more: int) -> None:
        """Until there are so many answers more."""
        before = self.written()
        until(lambda: self.written() >= before + more or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.process.communicate()


def test_a_job_survives_the_loss_of_its_driver_of_an_actor_and_of_a_node(cluster: Any, tmp_path: Path) -> None:
    prompts, output, undisturbed = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "undisturbed.jsonl"))
    write_prompts(prompts, ROWS)
    subprocess.run(command(prompts, undisturbed), check=True)

    killed = RayJob(cluster, prompts, output)
    killed.wait_for(20)
    killed.process.kill()
    killed.process.communicate()

    job = RayJob(cluster, prompts, output)
    job.wait_for(10)
    first, second = cluster.worker_nodes
    until(lambda: actors(first))
    os.kill(actors(first)[0], signal.SIGKILL)
    job.wait_for(10)
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    _, told = job.process.communicate(timeout=600)
    assert job.process.returncode == 0, told
    assert told.count(" was lost (") >= 2, told
    assert f"{ROWS} of {ROWS} prompts" in told
    assert output.read_bytes().count(b"\n") == ROWS
    assert read_texts(output) == read_texts(undisturbed)
    assert sorted(path.name for path in tmp_path.glob("out.jsonl*")) == [
        "out.jsonl",
        "out.jsonl.exl.json",
        "out.jsonl.exl.lock",
    ]


class DyingEngine(ScriptedEngine):
    """Takes its process with it at a prompt of more than 50 tokens."""

    def add(self, request_id: int, request: Request) -> None:
        if len(request.ids) > 50:
            os._exit(1)
        super().add(request_id, request)


def load_dying(info: ModelInfo, tokenizer: Tokenizer, *args: object) -> Engine:
    return DyingEngine(tokenizer, " yes", info.context_length)


def test_a_prompt_that_kills_its_engine_has_an_error_and_the_rest_goes_on(cluster: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 100 if i == 4 else f"{i}"} for i in range(6)]
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["batch", str(prompts), "-o", str(output), "--ray", cluster.address, "--gpus", "1"]
    result = CliRunner().invoke(app, args, obj=State(load=load_dying))
    assert result.exit_code == 14, result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == [f"line-{i}" for i in range(1, 7)]
    (wrong,) = (line for line in lines if line["error"])
    assert wrong["custom_id"] == "line-5"
    assert "engines were lost while processing it" in wrong["error"]["message"]


def test_ctrl_c_keeps_the_answers_in_one_file(cluster: Any, tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(prompts, ROWS)
    job = RayJob(cluster, prompts, output)
    job.wait_for(10)
    job.process.send_signal(signal.SIGINT)
    _, told = job.process.communicate(timeout=300)
    assert job.process.returncode == 130, told
    assert "run the same command to resume" in told
    assert 10 <= len(read_texts(output)) < ROWS
