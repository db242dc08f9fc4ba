"""Batch jobs on a Ray cluster of three nodes, all of them on this machine, that loses actors, a node and the driver."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_kills import command, read_texts, write_prompts
from helpers import until

pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

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
    assert f"{ROWS} of {ROWS} rows" in told
    assert output.read_bytes().count(b"\n") == ROWS
    assert read_texts(output) == read_texts(undisturbed)
    assert sorted(path.name for path in tmp_path.glob("out.jsonl*")) == [
        "out.jsonl",
        "out.jsonl.exl.json",
        "out.jsonl.exl.lock",
    ]


def test_ctrl_c_keeps_the_answers_in_one_file(cluster: Any, tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_prompts(prompts, ROWS)
    job = RayJob(cluster, prompts, output)
    job.wait_for(10)
    job.process.send_signal(signal.SIGINT)
    _, told = job.process.communicate(timeout=300)
    assert job.process.returncode == 130, told
    assert "the same command goes on" in told
    assert 10 <= len(read_texts(output)) < ROWS
