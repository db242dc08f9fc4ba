"""Stop strings, limits, cancellation and timings, for all engines."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from helpers import collect, respond
from hypothesis import given
from hypothesis import strategies as st

from exl_cli.engines.base import Request
from exl_cli.engines.response import Step, StopScanner, check_fits
from exl_cli.errors import PromptError
from exl_cli.sampling import Sampling


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    scanner = StopScanner(("END", "\n\n"))
    assert scanner.push("hello E") == ("hello ", False)
    assert scanner.push("asy") == ("Easy", False)
    assert scanner.push(" EN") == (" ", False)
    assert scanner.push("D of it") == ("", True)


class Letters:
    """A decoder for which token 0 is "a", 1 is "b" and so on, and the last two of 26 are special."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id) if token_id < 24 else ""

    def special(self, token_id: int) -> str:
        return {24: "<end>", 25: "<pad>"}.get(token_id, "")


def request(tokens: int = 100, **more: object) -> Request:
    return Request([1, 2, 3], Sampling(), tokens, 0, **more)  # type: ignore[arg-type]


def alphabet(closed: list[bool], group: int = 1) -> Generator[Step, None, None]:
    try:
        yield Step()
        yield Step(prompt_seconds=0.25, reused_tokens=2)
        for start in range(0, 26, group):
            yield Step(tuple(range(start, min(start + group, 26))))
    finally:
        closed.append(True)


@pytest.mark.parametrize("group", [1, 4])
def test_limits_and_stops_cut_even_inside_a_step(group: int) -> None:
    closed: list[bool] = []

    def run(**options: object) -> tuple[str, list[int], str]:
        text, ids, summary = collect(respond(request(**options), Letters(), 1000, alphabet(closed, group)))
        assert summary.new_tokens == len(ids)
        assert closed.pop()
        return text, ids, summary.finish_reason

    assert run(tokens=6) == ("abcdef", [0, 1, 2, 3, 4, 5], "length")
    assert run(stop_ids=frozenset({5})) == ("abcde", [0, 1, 2, 3, 4, 5], "stop")
    assert run(stop_strings=("ef",)) == ("abcd", [0, 1, 2, 3, 4, 5], "stop")
    assert run(tokens=5, stop_strings=("ef",)) == ("abcde", [0, 1, 2, 3, 4], "length")


def test_the_context_limits_prompt_and_response_together() -> None:
    text, _, summary = collect(respond(request(), Letters(), 7, alphabet([])))
    assert (text, summary.finish_reason) == ("abcd", "length")


def test_the_summary_counts_reused_tokens_apart() -> None:
    summary = collect(respond(request(tokens=2), Letters(), 1000, alphabet([])))[2]
    assert (summary.prompt_tokens, summary.reused_tokens, summary.prompt_seconds) == (3, 2, 0.25)
    assert summary.prompt_rate == 4.0


def test_closing_the_stream_closes_the_job() -> None:
    closed: list[bool] = []
    stream = respond(request(), Letters(), 1000, alphabet(closed))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert closed == [True]


@pytest.mark.parametrize(
    ("tokens", "most", "words"),
    [
        (0, 100, "empty"),
        (100, 100, "100 tokens, but the context holds 100, including the response; shorten the prompt$"),
        (100, 4096, "; shorten the prompt, or raise max_seq_len, up to 4,096$"),
        (100, None, "; shorten the prompt$"),
    ],
)
def test_prompts_that_do_not_fit(tokens: int, most: int | None, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        check_fits(tokens, 100, most)


@pytest.mark.parametrize("group", [1, 4, 26])
@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<end>", "abcdefghijklmnopqrstuvwx", 25),
        ("x<end>", "abcdefghijklmnopqrstuvw", 25),
        ("<end><pad>", "abcdefghijklmnopqrstuvwx", 26),
        ("d><p", "abcdefghijklmnopqrstuvwx", 26),
    ],
)
def test_a_stop_string_may_hold_special_tokens(stop: str, text: str, count: int, group: int) -> None:
    steps = alphabet([], group)
    out, ids, summary = collect(respond(request(stop_strings=(stop,)), Letters(), 1000, steps))
    assert (out, len(ids), summary.finish_reason) == (text, count, "stop")


@pytest.mark.parametrize("group", [1, 4, 26])
def test_special_tokens_are_hidden_and_end_their_chunks(group: int) -> None:
    chunks = [*respond(request(stop_strings=("x<pad>",)), Letters(), 1000, alphabet([], group))]
    out, ids, summary = collect(chunks)
    assert (out, len(ids), summary.finish_reason) == ("abcdefghijklmnopqrstuvwx", 26, "length")
    assert {24, 25} <= {chunk.token_ids[-1] for chunk in chunks if chunk.token_ids}


WORDS = {0: "a", 1: "b", 2: "ab", 3: "ba", 4: "", 5: "", 6: "", 7: "é"}  # 6 is the first half of é


class Words:
    """A decoder of a few tokens, two of them special."""

    def push(self, token_id: int) -> str:
        return WORDS[token_id]

    def special(self, token_id: int) -> str:
        return {4: "<s>", 5: "</s>"}.get(token_id, "")


@given(
    ids=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    stops=st.lists(st.lists(st.sampled_from(["a", "b", "é", "<s>", "</s>", "s>", "<"]), max_size=3), max_size=4),
    stop_ids=st.sets(st.integers(0, 7), max_size=2),
    group=st.integers(1, 5),
)
def test_stops_begin_anywhere_and_are_met_at_the_first_token_that_completes_one(
    ids: list[int], stops: list[list[str]], stop_ids: set[int], group: int
) -> None:
    """Inside a token, across special ones, overlapping each other, several tokens a step as in speculation."""
    strings = tuple("".join(parts) for parts in stops)
    text, shown, count, reason = "", "", 0, "length"
    for token in ids:
        count += 1
        if token in stop_ids:
            reason = "stop"
            break
        text += WORDS[token]
        shown += WORDS[token]
        if not any(stop and stop in text for stop in strings):
            name = Words().special(token)
            text, shown = text + name, shown + "\0" * len(name)
        if places := [text.index(stop) for stop in strings if stop and stop in text]:
            shown, reason = shown[: min(places)], "stop"
            break
    steps = (Step(tuple(ids[at : at + group])) for at in range(0, len(ids), group))
    asked = request(len(ids), stop_strings=strings, stop_ids=frozenset(stop_ids))
    out, taken, summary = collect(respond(asked, Words(), 1000, steps))
    assert (out, len(taken), summary.finish_reason) == (shown.replace("\0", ""), count, reason)
