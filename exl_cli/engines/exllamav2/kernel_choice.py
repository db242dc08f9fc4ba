"""Choose between exl's and exllamav2's quantized matmul kernels, by timing both for each shape on this GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from exl_cli.engines.exllamav2.kernels.tuning import Tuner
from exl_cli.engines.exllamav2.layers import Group


def why_not(tuner: Tuner, groups: Sequence[Group], prepare: Callable[[], None]) -> str:
    """Why exllamav2's kernels are faster for a model at batch size 1; empty if they are not.

    Args:
        tuner: has chosen the tile configs of all groups for one row.
        groups: the matrices of the layers and the head.
        prepare: lets exllamav2 choose its own kernels for one row, if it has not yet.
    """
    kinds: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.product.kind, []).append(group)

    def originals(alike: Sequence[Group]) -> list[Callable[[], None]]:
        prepare()
        return [group.original() for group in alike]

    ours = theirs = 0.0
    for alike in kinds.values():
        product = alike[0].product
        # Matrices too small to be timed do not matter.
        if (time := tuner.microseconds(product, 1)) is not None:
            ours += len(alike) * time
            theirs += len(alike) * tuner.original(product, partial(originals, alike))
    return f"its kernels take {theirs:.0f} microseconds per token here, exl's {ours:.0f}" if ours > theirs else ""
