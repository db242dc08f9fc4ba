"""One at a time: two downloads of one model wait for each other, and nothing is removed while it is being fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from exl_cli.errors import DiskError
from exl_cli.models.hub.store import explained

_LOCKS = ".exl-locks"


@contextlib.contextmanager
def lock(folder: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Be the only one at work on a folder.

    Args:
        folder: the model's; the lock lies beside it, so that the folder can be removed under it.
        waiting: called once if another is at work, before waiting for it; None to give up instead.

    Raises:
        DiskError: another is at work and `waiting` is None, or the lock cannot be made.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path = folder.parent / _LOCKS / f"{folder.name}.lock"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with explained(path):
            try:
                # The shortest wait that it accepts.
                stack.enter_context(WeakFileLock(path, timeout=0.01))
            except TimeoutError:
                if waiting is None:
                    raise DiskError(f"another exl is at work on {folder}", "let it finish, or stop it") from None
                waiting()
                stack.enter_context(WeakFileLock(path))
        yield
