"""The choice between exl's and exllamav2's kernels, by time per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from exl_cli.engines.exllamav2 import kernel_choice


class Times:
    """Microseconds by kind, in place of a GPU: ours, or None for what was too small to measure, and exllamav2's."""

    def __init__(self, times: dict[str, tuple[float | None, float]]) -> None:
        self._times = times
        self.asked: list[tuple[str, int]] = []

    def microseconds(self, product: Any, rows: int) -> float | None:
        assert rows == 1
        return self._times[product.kind][0]

    def original(self, product: Any, make: Callable[[], Sequence[Callable[[], None]]]) -> float:
        self.asked.append((product.kind, len(make())))
        return self._times[product.kind][1]


def groups(*kinds: str) -> list[Any]:
    return [SimpleNamespace(product=SimpleNamespace(kind=kind), original=lambda: lambda: None) for kind in kinds]


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ({"layer": (10.0, 20.0), "head": (50.0, 40.0)}, ""),
        ({"layer": (10.0, 9.0), "head": (50.0, 52.0)}, ""),
        ({"layer": (10.0, 9.0), "head": (50.0, 51.0)}, "its kernels take 69 microseconds per token here, exl's 70"),
        ({"layer": (None, 1.0), "head": (50.0, 60.0)}, ""),
        ({"layer": (None, 1.0), "head": (None, 1.0)}, ""),
    ],
)
def test_the_sum_over_all_layers_decides(times: dict[str, tuple[float | None, float]], reason: str) -> None:
    tuner: Any = Times(times)
    assert kernel_choice.why_not(tuner, groups("layer", "layer", "head"), lambda: None) == reason
    measured = {kind: count for kind, count in (("layer", 2), ("head", 1)) if times[kind][0] is not None}
    assert dict(tuner.asked) == measured
