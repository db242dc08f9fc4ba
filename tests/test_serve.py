"""The server over real connections: models, queue, disconnecting clients, health, metrics, tokens."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
import socket
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fakeforward import FakeForward
from helpers import Recorder, until
from serving import CHAT, HeldLoader, Server, asking, serving
from shallow import shallow
from wireformats import events

from exl_cli import loader
from exl_cli.engines.exllamav2.engine import ExLlamaV2Engine
from exl_cli.errors import DeviceError, OutOfMemoryError, UnsupportedModelError
from exl_cli.models.load_options import LoadOptions
from exl_cli.models.tokenizer import Tokenizer
from exl_cli.server import run
from exl_cli.server.pool import Catalog, ModelPool
from exl_cli.server.state import ServerState, Settings
from exl_cli.system.readings import DeviceMemory


@pytest.fixture(scope="module")
def fable() -> Iterator[Server]:
    """fable-7m, or a part of it, on the CPU."""
    with serving({"fable-7m": shallow()}, aliases={"gpt-4": "fable-7m"}) as server:
        yield server


@pytest.fixture
def load() -> HeldLoader:
    return HeldLoader()


@pytest.fixture
def held(load: HeldLoader) -> Iterator[Server]:
    """A model that can be held, behind a queue of two."""
    with serving({"fable-7m": None}, load, settings=Settings(queue=2, keep_alive_seconds=0.05)) as server:
        yield server
        for engine in load.engines.values():
            engine.let_go()


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_a_health_check_in_http_1_0_needs_no_host(fable: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(fable.url.rpartition(":")[2]))) as checker:
        checker.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert checker.recv(100).startswith(b"HTTP/1.1 200 ")


def test_models_are_listed_and_described(fable: Server) -> None:
    listed = fable.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["fable-7m", "gpt-4"]
    assert listed["object"] == "list"
    assert {card["max_model_len"] for card in listed["data"]} == {1024}
    assert fable.get("/v1/models/gpt-4").json()["object"] == "model"
    assert fable.get("/v1/models/gpt-5").status_code == 404
    assert fable.get("/v1/model").json()["id"] == "fable-7m"


def test_an_alias_is_answered_for_and_an_unknown_name_is_not(fable: Server) -> None:
    assert fable.post(CHAT, asking(model="gpt-4", max_tokens=1)).json()["model"] == "fable-7m"
    answer = fable.post(CHAT, asking(model="../../etc/passwd"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    streamed = fable.post(CHAT, asking(model="other", stream=True))
    assert streamed.status_code == 404  # and no stream


def test_health_the_page_and_routes_that_are_none(fable: Server) -> None:
    assert fable.get("/health").json() == {"status": "ok"}
    assert httpx.head(f"{fable.url}/health").status_code == 200
    assert "TabbyAPI" in fable.get("/").text
    missing = fable.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    refused = fable.get(CHAT)
    assert (refused.status_code, refused.json()["error"]["message"]) == (405, f"{CHAT} does not accept GET; use POST")
    assert fable.post("/v1/messages/nothing", {}).json()["type"] == "error"


def test_the_document_has_an_operation_once(fable: Server) -> None:
    operations = [o["operationId"] for p in fable.get("/openapi.json").json()["paths"].values() for o in p.values()]
    assert len(set(operations)) == len(operations)


def test_metrics_count(fable: Server) -> None:
    before = {name: fable.metric(f"exl_{name}_tokens_total") for name in ("prompt", "new")}
    usage = fable.post(CHAT, asking(max_tokens=5, ignore_eos=True)).json()["usage"]
    assert fable.metric("exl_prompt_tokens_total") - before["prompt"] == usage["prompt_tokens"]
    assert fable.metric("exl_new_tokens_total") - before["new"] == 5
    assert fable.metric("exl_http_requests_total", f'route="{CHAT}"', 'status="200"') >= 1
    assert fable.metric("exl_generations_total", 'finish_reason="length"') >= 1
    assert fable.metric("exl_time_to_first_token_seconds_count") >= 1
    assert fable.metric("exl_inter_token_latency_seconds_count") >= 4
    assert fable.metric("exl_ready") == fable.metric("exl_model_loaded", 'model="fable-7m"') == 1
    until(fable.is_idle)
    # A path that is not a route adds no label.
    fable.get("/v1/made/up")
    assert "made" not in fable.get("/metrics").text


def test_the_log_has_a_line_a_request_without_the_prompt(fable: Server) -> None:
    fable.post(CHAT, asking(max_tokens=2, ignore_eos=True, messages=[{"role": "user", "content": "hidden"}]))
    # The line is written once the answer is sent.
    until(lambda: any(line.startswith(f"POST {CHAT} 200, ") and "+ 2 tokens" in line for line in fable.log))
    assert not any("hidden" in line for line in fable.log)


def test_the_log_counts_a_prompt_with_several_choices_once(fable: Server) -> None:
    usage = fable.post(CHAT, asking(max_tokens=3, ignore_eos=True, n=3)).json()["usage"]
    tokens = f", {usage['prompt_tokens']} + 9 tokens"
    until(lambda: any(line.startswith(f"POST {CHAT} 200, ") and line.endswith(tokens) for line in fable.log))
    usage = fable.post("/v1/completions", {"prompt": ["Once", "Once"], "n": 2, "max_tokens": 1}).json()["usage"]
    tokens = f", {usage['prompt_tokens']} + 4 tokens"
    until(lambda: any(line.startswith("POST /v1/completions 200, ") and line.endswith(tokens) for line in fable.log))


def test_the_log_says_why_a_request_was_refused(fable: Server) -> None:
    assert fable.post(CHAT, asking(top_p=-3)).status_code == 400
    until(lambda: any(line.startswith(f"POST {CHAT} 400, ") for line in fable.log))
    assert any(line.startswith(f"POST {CHAT} 400, ") and "top_p must be between 0 and 1" in line for line in fable.log)
    assert fable.get("/nowhere?x=%0aforged").status_code == 404
    said = "there is no route /nowhere; see / for the APIs of this server"
    until(lambda: any("GET /nowhere 404, 0.0" in line and line.endswith(said) for line in fable.log))


def test_prompts_are_in_the_log_when_asked_for(load: HeldLoader) -> None:
    with serving({"fable-7m": None}, load, settings=Settings(log_prompts=True)) as server:
        server.post("/v1/completions", {"prompt": "Some words"})
        assert any("Some words" in line for line in server.log)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tokens_of_a_text_and_back(fable: Server) -> None:
    text = "Once upon a time, there was a fox."
    ids = Tokenizer(loader.resolve(None).path).encode(text, add_special_tokens=True)
    encoded = fable.post("/v1/token/encode", {"text": text}).json()
    assert (encoded["tokens"], encoded["length"]) == (ids, len(ids))
    assert fable.post("/tokenize", {"prompt": text}).json()["count"] == len(ids)  # as vLLM
    assert fable.post("/tokenize", {"content": text}).json()["tokens"] == Tokenizer(loader.resolve(None).path).encode(
        text, add_special_tokens=False
    )  # as llama.cpp
    decoded = fable.post("/v1/token/decode", {"tokens": ids}).json()
    assert decoded["text"].endswith(text)
    assert fable.post("/detokenize", {"tokens": ids}).json()["prompt"] == decoded["prompt"]


def test_the_tokens_of_messages_are_those_of_the_prompt(fable: Server) -> None:
    body = asking(max_tokens=1)
    count = fable.post("/tokenize", {"messages": body["messages"]}).json()["count"]
    assert fable.post(CHAT, body).json()["usage"]["prompt_tokens"] == count


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/token/encode", {}, "nothing to tokenize; send text, prompt, content or messages"),
        ("/v1/token/encode", {"text": 5}, "text must be a string or a list, got 5"),
        ("/v1/token/encode", {"text": [{"role": "user"}]}, "each message needs a role and content"),
        (
            "/v1/token/decode",
            {"tokens": [1 << 40]},
            "1099511627776 is not a token of fable-7m; its ids are below 4,096",
        ),
        ("/v1/token/decode", {"tokens": [-1]}, "-1 is not a token of fable-7m; its ids are below 4,096"),
        ("/v1/token/decode", {"tokens": ["a"]}, 'tokens.0 must be an integer, got "a"'),
        ("/v1/token/decode", {}, "tokens is missing"),
        ("/v1/token/decode", [], "the body must be an object, got a list"),
        ("/v1/model/load", {"name": "fable-7m", "max_seq_len": 4096}, "max_seq_len is not supported; leave it out"),
    ],
    ids=str,
)
def test_a_wrong_field_is_a_400(fable: Server, path: str, body: object, said: str) -> None:
    answer = fable.post(path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"] == said


# --- the queue, and clients that go away ------------------------------------------------------------------------------


class Asker:
    """A client that does not wait for its answer, and can go away."""

    def __init__(self, server: Server, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._socket = socket.create_connection(("127.0.0.1", server.port))
        self._socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def read_until(self, text: bytes) -> bytes:
        self._socket.settimeout(60)
        data = b""
        while text not in data:
            data += (part := self._socket.recv(4096))
            assert part, data
        return data

    def go_away(self) -> None:
        self._socket.close()


def taken_up(server: Server, count: int) -> None:
    until(lambda: server.state.accepted == count)


def test_a_full_queue_is_a_429_and_waiting_requests_are_answered(held: Server, load: HeldLoader) -> None:
    engine = load.engines["fable-7m"]
    engine.hold()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(held.post, CHAT, asking(seed=1)) for _ in range(3)]
        taken_up(held, 3)
        until(lambda: (held.metric("exl_requests_running"), held.metric("exl_requests_waiting")) == (1, 2))
        refused = held.post(CHAT, asking(stream=True))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["Retry-After"]) > 0
        assert held.get("/health").status_code == 200
        engine.let_go()
        texts = {answer.result().json()["choices"][0]["message"]["content"] for answer in waiting}
    assert texts == {"One two three four."}
    until(held.is_idle)
    several = held.post(CHAT, asking(n=4))  # more than ever fit: no use in trying again
    assert (several.status_code, several.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_away_ends_its_generation(held: Server, load: HeldLoader, stream: bool) -> None:
    engine = load.engines["fable-7m"]
    engine.hold()
    running = Asker(held, asking(stream))
    until(lambda: len(engine.requests) == 2)  # the first was the warm-up
    queued, patient = Asker(held, asking(stream)), Asker(held, asking(stream))
    taken_up(held, 3)
    queued.go_away()
    taken_up(held, 2)
    running.go_away()
    taken_up(held, 1)
    until(lambda: len(engine.requests) == 3)  # the patient one has its turn though nothing was let go
    engine.let_go()
    patient.read_until(b"[DONE]" if stream else b"four.")
    until(held.is_idle)
    assert held.metric("exl_generations_total", 'finish_reason="cancelled"') >= 1  # the other perhaps never began
    patient.go_away()


def test_a_client_that_goes_away_in_the_middle_of_an_answer(held: Server, load: HeldLoader) -> None:
    engine = load.engines["fable-7m"]
    engine.hold()
    asker = Asker(held, asking(stream=True, max_tokens=4))
    asker.read_until(b"keep-alive")
    engine.let_go()
    asker.read_until(b"One")
    asker.go_away()
    until(held.is_idle)
    assert held.post(CHAT, asking()).status_code == 200


def test_a_client_that_goes_away_while_a_large_prompt_is_computed(fable: Server) -> None:
    cancelled = fable.metric("exl_generations_total", "cancelled")
    askers = [
        Asker(fable, asking(stream, messages=[{"role": "user", "content": f"word{i} " * 300}], ignore_eos=True))
        for i, stream in enumerate((False, True, False, True))
    ]
    until(lambda: fable.state.pool.loaded[0].submitted == 4)
    for asker in askers:
        asker.go_away()
    until(fable.is_idle)
    assert fable.metric("exl_generations_total", "cancelled") == cancelled + 4


def test_comments_keep_a_line_alive_from_the_queue_on(held: Server, load: HeldLoader) -> None:
    engine = load.engines["fable-7m"]
    engine.hold()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(held.post, CHAT, asking())
        taken_up(held, 1)
        with httpx.stream("POST", held.url + CHAT, json=asking(stream=True), timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(4)] == [": keep-alive", ""] * 2
            engine.let_go()
            rest = "\n".join(lines)
        assert events(rest)[-1] == ("", "[DONE]")
        assert first.result().status_code == 200


def test_an_error_fails_only_its_own_request(held: Server, load: HeldLoader) -> None:
    engine = load.engines["fable-7m"]
    engine.failure = RuntimeError("a secret of the engine")
    for stream in (False, True):  # no event of which has been sent
        answer = held.post(CHAT, asking(stream))
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in answer.text
    assert any("a secret of the engine" in line for line in held.log)
    engine.hold()
    asker = Asker(held, asking(stream=True))
    asker.read_until(b"keep-alive")
    engine.let_go()
    asker.read_until(b"internal_error")
    engine.failure = None
    assert held.post(CHAT, asking()).status_code == 200


def test_a_fault_of_the_device_is_said_to_all_and_ends_the_server(held: Server, load: HeldLoader) -> None:
    engine = load.engines["fable-7m"]
    engine.hold()
    with ThreadPoolExecutor(2) as pool:
        askers = [pool.submit(held.post, CHAT, asking(stream)) for stream in (False, True)]
        taken_up(held, 2)
        streamed = Asker(held, asking(stream=True))
        streamed.read_until(b"keep-alive")
        engine.failure = DeviceError("an illegal memory access was encountered")
        engine.let_go()
        texts = [asker.result().text for asker in askers]
    assert all("engine_failed" in text for text in texts), texts
    assert b"engine_failed" in streamed.read_until(b"engine_failed")
    assert held.state.phase == "failed"
    until(lambda: held.ended_by is not None)
    assert isinstance(held.ended_by, DeviceError)


@pytest.mark.parametrize("begin", [b"", b"GET /heal", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=str)
def test_an_idle_connection_is_closed(load: HeldLoader, begin: bytes) -> None:
    with serving({"fable-7m": None}, load, head_seconds=0.1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as half_open:
            half_open.settimeout(60)
            half_open.sendall(begin)
            if begin.endswith(b"\r\n\r\n"):
                assert half_open.recv(4096)
                half_open.sendall(b"GET /")  # the next
            while half_open.recv(4096):
                pass
        # One that waits for its answer is not, and neither is one that has been answered.
        load.engines["fable-7m"].hold()
        asker = Asker(server, asking(stream=True))
        with socket.create_connection(("127.0.0.1", server.port)) as half_open:
            half_open.settimeout(60)
            assert not half_open.recv(1)
        load.engines["fable-7m"].let_go()
        asker.read_until(b"[DONE]")


def test_a_client_that_does_not_read_its_answer_is_disconnected() -> None:
    async def main() -> None:
        gone = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(64):  # megabytes, more than a system buffers
                await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        state = ServerState(ModelPool(Catalog({"fable-7m": loader.resolve(None)}), LoadOptions(), Recorder()))
        listener = run.listen("127.0.0.1", 0)
        serving = asyncio.ensure_future(
            run.serve(app, state, listener, preload=[], grace=0, signals=False, read_seconds=0.1)
        )
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(gone.wait(), 60)
        serving.cancel()
        await asyncio.wait({serving})
        listener.close()

    asyncio.run(main())


class PagedEngine(ExLlamaV2Engine):
    """The engine of the GPU over forward passes without one: requests share them, and pages of a KV cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        forward = FakeForward(
            page_size=8, pages=64, max_batch=4, max_tokens=64, vocab_size=tokenizer.vocab_size,
            fail=lambda what: threading.Event().wait(0.001),
        )  # fmt: skip
        model: Any = SimpleNamespace(forward=forward, model=SimpleNamespace(config=SimpleNamespace(max_input_len=64)))
        super().__init__(model, tokenizer, 128, {})

    @property
    def facts(self) -> dict[str, str]:
        return {}

    def memory(self) -> list[DeviceMemory]:
        return []

    def close(self) -> None:
        pass


def test_pages_are_free_again_when_clients_went_away_at_random_moments() -> None:
    def load(info: Any, tokenizer: Tokenizer, *args: Any) -> PagedEngine:
        return PagedEngine(tokenizer)

    choose = random.Random(1)
    with serving({"fable-7m": None}, load) as server:
        for _ in range(40):
            text = "word " * choose.randrange(80)
            asker = Asker(server, asking(choose.random() < 0.5, messages=[{"role": "user", "content": text}]))
            threading.Event().wait(choose.random() * 0.03)
            asker.go_away()
        until(server.is_idle)
        until(lambda: server.metric("exl_pages_in_use") == 0)
        assert server.metric("exl_generations_total", "cancelled") > 10
        assert server.metric("exl_pages") == 64
        assert server.post(CHAT, asking(max_tokens=20)).status_code == 200
        until(lambda: server.metric("exl_pages_in_use") == 0)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models a, b and c."""
    folder = tmp_path_factory.mktemp("models")
    for name in "abc":
        shutil.copytree(loader.resolve(None).path, folder / name)
    return folder


def asked(server: Server, model: str) -> int:
    return server.post(CHAT, asking(model=model)).status_code


def test_models_load_on_demand_and_the_least_recently_used_is_evicted(shelf: Path, load: HeldLoader) -> None:
    with serving({"a": shelf / "a"}, load, folder=shelf, max_loaded=2) as server:
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == ["a", "b", "c"]
        assert [asked(server, name) for name in ("b", "a", "c")] == [200, 200, 200]
        loaded = {card["id"] for card in server.get("/v1/models").json()["data"] if card["loaded"]}
        assert loaded == {"a", "c"}
        assert load.engines["b"].closed
        assert asked(server, "b") == 200
        assert load.loads == ["a", "b", "c", "b"]
        assert asked(server, "d") == 404


def test_any_name_means_the_first_model(shelf: Path, load: HeldLoader) -> None:
    with serving({"a": shelf / "a", "b": shelf / "b"}, load, any_name=True, max_loaded=2) as server:
        assert server.post(CHAT, asking(model="gpt-9")).json()["model"] == "a"
        assert server.post(CHAT, asking(model="b")).json()["model"] == "b"
        assert server.post(CHAT, asking()).json()["model"] == "a"


def test_loads_take_turns_and_serve_all_waiting_requests(shelf: Path, load: HeldLoader) -> None:
    with serving({name: shelf / name for name in "abc"}, load, preload=0, max_loaded=3) as server:
        load.go_on.clear()
        gone = Asker(server, asking(model="a"))
        until(lambda: load.loads == ["a"])
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(asked, server, name) for name in "aabbcc"]
            taken_up(server, 7)
            assert load.loads == ["a"]
            gone.go_away()
            taken_up(server, 6)
            load.go_on.set()
            assert [answer.result() for answer in answers] == [200] * 6
        assert sorted(load.loads) == ["a", "b", "c"]
        assert load.at_once == 1
        assert all(model.users == 0 for model in server.state.pool.loaded)


def test_an_abandoned_load_serves_the_next_request(shelf: Path, load: HeldLoader) -> None:
    with serving({"a": shelf / "a"}, load, preload=0) as server:
        load.go_on.clear()
        gone = Asker(server, asking(stream=True))
        until(lambda: load.loads == ["a"])
        gone.go_away()
        taken_up(server, 0)
        load.go_on.set()
        assert asked(server, "a") == 200
        assert load.loads == ["a"]


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (OutOfMemoryError("a needs 80 GiB"), 503, "out_of_memory"),
        (UnsupportedModelError("a is a model for images"), 503, "model_not_loaded"),
        (RuntimeError("a bug"), 500, "internal_error"),
    ],
    ids=str,
)
def test_a_load_that_fails_is_tried_again_by_the_next_request(
    shelf: Path, load: HeldLoader, failure: Exception, status: int, code: str
) -> None:
    with serving({"b": shelf / "b", "a": shelf / "a"}, load) as server:
        load.failure = failure
        answer = server.post(CHAT, asking(model="a", stream=True))
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert asked(server, "b") == asked(server, "a") == 200


def test_idle_models_are_unloaded_to_make_room(shelf: Path, load: HeldLoader) -> None:
    with serving({"a": shelf / "a", "b": shelf / "b"}, load, max_loaded=2) as server:
        load.failure = OutOfMemoryError("b does not fit beside a")
        assert asked(server, "b") == 200
        assert load.loads == ["a", "b", "b"]
        assert load.engines["a"].closed


def test_an_idle_model_is_unloaded_and_loaded_again(load: HeldLoader) -> None:
    with serving({"fable-7m": None}, load, idle_seconds=0.02) as server:
        until(lambda: server.state.pool.loaded == [])
        unloaded = server.get("/v1/model").json()
        assert (unloaded["id"], unloaded["loaded"]) == ("fable-7m", False)
        assert server.get("/health").status_code == 200
        assert server.post(CHAT, asking()).status_code == 200
        until(lambda: server.metric("exl_model_loaded") == 0)
        assert len(load.loads) == 2
        assert any(line.startswith("unloaded fable-7m") for line in server.log)


def test_an_unloaded_model_is_freed_however_long_models_may_idle(load: HeldLoader) -> None:
    with serving({"fable-7m": None}, load, idle_seconds=3600) as server:
        before = set(threading.enumerate())
        assert asked(server, "") == 200
        threads = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("exl-")}
        assert threads
        model = weakref.ref(server.state.pool.loaded[0])
        assert server.post("/v1/model/unload").status_code == 200
        gc.collect()
        assert model() is None
        until(lambda: not any(thread.is_alive() for thread in threads))


def test_unloading_spares_a_model_in_use(held: Server, load: HeldLoader) -> None:
    engine = load.engines["fable-7m"]
    engine.hold()
    asker = Asker(held, asking(stream=True))
    taken_up(held, 1)
    assert held.post("/v1/model/unload").status_code == 409
    engine.let_go()
    asker.read_until(b"[DONE]")
    until(lambda: held.post("/v1/model/unload").json() == {"status": "unloaded"})
    assert engine.closed
    loading = events(held.post("/v1/model/load", {"model_name": "fable-7m"}).text)
    assert [data["status"] for _, data in loading] == ["processing", "finished"]
    assert held.get("/v1/model").json()["loaded"]
    assert held.post("/v1/model/load", {"name": "other"}).status_code == 404


def test_health_waits_for_the_load_and_so_do_requests(load: HeldLoader) -> None:
    load.go_on.clear()
    with serving({"fable-7m": None}, load, preload=0) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked, server, "")
        taken_up(server, 1)
        load.go_on.set()
        assert answer.result() == 200


def test_a_model_that_cannot_be_loaded_at_the_start_ends_the_server(load: HeldLoader) -> None:
    load.failure = OutOfMemoryError("it needs 80 GiB")
    with serving({"fable-7m": None}, load) as server:
        until(lambda: server.ended_by is not None)
        assert isinstance(server.ended_by, OutOfMemoryError)


def test_a_fault_of_the_device_in_a_load_ends_the_server(shelf: Path, load: HeldLoader) -> None:
    with serving({"b": shelf / "b", "a": shelf / "a"}, load, max_loaded=2) as server:
        load.failure = DeviceError("the GPU fell off the bus")
        assert server.post("/v1/model/load", {"name": "a"}).status_code == 500
        until(lambda: server.ended_by is not None)
        assert isinstance(server.ended_by, DeviceError)


def test_concurrent_clients_each_get_their_own_text(fable: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 6}

    def text(seed: int) -> str:
        answer: str = fable.post("/v1/completions", {**body, "seed": seed}).json()["choices"][0]["text"]
        return answer

    alone = [text(seed) for seed in range(4)]
    start = threading.Barrier(12)

    def together(seed: int) -> str:
        start.wait(60)
        return text(seed % 4)

    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(together, range(12))] == alone * 3
