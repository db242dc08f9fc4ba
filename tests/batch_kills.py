"""Kills a batch job at random moments, lets it end, and compares its answers with those of one that nobody disturbed.

python tests/batch_kills.py [PROMPTS [KILLS]]
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WORDS = [
    "cat",
    "dog",
    "fox",
    "girl",
    "boy",
    "king",
    "queen",
    "tree",
    "river",
    "stone",
    "little",
    "old",
    "happy",
    "red",
]


def write_prompts(path: Path, count: int, seed: int = 0) -> None:
    """Prompts of a few words, sampled answers of a few tokens; each third line in OpenAI's form, with its own id."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"Once upon a time, the {' '.join(rng.choices(_WORDS, k=3))}"
            line: dict[str, Any] = {"prompt": text}
            if number % 3 == 0:
                body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
                line = {"custom_id": f"task-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def command(prompts: Path, output: Path, *, program: Sequence[str] = ("-m", "exl_cli")) -> list[str]:
    """The job; `program` is run by Python in the place of exl."""
    settings = ["--engine", "cpu", "-n", "8", "--temperature", "1", "--seed", "7", "-q"]
    return [sys.executable, *program, "batch", str(prompts), "-o", str(output), *settings]


def read_texts(output: Path) -> dict[str, str]:
    """The texts by their ids.

    Raises:
        ValueError: a line that is no answer, or a second one with the same id.
    """
    texts: dict[str, str] = {}
    for line in output.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        if answer["error"] is not None or answer["custom_id"] in texts:
            raise ValueError(f"an error or a second answer: {line}")
        texts[answer["custom_id"]] = answer["response"]["body"]["choices"][0]["message"]["content"]
    return texts


def run_and_kill(job: Sequence[str], output: Path, kills: int, rng: random.Random, longest: float) -> list[int]:
    """Start a job and kill it, so many times; then let it end.

    Args:
        job: its command.
        output: its output.
        kills: how often.
        rng: chooses the moments.
        longest: seconds from the first new byte of an answer to the kill, at most; one in four comes before any.

    Returns: bytes in the output after each kill.
    """
    sizes = []
    while len(sizes) < kills:
        before = output.stat().st_size if output.exists() else 0
        process = subprocess.Popen(job, stderr=subprocess.PIPE)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, longest))
        else:
            while process.poll() is None and (output.stat().st_size if output.exists() else 0) == before:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, longest))
        process.kill()
        _, told = process.communicate()
        if process.returncode >= 0:
            raise RuntimeError(f"it ended before it was killed: {process.returncode} {told.decode()}")
        sizes.append(output.stat().st_size if output.exists() else 0)
    subprocess.run(job, check=True)
    return sizes


def main(count: int = 2000, kills: int = 20) -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, undisturbed, killed = (Path(folder, name) for name in ("p.jsonl", "undisturbed.jsonl", "killed.jsonl"))
        write_prompts(prompts, count)
        start = time.monotonic()
        subprocess.run(command(prompts, undisturbed), check=True)
        seconds = time.monotonic() - start
        print(f"undisturbed: {len(read_texts(undisturbed)):,} answers in {seconds:.0f} s")
        sizes = run_and_kill(
            command(prompts, killed), killed, kills, random.Random(1), longest=max(seconds / kills, 0.5)
        )
        print(f"killed {kills} times, with so many bytes written: {', '.join(f'{size:,}' for size in sizes)}")
        texts, expected = read_texts(killed), read_texts(undisturbed)
        differing = [id_ for id_ in expected if texts.get(id_) != expected[id_]]
        lines = killed.read_bytes().count(b"\n")
        print(f"then: {len(texts):,} answers in {lines:,} lines, {count - len(texts):,} missing")
        print(f"texts that differ from the undisturbed: {len(differing):,}")
        if differing or lines != count or len(texts) != count:
            sys.exit(1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
