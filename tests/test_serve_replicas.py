"""`exl serve --replicas 2`: the tests of one server through Ray Serve's proxy, and what is Ray's own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers import until
from serving import CHAT, Server, asking
from shallow import shallow
from test_openai_server import *  # noqa: F403
from test_serve import (
    test_a_wrong_field_is_a_400,  # noqa: F401
    test_an_alias_is_answered_for_and_an_unknown_name_is_not,  # noqa: F401
    test_concurrent_clients_each_get_their_own_text,  # noqa: F401
    test_health_the_page_and_routes_that_are_none,  # noqa: F401
    test_models_are_listed_and_described,  # noqa: F401
    test_the_document_has_an_operation_once,  # noqa: F401
    test_the_tokens_of_messages_are_those_of_the_prompt,  # noqa: F401
    test_tokens_of_a_text_and_back,  # noqa: F401
)
from test_serve_process import ServeProcess

from exl_cli.errors import ExitCode

pytest.importorskip("ray.serve")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Requests of one session meet in one replica.
SESSION = {"X-Session-Id": "a"}


class Replicas(Server):
    """A server whose state is out of reach."""

    def __init__(self, port: int, log: list[str]) -> None:
        super().__init__(None, log, port)  # type: ignore[arg-type]

    def metric(self, name: str, *labels: str, session: str = "a") -> float:
        """Of the replica of a session."""
        lines = self.get("/metrics", headers={"X-Session-Id": session}).text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.partition("{")[0].partition(" ")[0] == name and all(label in line for label in labels)
        )


@pytest.fixture(scope="module")
def process() -> Iterator[ServeProcess]:
    flags = ("--replicas", "2", "--engine", "cpu", "--queue", "20", "--grace", "2m", "--served-name", "gpt-4")
    process = ServeProcess(str(shallow()), *flags)
    until(lambda: any("replicas are ready" in line for line in process.log) or process.process.poll() is not None, 300)
    yield process
    process.process.kill()
    process.ended()


@pytest.fixture(scope="module")
def fable(process: ServeProcess) -> Replicas:
    return Replicas(process.port, process.log)


@pytest.fixture(scope="module")
def client(fable: Replicas) -> Iterator[Any]:
    with httpx.Client(base_url=fable.url, timeout=120) as client:
        yield client


def test_a_session_stays_with_its_replica_and_sessions_spread(fable: Replicas) -> None:
    names = [f"session {i}" for i in range(20)]

    def counts() -> list[float]:
        return [fable.metric("exl_new_tokens_total", session=name) for name in names]

    def beside_the_first() -> set[str]:
        """The sessions of the replica that answers the first."""
        before = counts()
        fable.post(CHAT, asking(max_tokens=2, ignore_eos=True), headers={"X-Session-Id": names[0]})
        return {name for name, old, new in zip(names, before, counts(), strict=True) if new == old + 2}

    beside = beside_the_first()
    assert names[0] in beside
    assert len(beside) < len(names)
    assert beside == beside_the_first()


def test_a_full_queue_is_a_429(fable: Replicas) -> None:
    body = asking(stream=True, n=8, max_tokens=100, ignore_eos=True)
    with httpx.stream("POST", fable.url + CHAT, json=body, headers=SESSION, timeout=60) as answer:
        lines = answer.iter_lines()  # dropped, it would close the connection
        next(lines)
        refused = fable.post(CHAT, asking(n=8), headers=SESSION)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full"), refused.text
    assert int(refused.headers["Retry-After"]) > 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_away_ends_its_generation(fable: Replicas, stream: bool) -> None:
    cancelled = fable.metric("exl_generations_total", "cancelled")
    body = asking(stream, max_tokens=900, ignore_eos=True)
    if stream:
        with httpx.stream("POST", fable.url + CHAT, json=body, headers=SESSION, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(fable.url + CHAT, json=body, headers=SESSION, timeout=1)
    until(lambda: fable.metric("exl_generations_total", "cancelled") == cancelled + 1)
    until(lambda: not fable.metric("exl_requests_running"))


def test_a_signal_lets_requests_end(process: ServeProcess, fable: Replicas) -> None:
    body = asking(stream=True, max_tokens=200, ignore_eos=True)
    with httpx.stream("POST", fable.url + CHAT, json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.ended() == ExitCode.OK
    text = "".join(process.log)
    assert "shutting down: waiting up to 120 s for running generations" in text
    assert "Traceback" not in text
