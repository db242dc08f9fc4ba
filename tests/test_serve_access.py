"""Access control of the server: keys, hosts, web pages, body sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import ScriptedLoader
from helpers import Recorder
from serving import CHAT, asking
from starlette.testclient import TestClient

from exl_cli import loader
from exl_cli.errors import DiskError, UsageError
from exl_cli.models.load_options import LoadOptions
from exl_cli.server.app import create_app
from exl_cli.server.gate import Policy
from exl_cli.server.keys import Keys
from exl_cli.server.pool import Catalog, ModelPool
from exl_cli.server.state import ServerState, Settings
from exl_cli.ui.console import flags

JSON = {"Content-Type": "application/json"}


@contextmanager
def client(
    policy: Policy, load: ScriptedLoader | None = None, note: Callable[[str], None] = print, **settings: Any
) -> Iterator[TestClient]:
    load = load or ScriptedLoader("Yes.")
    pool = ModelPool(Catalog({"fable-7m": loader.resolve(None)}), LoadOptions(), Recorder(), load)
    state = ServerState(pool, Settings(**settings), note=note)
    with TestClient(create_app(state, policy), "http://localhost:8080", raise_server_exceptions=False) as asker:
        yield asker
        asker.portal.call(pool.close)


@pytest.fixture(scope="module")
def anyone() -> Iterator[TestClient]:
    with client(Policy(max_body=4096)) as asker:
        yield asker


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text("# of the house\nann: sk-ann-1\n\nsk-nameless\nbob:sk-bob-2\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer sk-ann-1"},
        {"Authorization": "bearer   sk-bob-2"},
        {"X-Api-Key": "sk-nameless"},
    ],
    ids=str,
)
def test_a_key_lets_in(keys: Path, headers: dict[str, str]) -> None:
    with client(Policy(Keys(keys, print))) as asker:
        assert asker.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer ann"},
        {"Authorization": "Bearer sk-ann-1x"},
        {"Authorization": "Basic sk-ann-1"},
        {"X-Api-Key": "# of the house"},
        {"Authorization": "Bearer \xff\xfe".encode("latin-1")},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/openapi.json", "/no-such-route"])
def test_without_a_key_nothing_is_revealed(keys: Path, path: str, headers: Any) -> None:
    with client(Policy(Keys(keys, print))) as asker:
        answer = asker.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_health_and_the_page_are_open_and_anthropics_errors_have_its_shape(keys: Path) -> None:
    with client(Policy(Keys(keys, print))) as asker:
        assert asker.get("/health").status_code == 503  # nothing was loaded
        assert asker.get("/").status_code == 200
        error = asker.post("/v1/messages", json={}).json()
        assert (error["type"], error["error"]["type"]) == ("error", "authentication_error")


def test_a_changed_file_counts_at_once_and_one_that_cannot_be_read_does_not(keys: Path) -> None:
    log: list[str] = []
    known = Keys(keys, log.append)
    assert [known.name_of(key) for key in ("sk-ann-1", "sk-nameless", "sk-bob-2")] == ["ann", "key 4", "bob"]
    keys.with_name("new").write_text("eve: sk-eve-3\n", encoding="utf-8")
    keys.with_name("new").replace(keys)
    assert [known.name_of(key) for key in ("sk-ann-1", "sk-eve-3")] == [None, "eve"]
    assert "1 key" in log[-1]
    for damage in (b"", b"\xff\xfe", b"eve:\n"):
        keys.write_bytes(damage)
        assert known.name_of("sk-eve-3") == "eve"
        assert "keeping the old keys" in log.pop()
    keys.unlink()
    assert known.name_of("sk-eve-3") == "eve"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "contains no key"),
        ("# none\n", "contains no key"),
        ("ann: \n", "line 1 has no key"),
        ("a\nb: c d", "line 2"),
    ],
)
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        Keys(path, print)
    with pytest.raises(DiskError, match="cannot read"):
        Keys(tmp_path / "none.txt", print)


def test_prefix_caches_are_apart_for_each_key_when_asked_for(keys: Path) -> None:
    load = ScriptedLoader("Yes.")
    with client(Policy(Keys(keys, print)), load, prefix_cache_per_key=True) as asker:
        for key, salt in (("sk-ann-1", ""), ("sk-ann-1", "x"), ("sk-bob-2", "x"), ("sk-ann-1", "")):
            for stream in (False, True):
                body = {**asking(stream), "cache_salt": salt}
                assert asker.post(CHAT, json=body, headers={"X-Api-Key": key}).status_code == 200
        salts = [request.cache_salt for request in load.engines[0].requests[1:]]  # the first is the warm-up
    assert salts == [salt for salt in ("ann\n", "ann\nx", "bob\nx", "ann\n") for _ in range(2)]


# --- hosts and web pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:1234", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("192.168.1.7", 200),
        ("box.local", 200),
        ("BOX.local.:80", 200),
        ("a.localhost", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example@box.local", 200),
        ("box.local@evil.example", 403),
        ("", 403),
        ("[", 403),
        ("[::1", 403),
        ("a]b", 403),
        ("localhost\xff".encode("latin-1"), 403),
    ],
    ids=str,
)
def test_a_name_that_was_rebound_to_this_address_is_refused(host: Any, status: int) -> None:
    with client(Policy(hosts=frozenset({"box.local"}))) as asker:
        assert asker.get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8080", 200),
        ("http://localhost:9090", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("", 403),
        ("https://good.example", 200),
    ],
)
def test_web_pages_of_other_sites_are_refused(origin: str, status: int) -> None:
    with client(Policy(origins=frozenset({"https://good.example"}))) as asker:
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/model/unload")):
            answer = asker.request(method, path, headers={"Origin": origin})
            assert answer.status_code == status
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (origin if origin == "https://good.example" else None)


def test_a_refusal_names_the_option_of_the_server_that_would_allow_it() -> None:
    log: list[str] = []
    with client(Policy(), note=log.append) as asker:
        answers = [asker.get("/v1/models", headers={name: "https://x.example"}) for name in ("Host", "Origin")]
    said = [
        "host 'https://x.example' is not allowed; the server's {} option allows it",
        "web pages of 'https://x.example' are not allowed; the server's {} option allows them",
    ]
    bare = [text.format(name) for text, name in zip(said, ("allow_host", "cors_origin"), strict=True)]
    assert [answer.json()["error"]["message"] for answer in answers] == bare
    spelled = [text.format(name) for text, name in zip(said, ("--allow-host", "--cors-origin"), strict=True)]
    assert [flags(line).partition(" s: ")[2] for line in log] == spelled


def test_a_preflight_needs_no_key_and_is_answered_only_where_pages_may_ask(keys: Path) -> None:
    asked = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    with client(Policy(Keys(keys, print), origins=frozenset({"https://good.example"}))) as asker:
        answer = asker.options(CHAT, headers=asked)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert asker.options(CHAT, headers={**asked, "Origin": "https://evil.example"}).status_code == 400
    with client(Policy()) as asker:
        answer = asker.options(CHAT, headers=asked)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b'{"prompt": "x"}', {"Content-Type": "text/plain"}, 415, "not_json"),
        (b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "not_json"),
        (b'{"prompt": "x"}', {}, 415, "not_json"),
        (b'{"prompt": "x"', JSON, 400, "invalid_json"),
        (b"\xff\xfe{}", JSON, 400, "invalid_json"),
        (b"[1, 2]", JSON, 400, "invalid_json"),
        (b"", JSON, 400, "invalid_json"),
        (b" " * 4097, JSON, 413, "body_too_large"),
        (b"{}", {**JSON, "Content-Length": "99999"}, 413, "body_too_large"),
        (b'{"prompt": 5}', {"Content-Type": "application/json; charset=utf-8"}, 400, "invalid_value"),
    ],
    ids=str,
)
def test_a_body_that_is_refused(
    anyone: TestClient, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = anyone.post("/v1/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_in_parts_is_measured_as_it_comes(anyone: TestClient) -> None:
    answer = anyone.post("/v1/completions", content=iter([b" " * 1000] * 5), headers=JSON)
    assert answer.status_code == 413
    whole = anyone.post("/v1/completions", content=iter([b'{"prompt"', b': "x"}']), headers=JSON)
    assert whole.status_code == 200


@pytest.mark.parametrize("path", ["/v1/token/encode", "/v1/token/decode", "/v1/model/load"])
def test_broken_bodies_of_other_routes_are_a_400_too(anyone: TestClient, path: str) -> None:
    for body in (b"{", b"[]", b"", b"\xff", b'{"tokens": "x", "text": 4}'):
        answer = anyone.post(path, content=body, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body
