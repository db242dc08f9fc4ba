"""The chat loop, driven by lines and signals without a terminal."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chatting import FAIL, PAUSE, Script

from exl_cli.chat.conversation import Conversation
from exl_cli.chat.model import ModelLoader
from exl_cli.chat.session import Session, SessionStore, Turn
from exl_cli.chat.settings import Settings
from exl_cli.errors import ExitCode
from exl_cli.models.load_options import LoadOptions
from exl_cli.ui.chat import ChatConsole

Begin = Callable[..., Conversation]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    def make(
        script: Script, session: Session | None = None, context: int | None = None, **settings: object
    ) -> Conversation:
        console = ChatConsole()
        loader = ModelLoader(script.load, LoadOptions(max_seq_len=context), tmp_path / "models", console)
        store = SessionStore(tmp_path / "sessions")
        values = Settings(**settings)  # type: ignore[arg-type]
        model = loader.find(None)
        loader.load(model)
        return Conversation(model, session or Session(), values, loader, console, store)

    return make


class Typist:
    """Enters these lines, and remembers the drafts that it was shown."""

    def __init__(self, *events: str) -> None:
        self._events: Iterator[str] = iter(events)
        self.drafts: list[str] = []

    def read(self, draft: str) -> str | None:
        self.drafts.append(draft)
        event = next(self._events, None)
        if event == "^C":
            raise KeyboardInterrupt
        return event


def contents(chat: Conversation) -> list[str]:
    return [turn.content for turn in chat.session.turns]


def on_disk(tmp_path: Path) -> list[str]:
    (file,) = (tmp_path / "sessions").glob("*.json")
    return [turn["content"] for turn in json.loads(file.read_text())["turns"]]


_HANDLER = signal.getsignal(signal.SIGINT)


def press_ctrl_c() -> None:
    """As on a terminal, where the main thread gets it; it may not have begun to wait for the answer yet."""
    give_up = time.monotonic() + 30
    while signal.getsignal(signal.SIGINT) is _HANDLER:
        assert time.monotonic() < give_up
    os.kill(os.getpid(), signal.SIGINT)


def test_special_tokens_in_messages_are_text_in_every_later_prompt(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(["One.", "Two."])
    chat = begin(script)
    chat.enter("hi<|im_end|>")
    chat.enter("and then?")
    end = 2  # <|im_end|>
    assert [list(request.ids).count(end) for request in script.requests] == [1, 3]
    assert contents(chat)[0] == "hi<|im_end|>"
    chat.enter("/show prompt")
    output = capsys.readouterr()
    assert output.err.count("<|im_end|> in the message is treated as text") == 1
    assert "hi<|im_end|><|im_end|>" in output.out + output.err


def test_special_tokens_in_answers_and_the_system_message_are_text_too(
    begin: Begin, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where an answer comes from a session's file, and is tokenized from its text."""
    script = Script(["Two."])
    turns = [Turn("user", "Which?"), Turn("assistant", "Type <|im_end|> to end.")]
    chat = begin(script, Session(system="Never say <|im_start|>.", turns=turns))
    chat.enter("And?")
    start, end = 1, 2
    assert [list(script.requests[0].ids).count(id_) for id_ in (start, end)] == [5, 4]
    chat.enter("/system No <|im_end|>.")
    assert "<|im_end|> in the system message is treated as text" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_hints_and_leaves_at_the_second(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    chat = begin(Script(["a"]))
    chat.interrupt()
    assert "press Ctrl-C again" in capsys.readouterr().err
    chat.enter("Hi")
    chat.interrupt()
    assert not chat.over
    chat.interrupt()
    assert (chat.over, chat.exit_code) == (True, ExitCode.OK)


def test_ctrl_c_while_answering_keeps_the_partial_answer(begin: Begin, tmp_path: Path) -> None:
    script = Script([f"Once upon{PAUSE} a time", "Then what?", " the end"], pause=press_ctrl_c)
    chat = begin(script)
    chat.enter("Hi")
    assert contents(chat) == on_disk(tmp_path) == ["Hi", "Once upon"]
    assert chat.session.turns[1].finish_reason == "cancelled"
    chat.enter("Go on")
    assert contents(chat)[2:] == ["Go on", "Then what?"]
    # What was computed of the interrupted answer is not computed again.
    assert chat.session.turns[3].timings["reused_tokens"] >= len(script.requests[0].ids)


def test_a_second_ctrl_c_while_answering_keeps_it_too(begin: Begin, tmp_path: Path) -> None:
    chat = begin(Script([f"Once{PAUSE}"], pause=press_ctrl_c, cancelled=press_ctrl_c))
    chat.run(Typist("Hi", "/continue").read)
    assert on_disk(tmp_path)[:2] == ["Hi", "OnceOnce"]


def test_a_chat_that_is_left_without_a_model_ends_with_that_error(begin: Begin, tmp_path: Path) -> None:
    script = Script(["Hello."])
    chat = begin(script)
    chat.enter("Hi")
    script.loads_fail = ("fable-7m",)
    chat.enter("/model fable-7m")
    assert (chat.over, chat.exit_code) == (True, ExitCode.OUT_OF_MEMORY)
    assert on_disk(tmp_path) == ["Hi", "Hello."]


@pytest.mark.parametrize("answer", [PAUSE, FAIL])
def test_a_message_without_an_answer_becomes_the_draft(begin: Begin, tmp_path: Path, answer: str) -> None:
    chat = begin(Script([answer, "Hello."], pause=press_ctrl_c))
    typist = Typist("Hi", "Hi there")
    chat.run(typist.read)
    assert typist.drafts == ["", "Hi", ""]
    assert on_disk(tmp_path) == ["Hi there", "Hello."]


def test_a_refused_message_becomes_the_draft_with_its_files(begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    chat = begin(Script(["ok"]))
    large = "word " * 3000
    chat.enter(f"/file {tmp_path / 'notes.txt'}")
    chat.enter(large)
    assert chat.draft == large.rstrip()
    assert [name for name, _ in chat.attachments] == ["notes.txt"]
    chat.enter("short")
    assert contents(chat)[0].startswith("notes.txt:\n\n```\nnotes\n```\n\nshort")


def test_the_message_is_safe_while_the_answer_is_made(begin: Begin, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    script = Script(["a", "b"], before=lambda request: seen.append(on_disk(tmp_path)))
    chat = begin(script)
    chat.enter("one")
    chat.enter("/retry")
    # While an answer is regenerated, the file still has the old one.
    assert seen == [["one"], ["one", "a"]]
    # And a file that ends with a message gives it back.
    session = chat.store.load(chat.session.name)
    session.cut(1)
    assert begin(script, session).draft == "one"


def test_an_unsaved_conversation_is_left_only_on_a_second_word(
    begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sessions").write_text("in the way")
    script = Script(["a"])
    chat = begin(script)
    chat.run(Typist("Hi").read)
    assert (chat.over, chat.exit_code) == (True, ExitCode.DISK)
    chat = begin(script)
    chat.enter("Hi")
    chat.enter(None)
    assert not chat.over
    assert capsys.readouterr().err.count("exit again to discard it") == 2
    (tmp_path / "sessions").unlink()
    chat.enter("/quit")
    assert (chat.over, chat.exit_code, on_disk(tmp_path)) == (True, ExitCode.OK, ["Hi", "a"])


def test_edit_opens_the_editor_on_the_last_message(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    editor = tmp_path / "my editor"
    editor.write_text('#!/bin/sh\ntest "$1" = -w && sed -i s/Hi/Hello/ "$2"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv("VISUAL", f"'{editor}' -w")
    chat = begin(Script(["one", "two"]))
    for line in ("Hi there", "/edit", "/edit"):
        chat.enter(line)
    assert contents(chat) == ["Hello there", "two"]
    monkeypatch.delenv("VISUAL")
    chat.enter("/edit")
    monkeypatch.setenv("EDITOR", "/no/such/editor")
    chat.enter("/edit")
    shown = capsys.readouterr().err
    assert "message unchanged" in shown
    assert "\n>>> Hello there\n" in shown
    assert "error: the editor false exited with status 1" in shown
    assert "error: cannot start the editor /no/such/editor" in shown
    assert contents(chat) == ["Hello there", "two"]


def test_a_revision_without_an_answer_keeps_the_old_exchange(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "sed -i s/Hi/Hello/")
    chat = begin(Script(["", FAIL]))
    chat.enter("Hi")
    chat.enter("/edit")
    # An answer of nothing is one if the model means it.
    assert (contents(chat), chat.draft) == (["Hi", ""], "Hello")


def test_a_model_that_spells_otherwise_than_the_tokenizer_is_reused_all_the_same(begin: Begin) -> None:
    script = Script(["Once upon a time.", "The end."], spelled=True)
    chat = begin(script)
    for message in ("Tell me a story", "And?", "And?"):
        chat.enter(message)
    held: list[int] = []
    for request, turn in zip(script.requests, chat.session.turns[1::2], strict=True):
        assert list(request.ids[: len(held)]) == held
        assert turn.timings["reused_tokens"] >= len(held)
        tokenizer = chat.model.tokenizer
        held = [
            *request.ids,
            *(id_ for char in turn.content for id_ in tokenizer.encode(char, add_special_tokens=False)),
        ]


def test_a_stop_string_leaves_only_what_was_kept_in_the_next_prompt(begin: Begin) -> None:
    script = Script(["One. Two. Three."])
    chat = begin(script, stop=("Two",))
    chat.enter("Count")
    chat.enter("More")
    assert contents(chat)[1] == "One. "
    tokenizer = chat.model.tokenizer
    assert "One.\n" in tokenizer.decode(script.requests[1].ids).replace("One. \n", "One.\n")
    assert "Tw" not in tokenizer.decode(script.requests[1].ids)


def test_forty_turns_trim_the_prompt_and_leak_nothing(begin: Begin, tmp_path: Path) -> None:
    script = Script(["A short answer.", "A somewhat longer answer, of more words than the other has. " * 3])
    context = 512
    chat = begin(script, context=context)
    for turn in range(40):
        if turn == 25:
            tracemalloc.start()
        chat.enter(f"Question {turn}, which asks for something.")
        script.requests[:-1] = [None] * (len(script.requests) - 1)  # type: ignore[list-item]
        script.engines[0].requests.clear()
        assert len(script.requests[-1].ids) <= context * 3 // 4
        known = chat.model.encoder.known
        assert len(known.ids) <= context
        assert len(known.marks) <= 2 + 2 * len(chat.session.turns[chat.session.dropped :])
    gc.collect()
    growth = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    session = chat.session
    assert len(on_disk(tmp_path)) == len(session.turns) == 80
    reused = [turn.timings["reused_tokens"] / turn.timings["prompt_tokens"] for turn in session.turns[3::2]]
    # Only the few answers after a trim recompute the prompt.
    assert sum(share < 0.5 for share in reused) < 14
    assert session.dropped > 55
    # Fifteen exchanges of text and numbers, and nothing else.
    assert growth < 120_000


def test_a_turn_of_many_megabytes_is_dropped_without_taking_gigabytes(begin: Begin) -> None:
    turns = [Turn("user", "a fox and " * 800_000), Turn("assistant", "ok")]
    script = Script(["Yes."])
    chat = begin(script, Session(turns=turns))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chat.enter("Hi")
    assert contents(chat)[-1] == "Yes."
    assert len(script.requests[0].ids) < 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
