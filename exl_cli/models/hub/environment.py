"""The user's settings that huggingface_hub and its HTTP library read: refused by name before they fail in the midst."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from exl_cli.errors import UsageError, param

DEFAULT_ENDPOINT = "https://huggingface.co"
_SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def check_variables() -> None:
    """Check those without which huggingface_hub cannot even be imported, or a connection be opened.

    Raises:
        UsageError: naming the variable.
    """
    for name in _SECONDS:
        value = os.environ.get(name, "0")
        try:
            int(value)
        except ValueError:
            raise UsageError(f"{name} is {value!r}, not a whole number of seconds", "correct or unset it") from None
    if endpoint := os.environ.get("HF_ENDPOINT"):
        check_endpoint(endpoint)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        path = os.environ.get(name)
        if path and not os.access(path, os.R_OK):
            raise UsageError(f"{name} is {path!r}, which cannot be read", "correct or unset it")


def check_endpoint(endpoint: str) -> str:
    """The Hub's address, if it is one.

    Raises:
        UsageError: it is not.
    """
    try:
        parts = urlsplit(endpoint)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        right = False
    if not right:
        raise UsageError(f"HF_ENDPOINT is {endpoint!r}, not an address", f"write it as {DEFAULT_ENDPOINT}, or unset it")
    return endpoint.rstrip("/")


def find_token(given: str | None) -> str | None:
    """The token to send: the one given, else the one that huggingface_hub is logged in with.

    Raises:
        UsageError: no request could carry it, or it cannot be read. The message never shows it.
    """
    from huggingface_hub import constants, get_token

    try:
        token = given or get_token()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"the token in {constants.HF_TOKEN_PATH} cannot be read: {reason}", "check HF_HOME and HF_TOKEN_PATH"
        ) from error
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        names = [param("token")] if given else [name for name in _TOKENS if os.environ.get(name)]
        where = names[0] if names else f"the token in {constants.HF_TOKEN_PATH}"
        raise UsageError(f"{where} holds characters that no token has", "copy it again, without blanks and line breaks")
    return token
