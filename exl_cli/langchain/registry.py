"""The engines that this process has loaded for LangChain: one for each model and load options, shared by its users."""

from __future__ import annotations

import contextlib
import threading
import weakref
from pathlib import Path

from exl_cli.api import model as api
from exl_cli.api.engine_thread import in_engine_thread
from exl_cli.models.info import ModelInfo
from exl_cli.models.load_options import LoadOptions

_Key = tuple[Path, LoadOptions]


class Loaded:
    """A loaded model and how many use it. Closed when that number falls to 0, or when the last reference goes.

    Attributes:
        model: the model.
        users: how often it was acquired and not yet released.
    """

    def __init__(self, model: api.Model) -> None:
        self.model = model
        self.users = 0
        # Not at exit: the process gives everything back by itself.
        weakref.finalize(self, model.close, wait=False).atexit = False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A pickled or deep-copied user has none, and acquires its own.
        return type(None), ()


# Re-entrant, since the garbage collector may end an abandoned generation, and so call `release`, at any moment.
lock = threading.RLock()
_loaded: weakref.WeakValueDictionary[_Key, Loaded] = weakref.WeakValueDictionary()


def acquire(info: ModelInfo, options: LoadOptions) -> Loaded:
    """The loaded model, loaded now if need be; one load at a time. Release it after use.

    Raises:
        ExlError: see `api.load`.
    """
    key = (info.path.resolve(), options)
    with lock:
        while True:
            loaded = _loaded.get(key)
            if loaded is None or loaded.model.closed:
                loaded = _loaded[key] = Loaded(api.load_resolved(info, options))
            loaded.users += 1
            if not loaded.model.closed:
                return loaded


def release(loaded: Loaded) -> None:
    """One user less. After the last one, returns only once the memory is free.

    An engine's thread does not wait for that: the garbage collector may have it end somebody's abandoned generation
    while others wait, under the lock, for that very thread.
    """
    if not in_engine_thread():
        _release(loaded)
        return
    with contextlib.suppress(RuntimeError):  # the process is ending, and gives everything back by itself
        threading.Thread(target=_release, args=(loaded,), name="exl-release").start()


def _release(loaded: Loaded) -> None:
    with lock:
        loaded.users -= 1
        if loaded.users == 0:
            loaded.model.close()
