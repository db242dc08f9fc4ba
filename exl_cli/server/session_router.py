"""Which replica a request goes to: that of its session, else the less busy of two. Runs in Ray's proxy."""

from __future__ import annotations

import hashlib
import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# How often a session's replica is asked before another gets its request: a busy one may not say in a tenth of a second
# that it takes it. Ray waits longer each time.
_PATIENCE = 5


class SessionRouter(RequestRouter):  # type: ignore[misc] # Ray is untyped to us
    """Rendezvous hashing of sessions: a replica that comes or goes moves its own only.

    Thaler and Ravishankar, Using name-based mappings to increase hit rates, 1998.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: Ray takes the least busy of the first rank that takes requests."""
        # Of the header X-Session-Id. Ray's own prefix router needs a prompt, which the proxy does not read.
        session: str = getattr(pending_request.metadata, "session_id", "") if pending_request else ""
        if not session:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        ranked = sorted(candidate_replicas, key=lambda replica: _weight(session, replica))
        return [[replica] for replica in (*ranked[:1] * _PATIENCE, *ranked[1:])]


def _weight(session: str, replica: RunningReplica) -> bytes:
    return hashlib.blake2b(f"{session}\0{replica.replica_id.unique_id}".encode(), digest_size=8).digest()
