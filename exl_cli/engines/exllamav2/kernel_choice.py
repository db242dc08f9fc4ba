"""Whether products of our own are faster than exllamav2's on this GPU: measured once for each shape, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from exl_cli.engines.exllamav2.kernels.tuning import Tuner
from exl_cli.engines.exllamav2.layers import Group


def why_not(tuner: Tuner, groups: Sequence[Group], prepare: Callable[[], None]) -> str:
    """Why exllamav2's kernels are the better choice for a model, in a few words; empty where they are not.

    Args:
        tuner: has chosen the tile configs of all groups for a row.
        groups: the matrices of the model's layers and its head.
        prepare: has exllamav2 choose its own kernels for a row, if that is still to be done.
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
        # Matrices so small that none of it was measured do not matter.
        if (time := tuner.microseconds(product, 1)) is not None:
            ours += len(alike) * time
            theirs += len(alike) * tuner.original(product, partial(originals, alike))
    return f"its products take {theirs:.0f} microseconds a token here, ours {ours:.0f}" if ours > theirs else ""
