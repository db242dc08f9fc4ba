"""Scores a batch job's answers against a field of its input.

Confidence intervals are Wilson score intervals (1927, "Probable inference, the law of succession, and statistical
inference") at 95 %. Unlike the normal approximation they hold for few answers and for shares near 0 and 1.
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
    """How many answers are right by a metric ("exact", "regex" or "json"): `right` out of `count`."""

    metric: str
    right: int = 0
    count: int = 0

    @property
    def share(self) -> float:
        """Fraction of right answers; 0 if there are none."""
        return self.right / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share."""
        return wilson(self.right, self.count)


@dataclass(frozen=True)
class Scores:
    """The scores of an output.

    Attributes:
        scores: one per metric.
        failed: lines with an error instead of an answer.
        unscored: answers whose input has no expected value, or one that a metric cannot use.
    """

    scores: Sequence[Score]
    failed: int
    unscored: int


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson score interval at 95 %; (0, 1) without answers."""
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
    """Whether a text, perhaps in a fenced Markdown block, is JSON equal to the expected value."""
    if isinstance(expected, str):
        expected = json.loads(expected)
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return _same(expected, value)


def _same(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal. 1 equals 1.0, but, unlike in Python, not true."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


METRICS: dict[str, Callable[[Any, str], bool]] = {"exact": _is_exact, "regex": _is_match, "json": _is_json}


def score(source: Source, output: Path, field: str, metrics: Sequence[str]) -> Scores:
    """Score the answers in a file, the first choice of each. All expected values are held in memory.

    Args:
        source: the input, opened again.
        output: the answers.
        field: field of a row, or of its body's `metadata`, with the expected value.
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
        raise UsageError(
            f"no line of {brief(source.name)} has a field {field!r}", f"name another one with {param('eval')}"
        )
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
            except (re.error, ValueError, RecursionError):  # the expected value is no regex, or no JSON
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
