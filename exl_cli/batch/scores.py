"""Scores a batch job's answers against a field of its input.

The interval of a share is Wilson's (1927, "Probable inference, the law of succession, and statistical inference"), at
95 %: unlike the usual one it makes sense for few answers and for shares near 0 and 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl_cli.batch.output import key_of
from exl_cli.batch.prompts import text_of
from exl_cli.batch.rows import Source
from exl_cli.errors import UsageError, brief, param

# The normal distribution's 97.5 % quantile.
_Z = 1.959963984540054
_FENCE = re.compile(r"\s*```[a-z]*\n(.*?)\n?```\s*", re.DOTALL)


@dataclass
class Score:
    """How many answers are right.

    Attributes:
        metric: "exact", "regex" or "json".
        right, count: of so many answers.
    """

    metric: str
    right: int = 0
    count: int = 0

    @property
    def share(self) -> float:
        """The part that is right."""
        return self.right / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Within which the share of all such answers is, with a confidence of 95 %."""
        return wilson(self.right, self.count)


@dataclass(frozen=True)
class Scores:
    """Scores, and what has none.

    Attributes:
        scores: one for each metric.
        failed: lines with an error for an answer.
        unscored: answers to lines without the field, or with one that the metrics cannot use.
    """

    scores: Sequence[Score]
    failed: int
    unscored: int


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share at 95 %; 0 to 1 for no answers."""
    if count == 0:
        return 0.0, 1.0
    share, square = right / count, _Z * _Z
    middle = share + square / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def _is_exact(expected: Any, text: str) -> bool:
    return text.strip() == text_of(expected).strip()


def _is_match(expected: Any, text: str) -> bool:
    return re.search(text_of(expected), text) is not None


def _is_json(expected: Any, text: str) -> bool:
    """Whether a text, perhaps in a fenced block of Markdown, is JSON of that value."""
    if isinstance(expected, str):
        expected = json.loads(expected)
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return _same(expected, value)


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, but neither is true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


METRICS: dict[str, Callable[[Any, str], bool]] = {"exact": _is_exact, "regex": _is_match, "json": _is_json}


def score(source: Source, output: Path, field: str, metrics: Sequence[str]) -> Scores:
    """Score the answers in a file; of several answers to a line the first.

    The expected values are in memory at once.

    Args:
        source: the input, read again.
        output: the answers.
        field: of a row, or of the `metadata` of its body, with what is expected.
        metrics: keys of `METRICS`.

    Raises:
        UsageError: no row has the field.
        DiskError: the input cannot be read.
    """
    expected: dict[int, Any] = {}
    for row in source:
        value = row.record.get(field, _metadata(row.record).get(field))
        if value is not None and row.key not in expected:
            expected[row.key] = value
    if not expected:
        raise UsageError(f"no line of {brief(source.name)} has a field {field!r}", f"give another to {param('eval')}")
    scores, failed, unscored = [Score(metric) for metric in metrics], 0, 0
    with output.open("rb") as file:
        for line in file:
            answer = json.loads(line)
            if answer["error"] is not None:
                failed += 1
                continue
            value, text = expected.get(key_of(line)), _text(answer)
            if value is None:
                unscored += 1
                continue
            try:
                results = [METRICS[score.metric](value, text) for score in scores]
            except (re.error, ValueError, RecursionError):  # of what is expected
                unscored += 1
                continue
            for item, is_right in zip(scores, results, strict=True):
                item.count += 1
                item.right += is_right
    return Scores(scores, failed, unscored)


def _metadata(record: Mapping[str, Any]) -> Mapping[str, Any]:
    body = record.get("body")
    metadata = body.get("metadata") if isinstance(body, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _text(answer: Mapping[str, Any]) -> str:
    """The first text of an answer."""
    if "response" not in answer:
        return str(answer["text"] if "text" in answer else answer["texts"][0])
    choice = answer["response"]["body"]["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])
