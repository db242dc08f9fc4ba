"""Which replica a request goes to: that of its session, else the less busy of two. Runs in Ray's proxy."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

_HEADER = b"x-session-id"


class SessionRouter(RequestRouter):  # type: ignore[misc] # Ray is untyped to us
    """Rendezvous hashing of sessions: a replica that comes or goes moves its own only.

    Thaler and Ravishankar, Using name-based mappings to increase hit rates, 1998.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: Ray takes the least busy of the first rank that takes requests."""
        session = _session(pending_request)
        if session is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        return [[replica] for replica in sorted(candidate_replicas, key=lambda replica: _weight(session, replica))]


def _session(request: PendingRequest | None) -> bytes | None:
    scope: Any = getattr(request.args[0], "_asgi_scope", None) if request is not None and request.args else None
    headers = (scope or {}).get("headers", ())
    return next((value for name, value in headers if name.lower() == _HEADER and value), None)


def _weight(session: bytes, replica: RunningReplica) -> bytes:
    return hashlib.blake2b(session + replica.replica_id.unique_id.encode(), digest_size=8).digest()
