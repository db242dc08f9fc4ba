"""What every request passes: who may ask what from where, how large its body may be, and the end when a client goes.

Browsers are why Host and Origin matter on a loopback address too: any web page can send requests there. A page of
another site is known by its Origin, and one whose name was rebound to this address by the Host that it asks for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exl_cli.errors import brief, param, spell
from exl_cli.server.errors import RETRY_AFTER, ApiError, as_api_error
from exl_cli.server.keys import Keys
from exl_cli.server.state import ServerState, Usage, caller, usage

_OPEN = ("/", "/health")
_UNLOGGED = (*_OPEN, "/metrics")
_BODY_SECONDS = 60.0
_LONGEST_ERROR = 160


@dataclass(frozen=True)
class Policy:
    """Who may ask.

    Attributes:
        keys: those that are let in; None for all.
        hosts: names that this server goes by, besides addresses and localhost.
        origins: of web pages that may ask, as https://example.org; "*" for all.
        max_body: bytes.
    """

    keys: Keys | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    max_body: int = 16 * 1024 * 1024


class Gate:
    """The outermost part of the application, an ASGI middleware.

    Args:
        app: the rest.
        state: the server.
        policy: see there.
        respond: an error as a response, for the path that it concerns.
    """

    def __init__(
        self, app: ASGIApp, state: ServerState, policy: Policy, respond: Callable[[str, ApiError], Response]
    ) -> None:
        self._app, self._state, self._policy, self._respond = app, state, policy, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        used = Usage()
        usage.set(used)
        begun = time.monotonic()
        exchange = _Exchange(receive, send)
        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            await exchange.read_body(headers, self._policy.max_body)
            await exchange.run(self._app, scope)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                if self._state.phase not in ("stopping", "failed"):  # by Ray Serve, as the client went away
                    raise
                # By uvicorn, once the grace is over.
                error = ApiError(503, "the server is shutting down", "stopping", headers=RETRY_AFTER)
            answer = as_api_error(error)
            self._state.report(answer, error)
            if not exchange.status:
                await self._respond(scope["path"], answer)(scope, receive, exchange.send)
        finally:
            self._count(scope, exchange.status, used, time.monotonic() - begun)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse who may not ask.

        Raises:
            ApiError: 401 or 403.
        """
        # HTTP/1.0 has no Host; load balancers check the health that way. Browsers always send one.
        host = headers.get("host", "")
        if "host" in headers and not self._is_own(host):
            said = f"host {brief(host)!r} is not allowed; the server's {param('allow_host')} option allows it"
            raise ApiError(403, said, "unknown_host")
        origin = headers.get("origin")
        allowed = self._policy.origins
        if origin is not None and not allowed & {"*", origin} and not _is_same_host(origin, host):
            option = param("cors_origin")
            said = f"web pages of {brief(origin)!r} are not allowed; the server's {option} option allows them"
            raise ApiError(403, said, "unknown_origin")
        if self._policy.keys is None or scope["path"] in _OPEN:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        name = self._policy.keys.name_of(given)
        if name is None:
            said = "invalid API key" if given else "missing API key; send Authorization: Bearer KEY or X-Api-Key: KEY"
            raise ApiError(401, said, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        caller.set(name)

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".") if host.isascii() else ""
        except ValueError:  # a bracket of an IPv6 address is missing
            return False
        if name == "localhost" or name.endswith(".localhost") or name in self._policy.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _count(self, scope: Scope, status: int, used: Usage, seconds: float) -> None:
        # The route's pattern, of which there are few; a path may be anything.
        route = getattr(scope.get("route"), "path", "none")
        self._state.metrics.requests.labels(route, str(status or "closed")).inc()
        if scope["path"] in _UNLOGGED and status in (200, 503):
            return
        path = scope["raw_path"].decode("ascii", "replace")[:200]
        tokens = f", {used.prompt_tokens:,} + {used.new_tokens:,} tokens" if used.prompt_tokens else ""
        by = f", {caller.get()}" if caller.get() else ""
        outcome = status or "client disconnected"
        # Errors of the server are in the log already.
        error = f": {_on_a_line(used.error)}" if 400 <= status < 500 and used.error else ""
        self._state.note(f"{scope['method']} {path} {outcome}, {seconds:.2f} s{tokens}{by}{error}")


def _on_a_line(error: str) -> str:
    line = " ".join(error.split())
    # What is shortened may not have a mark that is cut in two.
    return line if len(line) <= _LONGEST_ERROR else brief(spell(line), _LONGEST_ERROR)


def _is_same_host(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


class _Exchange:
    """A request's body, read ahead, and its response; cancelled when the client goes away.

    Attributes:
        status: of the response; 0 until it has begun.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._body: bytes | None = b""
        self._gone = asyncio.Event()
        self._complete = False
        self.status = 0

    async def read_body(self, headers: Headers, most: int) -> None:
        """Read all of it.

        Raises:
            ApiError: 408, 413 or 415.
        """
        length = headers.get("content-length", "0")
        too_large = ApiError(413, f"the body is larger than {most:,} bytes", "body_too_large")
        if length.isdecimal() and int(length) > most:
            raise too_large
        parts: list[bytes] = []
        size, deadline = 0, time.monotonic() + _BODY_SECONDS
        while True:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:  # not the built-in one yet in Python 3.10
                raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:g} s", "body_too_slow") from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client disconnected")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                break
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # A web page can send other kinds anywhere without asking first.
        if size and kind != "application/json":
            raise ApiError(415, "the body must be JSON, with Content-Type: application/json", "not_json")
        self._body = b"".join(parts)

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Have the application respond."""
        task = asyncio.ensure_future(app(scope, self.receive, self.send))
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() or self._complete:
                await task
        finally:
            watch.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # if any, it is known or nobody is there to read of it

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()

    async def receive(self) -> Message:
        """The body, and then nothing until the client goes away."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass on a part of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body"):
            self._complete = True
        await self._send(message)
