"""Calls in child processes always end in an answer, whatever the child does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from exl_cli.errors import EngineError, param
from exl_cli.system import questions
from exl_cli.system.questions import Answer


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    threading.Event().wait()


def fail() -> None:
    raise ValueError("first line\nwhat is wrong")


def refuse() -> None:
    raise EngineError(f"too bad: {param('jobs')}", "do better")


def leave() -> None:
    sys.stdout.write("no answer\n")
    sys.stdout.flush()
    os._exit(0)


def echo(**given: object) -> dict[str, object]:
    sys.stdout.write("a library says something\n")
    return {"given": given}


def ask(name: str, seconds: float = 60.0, **arguments: object) -> Answer:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        return questions.ask("test_questions", name, seconds, arguments)
    finally:
        sys.path.pop(0)


def test_a_result_arrives_whatever_libraries_print() -> None:
    answer = ask("echo", one=1)
    assert answer.value == {"given": {"one": 1}}
    assert answer.output == "a library says something\n"


@pytest.mark.parametrize(
    ("name", "kind", "problem", "failure"),
    [
        ("crash", "crash", "crashed (SIGSEGV)", "crashed (SIGSEGV)"),
        ("fail", "error", "what is wrong", "fails: what is wrong"),
        ("leave", "error", "exited without a result", "fails: exited without a result"),
        # A parameter stays marked, for the command line to spell.
        (
            "refuse",
            "error",
            f"exl_cli.errors.EngineError: too bad: {param('jobs')}; do better",
            f"fails: too bad: {param('jobs')}; do better",
        ),
    ],
)
def test_a_question_that_ends_badly_is_an_answer_too(name: str, kind: str, problem: str, failure: str) -> None:
    answer = ask(name)
    assert (answer.value, answer.kind, answer.problem, answer.failure) == (None, kind, problem, failure)


def test_a_question_that_hangs_is_ended() -> None:
    answer = ask("hang", 0.2)
    assert (answer.kind, answer.problem) == ("hang", "timed out after 0.2 s")


def imported() -> dict[str, object]:
    first = "colorsys" not in sys.modules
    __import__("colorsys")
    sys.stderr.write("imported\n")
    return {"first": first}


def test_a_process_answers_again_until_it_ends_badly() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        with questions.Respondent("test_questions") as respondent:
            said = [respondent.ask(name, 60.0) for name in ("imported", "imported", "crash", "imported")]
    finally:
        sys.path.pop(0)
    assert [answer.value for answer in said] == [{"first": True}, {"first": False}, None, {"first": True}]
    assert [answer.output for answer in said] == ["imported\n", "imported\n", "", "imported\n"]


if __name__ == "__main__":
    questions.answer(globals())
