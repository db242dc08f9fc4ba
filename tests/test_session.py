"""Chat sessions: trimming, and the session file."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_cli.chat.session import Session, SessionStore, Turn, dumps, loads
from exl_cli.chat.settings import Settings, from_dict
from exl_cli.errors import DiskError, UsageError


def talk(*texts: str) -> Session:
    """A session of these turns, the user's first."""
    turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return Session(turns=turns)


# --- dropping ------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40).filter(lambda sizes: len(sizes) % 2 == 1),
    limit=st.integers(20, 400),
    share=st.floats(0.3, 1.0),
)
def test_trimming_drops_the_fewest_oldest_exchanges_that_make_room(sizes: list[int], limit: int, share: float) -> None:
    session = talk(*(str(size) for size in sizes))
    goal = int(limit * share)

    def size(start: int) -> int:
        return sum(sizes[start:])

    gone = session.trim(size, limit, goal)
    assert len(session.turns) == len(sizes)
    assert gone == session.turns[: session.dropped]
    assert session.dropped % 2 == 0
    if size(0) <= limit:
        assert gone == []
        return
    last = len(sizes) - 1
    fewest = next((start for start in range(2, last + 1, 2) if size(start) <= goal), last)
    assert session.dropped == fewest


def test_trimming_resumes_and_cutting_restores_turns() -> None:
    session = talk(*"abcdefg")
    assert [turn.content for turn in session.trim(lambda start: 7 - start, 5, 5)] == ["a", "b"]
    assert [turn.content for turn in session.trim(lambda start: 7 - start, 3, 3)] == ["c", "d"]
    assert [message["content"] for message in session.messages()] == ["e", "f", "g"]
    assert [turn.content for turn in session.cut(4)] == ["e", "f", "g"]
    assert [message["content"] for message in session.messages()] == ["c", "d"]
    session.cut(0)
    assert (session.dropped, session.messages()) == (0, [])


def test_messages_hold_the_system_message_and_reasoning_under_the_name_templates_know() -> None:
    session = talk("a", "b", "c", "d")
    session.system, session.dropped = "S", 2
    session.turns[3].reasoning = "hm"
    assert session.messages() == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "hm"},
    ]


# --- the file ------------------------------------------------------------------------------------------------------

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(
    texts=st.lists(st.tuples(_text, _text), max_size=6),
    system=st.none() | _text,
    settings=st.dictionaries(
        _text.map("later {}".format), st.none() | st.booleans() | st.integers() | _text, max_size=3
    ),
)
def test_a_session_round_trips(texts: list[tuple[str, str]], system: str | None, settings: dict[str, object]) -> None:
    session = talk(*(text for pair in texts for text in pair))
    session.system, session.settings, session.name, session.model = system, settings, "x", "m"
    if session.turns:
        session.turns[-1].timings = {"prompt_tokens": 3, "prompt_seconds": 0.25}
        session.turns[-1].reasoning, session.turns[-1].raw = "r", "<think>r</think>"
        session.dropped = 2 * (len(texts) // 2)
    assert loads(dumps(session), "x", "x.json") == session


def test_fields_and_settings_of_a_later_minor_version_are_passed_over() -> None:
    value = json.loads(dumps(talk("a", "b")))
    value["mood"] = "good"
    value["turns"][0]["language"] = "en"
    value["settings"] = {
        "given": {"temperature": 10**400},
        "preset": "of tomorrow",
        "on_overflow": "grow",
        "stop": ["END"],
        "mood": 1,
    }
    session = loads(json.dumps(value), "x", "x.json")
    assert [turn.content for turn in session.turns] == ["a", "b"]
    assert from_dict(session.settings) == Settings(stop=("END",))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"turns": None}, "it has no list of turns"),
        ({"turns": ["a"]}, "turn 1 is not an object"),
        ({"turns": [{"role": "user"}]}, "turn 1 has no role or no content"),
        ({"turns": [{"role": "user", "content": 7}]}, "content of turn 1 is 7"),
        ({"turns": [{"role": "assistant", "content": "a"}]}, "turn 1 has the role 'assistant'"),
        ({"turns": [{"role": "user", "content": "a", "timings": []}]}, "timings of turn 1"),
        ({"dropped": 1}, "dropped is 1"),
        ({"dropped": 99}, "dropped is 99"),
        ({"system": 5}, "system of the session is 5"),
        ({"totals": {"answers": "many"}}, "answers of totals is 'many'"),
        ({"totals": {"prompt_tokens": 10**400}}, "prompt_tokens of totals is 1000"),
        ({"totals": {"prompt_seconds": float("nan")}}, "prompt_seconds of totals is nan"),
        ({"version": "1"}, "its version is '1'"),
        ({"version": None}, "its version is None"),
        ({"system": "\ud800"}, "it contains a lone surrogate, U+D800"),
        ({"settings": {"stop": None}}, "stop of the settings is null"),
        ({"settings": {"stop": 5}}, "stop of the settings is 5"),
        ({"settings": {"stop": "END"}}, 'stop of the settings is "END"'),
        ({"settings": {"stop": ["a", 1]}}, 'stop of the settings is ["a", 1]'),
        ({"settings": {"given": []}}, "given of the settings is []"),
        ({"settings": {"max_new_tokens": "9"}}, 'max_new_tokens of the settings is "9"'),
        ({"settings": {"seed": True}}, "seed of the settings is true"),
    ],
)
def test_a_damaged_file_is_explained(change: dict[str, object], why: str) -> None:
    value = {**json.loads(dumps(talk("a", "b"))), **change}
    with pytest.raises(DiskError, match="is damaged") as caught:
        loads(json.dumps(value), "x", "x.json")
    assert why in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000])
def test_what_is_not_json_is_damage_too(text: str) -> None:
    with pytest.raises(DiskError, match="invalid JSON"):
        loads(text, "x", "x.json")


# --- the folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", ".hidden", "a b", "x" * 81, "𠮷" * 61, "a\0"])
def test_names_that_could_leave_the_folder_or_hide_in_it_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="invalid session name"):
        SessionStore(tmp_path).load(name)


def test_a_session_is_named_after_the_day_and_its_first_words(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    names = []
    for text in ("How do I bake_bread, quickly?!  Please", "How do I bake bread quickly", "日本 …", "?!"):
        session = talk(text, "…")
        store.save(session)
        names.append(session.name[len("2026-11-22") :])
    assert names == ["-how-do-i-bake-bread", "-how-do-i-bake-bread-2", "-日本", ""]


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    session = talk("a", "b")
    session.name = "x"
    store.save(session)
    before = (tmp_path / "x.json").read_bytes()
    (tmp_path / "old").hardlink_to(tmp_path / "x.json")
    session.turns += talk("c" * 100_000, "d").turns
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskError, match="cannot save"):
            store.save(session)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "x.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old", "x.json"]
    store.save(session)
    assert len(store.load("x").turns) == 4
    # The new file took the old one's place; the old one was not written into.
    assert (tmp_path / "old").read_bytes() == before


def test_a_removed_file_is_rewritten_and_a_changed_one_is_not(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    session = talk("a", "b")
    session.name = "x"
    assert store.save(session) == ""
    (tmp_path / "x.json").unlink()
    assert store.save(session) == ""
    another = SessionStore(tmp_path)
    assert another.save(another.load("x")) == ""
    assert store.save(session) == "x"
    assert sorted(store.names()) == sorted(["x", session.name])


def test_concurrent_chats_do_not_overwrite_each_other_even_with_the_longest_name(tmp_path: Path) -> None:
    sessions = [talk(text, "…") for text in "ab"]
    for session in sessions:
        session.name = "x" * 80
    stores = [SessionStore(tmp_path) for _ in sessions]
    for _ in range(3):
        for store, session in zip(stores, sessions, strict=True):
            store.save(session)
    assert [SessionStore(tmp_path).load(session.name).turns[0].content for session in sessions] == ["a", "b"]
    assert len(SessionStore(tmp_path).names()) == 2


def test_overviews_include_unreadable_sessions(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    assert list(store.overviews()) == []
    (tmp_path / "bad.json").write_bytes(b"\xff")
    session = talk("a", "b")
    store.save(session)
    file = store.path(session.name)
    file.write_text(file.read_text(), "utf-8-sig")  # an editor may put a byte order mark there
    listed = {name: content for name, _, content in store.overviews()}
    assert listed.keys() == {"bad", session.name}
    assert isinstance(listed["bad"], str)
    assert listed[session.name] == session


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    store.save(Session(name="good", turns=[Turn("user", "hi")]))
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    (tmp_path / "lost.json").symlink_to(tmp_path / "nothing")
    for name in ("pipe", "zeros"):
        with pytest.raises(DiskError, match="it is a device or a pipe"):
            store.load(name)
    listed = {name: session for name, _, session in store.overviews()}
    assert listed.keys() == {"good", "pipe", "zeros"}
    assert isinstance(listed["good"], Session)


def test_a_file_larger_than_any_session_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DiskError, match="larger than 1024 MiB"):
        SessionStore(tmp_path).load("huge")
