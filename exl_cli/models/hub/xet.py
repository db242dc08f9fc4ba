"""Bytes from xet storage through hf-xet, from any offset on.

huggingface_hub downloads whole files with it (`file_download.xet_get`, 2.4); its stream of a byte range does the same
work and lets a file go on where it stopped.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from exl_cli.models.hub.failures import BrokenTransferError

_FAILURES = 2
# Its own patience lasts minutes and says nothing meanwhile; a network that blocks xet storage would look like a hang.
_CONFIG = {
    "client.retry_max_attempts": 1,
    "client.retry_base_delay": timedelta(seconds=1),
    "client.connect_timeout": timedelta(seconds=10),
    "client.read_timeout": timedelta(seconds=30),
}


class Xet:
    """hf-xet's session of one run; after two failures it steps aside for plain HTTP, which serves the same files.

    `headers` are sent to the Hub when asking for access.
    """

    def __init__(self, headers: dict[str, str], note: Callable[[str], object]) -> None:
        self._headers, self._note = headers, note
        self._lock = threading.Lock()
        self._session: Any = None
        self._tries = _FAILURES if _is_here() else 0

    @property
    def usable(self) -> bool:
        return self._tries > 0

    def chunks(self, source: Any, size: int, offset: int) -> Iterator[bytes]:
        """The bytes of a file from `offset` on; `source` is huggingface_hub's `XetFileData`.

        BrokenTransferError if hf-xet fails.
        """
        hf_xet = importlib.import_module("hf_xet")
        try:
            with self._lock:
                self._session = self._session or hf_xet.XetSession(hf_xet.XetConfig().with_config(_CONFIG))
            group = self._session.new_download_stream_group(
                token_refresh_url=source.refresh_route, token_refresh_headers=self._headers
            )
            for chunk in group.download_stream(hf_xet.XetFileInfo(source.file_hash, size), start=offset):
                offset += len(chunk)
                yield chunk
            if offset < size:  # how some of its failures show
                raise EOFError(f"ended at {offset:,} of {size:,} bytes")
        except Exception as error:  # its errors have no common base
            with self._lock:
                self._tries -= 1
                if self._tries == 0:
                    self._note("hf-xet keeps failing; continuing over plain HTTP")
            raise BrokenTransferError(f"hf-xet: {str(error).strip().partition(chr(10))[0]}") from error

    def close(self) -> None:
        """Abandon streams still open."""
        with self._lock:
            if self._session is not None:
                self._session.sigint_abort()
                self._session = None


def _is_here() -> bool:
    """Whether hf-xet is installed, recent enough to stream, and not switched off with HF_HUB_DISABLE_XET."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
        return False
    return hasattr(importlib.import_module("hf_xet"), "XetDownloadStreamGroup")
