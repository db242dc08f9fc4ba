"""What `exl serve` must stand, as a program that prints its figures; no part of the suite.

    python tests/serve_attacks.py [kills bodies readers half-open queue clients signal]

Each attack meets a real `exl serve` process with fable-7m on the CPU, except `bodies`, which asks over ASGI. After each
the server has to answer the next request, with nothing under way and its memory where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from helpers import until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import CHAT, asking
from test_serve_process import ServeProcess
from wireformats import server

CLIENT = """
import json, sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as answer:
    while answer.read(64):
        pass
"""
PATHS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]
PATHS += ["/v1/token/encode", "/v1/token/decode", "/tokenize", "/detokenize", "/v1/model/load"]


def metrics(server: ServeProcess) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def megabytes(server: ServeProcess) -> float:
    return metrics(server)["process_resident_memory_bytes"] / 1e6


def is_idle(server: ServeProcess) -> bool:
    now = metrics(server)
    return now["exl_requests_running"] == now["exl_requests_waiting"] == 0


def completion(server: ServeProcess, seed: int, **fields: Any) -> httpx.Response:
    body = {"prompt": "Once upon a time", "max_tokens": 8, "seed": seed, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=600)


def still_there(server: ServeProcess, name: str, figures: str, before: float) -> None:
    begun = time.monotonic()
    until(lambda: is_idle(server))
    idle = time.monotonic() - begun
    assert completion(server, 1).status_code == 200
    now = metrics(server)
    print(
        f"{name}: {figures}; idle again after {idle:.2f} s, the next request is answered, {before:.0f} "
        f"-> {now['process_resident_memory_bytes'] / 1e6:.0f} MB, {now['process_open_fds']:.0f} files open",
        flush=True,
    )


def kills(server: ServeProcess) -> str:
    """kill -9 of clients at random moments: 200 of them, 10 at a time."""
    choose = random.Random(1)
    moments = [choose.uniform(0.1, 3) for _ in range(200)]

    def attack(number: int) -> None:
        text = "word " * choose.choice((1, 100, 800))
        body = asking(number % 2 == 0, ignore_eos=True, messages=[{"role": "user", "content": text}])
        command = [sys.executable, "-S", "-c", CLIENT, server.url + CHAT, json.dumps(body)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments[number])
        process.kill()
        process.wait()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(attack, range(200)))
    ended = {
        reason: int(count)
        for reason in ("cancelled", "length")
        for name, count in metrics(server).items()
        if name.startswith(f'exl_generations_total{{finish_reason="{reason}"')
    }
    return f"200 clients killed, generations by end {ended}"


def readers(server: ServeProcess) -> str:
    """Clients that ask for long streams and read nothing."""
    sockets = []
    for number in range(50):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", server.port))
        body = asking(True, ignore_eos=True, max_tokens=40, logprobs=True, top_logprobs=20, seed=number)
        send(connection, body)
        sockets.append(connection)
    begun = time.monotonic()
    answer = completion(server, 1)
    waited = time.monotonic() - begun
    assert answer.status_code == 200
    for connection in sockets:
        connection.close()
    return f"50 streams that nobody read, and another client was answered after {waited:.1f} s"


def send(connection: socket.socket, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)


def half_open(server: ServeProcess) -> str:
    """Connections that never ask, or never end their body; more than 1,024, which many systems allow by default."""
    parts = [b"", b"POST ", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"]
    parts.append(parts[-1] + b"Content-Type: application/json\r\n\r\n{")
    sockets = []
    for number in range(1500):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(parts[number % 4])
        sockets.append(connection)
    begun = time.monotonic()
    assert completion(server, 1).status_code == 200
    waited = time.monotonic() - begun
    held = metrics(server)["process_open_fds"]
    for connection in sockets:
        connection.close()
    until(lambda: metrics(server)["process_open_fds"] < 100)
    return f"1,500 connections ({held:.0f} open files), and another client was answered after {waited:.2f} s"


def queue(server: ServeProcess) -> str:
    """More clients than the queue holds (64 here)."""
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda seed: completion(server, seed, max_tokens=16), range(200)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)
    return f"200 clients at once at a queue of 64: {dict(statuses)}"


def clients(server: ServeProcess) -> str:
    """200 clients at once, half of them streamed: none is lost, and each has the text of its seed alone."""

    def text(number: int) -> str:
        seed = number % 5
        if number % 2:
            return str(completion(server, seed).json()["choices"][0]["text"])
        lines = completion(server, seed, stream=True).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events)

    alone = [text(seed) for seed in range(5)]
    begun = time.monotonic()
    with ThreadPoolExecutor(200) as pool:
        texts = list(pool.map(text, range(200)))
    seconds = time.monotonic() - begun
    same = sum(text == alone[number % 5] for number, text in enumerate(texts))
    assert same == 200
    return f"{same} of 200 have the text of their seed alone, {200 * 8 / seconds:.0f} tokens/s"


def on_signal(server: ServeProcess) -> str:
    """SIGTERM under load: each request is answered, or refused in words."""
    with ThreadPoolExecutor(30) as pool:
        answers = [pool.submit(completion, server, seed) for seed in range(30)]
        until(lambda: metrics(server)["exl_requests_waiting"] > 10)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        statuses: Counter[str] = Counter()
        for answer in answers:
            error = answer.exception()
            statuses[str(answer.result().status_code) if error is None else type(error).__name__] += 1
        code = server.ended()
    return f"30 clients: {dict(statuses)}, exit code {code} after {time.monotonic() - begun:.1f} s"


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def bodies(count: int = 10_000) -> str:
    """Malformed bodies, half of them near to good ones: never a 500, never a 422."""
    statuses: Counter[int] = Counter()
    with server() as client:
        paths = client.get("/openapi.json").json()["paths"]
        names = {
            name
            for path in paths.values()
            for operation in path.values()
            for name in operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            .get("schema", {}).get("properties", {})
        }  # fmt: skip
        good: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "input": "Hi"}
        good |= {"text": "Hi", "tokens": [1], "max_tokens": 1}
        near = st.dictionaries(st.sampled_from(sorted(names)), json_values, min_size=1, max_size=4).map(
            lambda wrong: json.dumps({**good, **wrong}).encode()
        )
        broken = st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode())
        kinds = st.sampled_from(["application/json"] * 9 + ["text/plain", "", "application/json; charset=utf-16"])

        @settings(
            max_examples=count, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.sampled_from(PATHS), near | broken, kinds)
        def attack(path: str, body: bytes, kind: str) -> None:
            answer = client.post(path, content=body, headers={"Content-Type": kind})
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 400, 404, 413, 415), (path, body, answer.text)

        attack()
    return f"{sum(statuses.values()):,} bodies: {dict(sorted(statuses.items()))}"


ATTACKS: dict[str, Callable[[ServeProcess], str]] = {
    "kills": kills,
    "readers": readers,
    "half-open": half_open,
    "queue": queue,
    "clients": clients,
    "signal": on_signal,
}
FLAGS = {"queue": ("--queue", "64")}


def main(names: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in names or ["bodies", *ATTACKS]:
        begun = time.monotonic()
        if name == "bodies":
            print(f"bodies: {bodies()}, {time.monotonic() - begun:.0f} s", flush=True)
            continue
        process = ServeProcess(*FLAGS.get(name, ()))
        try:
            process.wait_until_ready()
            completion(process, 0)
            before = megabytes(process)
            figures = ATTACKS[name](process)
            if name == "signal":
                print(f"{name}: {figures}", flush=True)
            else:
                still_there(process, name, figures, before)
            if bad := [line for line in process.log if "Traceback" in line or "500" in line.split(" ")[1:2]]:
                print("in the log:", *bad[:5], sep="\n")
        except BaseException:
            print("".join(process.log[-20:]))
            raise
        finally:
            process.process.kill()
            process.ended()


if __name__ == "__main__":
    main(sys.argv[1:])
