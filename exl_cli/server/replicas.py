"""Several replicas of the server, each with its own engines, as an application of Ray Serve (https://docs.ray.io).

Ray's proxy listens, and passes each request on to the less busy of two replicas, or, with the header `X-Session-Id`, to
the one that had the session's last: that has the beginning of the conversation in its KV cache.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI

from exl_cli import loader
from exl_cli.engines.base import Engine
from exl_cli.errors import EngineError, ExitCode, ExlError, UsageError, brief, param
from exl_cli.models.info import inspect
from exl_cli.models.load_options import LoadOptions
from exl_cli.server import run
from exl_cli.server.app import create_app
from exl_cli.server.gate import Policy
from exl_cli.server.keys import Keys
from exl_cli.server.pool import Catalog, ModelPool
from exl_cli.server.state import ServerState, Settings

_NAME = "exl"
# Beyond what a replica's own queue takes: it is the one that refuses.
_MOST_REQUESTS = 100_000


@dataclass(frozen=True)
class Plan:
    """What a replica is to serve; can be pickled. See `Catalog`, `ModelPool` and `Policy`.

    Attributes:
        models: folders of the models, by name.
        key_file: see `Keys`.
        log: has `note` and `warn`, as a `ServerState`.
    """

    models: Mapping[str, Path]
    aliases: Mapping[str, str]
    folder: Path | None
    any_name: bool
    loading: LoadOptions
    sequences: int | None
    max_loaded: int
    idle_seconds: float | None
    settings: Settings
    key_file: Path | None
    hosts: frozenset[str]
    origins: frozenset[str]
    log: Any
    load: Callable[..., Engine] = loader.load


def replica_app(plan: Plan) -> FastAPI:
    """The application of a replica, which loads its models before it takes requests."""
    catalog = Catalog(
        {name: inspect(path, name) for name, path in plan.models.items()},
        plan.aliases,
        plan.folder,
        any_name=plan.any_name,
    )
    log = plan.log
    pool = ModelPool(
        catalog,
        plan.loading,
        log,
        plan.load,
        sequences=plan.sequences,
        max_loaded=plan.max_loaded,
        idle_seconds=plan.idle_seconds,
    )
    state = ServerState(pool, plan.settings, note=log.note, warn=log.warn)
    keys = None if plan.key_file is None else Keys(plan.key_file, log.warn)
    app = create_app(state, Policy(keys, plan.hosts, plan.origins))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await run.load_models(state, [*plan.models][: plan.max_loaded])
        except BaseException as error:
            log.warn(f"error: {error.marked if isinstance(error, ExlError) else error}")
            raise
        yield
        await pool.close()

    app.router.lifespan_context = lifespan
    return app


class Replica:
    """A replica, as Ray Serve sees it."""

    app: FastAPI

    async def check_health(self) -> None:
        """Asked for by Ray Serve; after a fault of the GPU the replica is replaced.

        Raises:
            BaseException: the fault.
        """
        state: ServerState = self.app.state.server
        if state.fault is not None:
            raise state.fault


def import_ray() -> tuple[Any, Any, Any]:
    """The modules `ray` and `ray.serve`, and the class `LoggingConfig`.

    Raises:
        UsageError: Ray is not installed.
    """
    # Read when Ray is imported: whether to tell its makers, and how to pass on what replicas log.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        import ray
        from ray import serve as ray_serve
        from ray.serve.schema import LoggingConfig
    except ImportError:
        raise UsageError("replicas need Ray, which is not installed", "run pip install 'exl-cli[ray]'") from None
    return ray, ray_serve, LoggingConfig


def serve_replicas(plan: Plan, count: int, listener: socket.socket, grace: float, note: Callable[[str], None]) -> None:
    """Serve from replicas until SIGTERM or SIGINT, a second one of which ends it at once. Main thread only.

    Args:
        plan: of each replica.
        count: how many there are.
        listener: from `run.listen`; its address is Ray's from then on.
        grace: seconds that requests under way have once a signal has come.
        note: takes lines of the log.

    Raises:
        UsageError: Ray is not installed, or there are fewer GPUs than replicas.
        EngineError: the replicas do not start.
    """
    ray, ray_serve, LoggingConfig = import_ray()  # noqa: N806 - a class
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    host, port = listener.getsockname()[:2]
    try:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"include_dashboard": False}
        ray.init(address=address or "local", logging_level="ERROR", **local)
        stopping = _Stopping(note, grace)  # Ray has installed its own handlers by now
        resources = _resources(ray.cluster_resources(), plan, count)
        listener.close()
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)

        def build() -> FastAPI:
            return replica_app(plan)

        deployment = ray_serve.deployment(ray_serve.ingress(build)(Replica)).options(
            name=_NAME,
            num_replicas=count,
            ray_actor_options=resources,
            max_ongoing_requests=_MOST_REQUESTS,
            graceful_shutdown_timeout_s=grace,
            graceful_shutdown_wait_loop_s=0.2,
            logging_config=quiet,
            request_router_config={"request_router_class": "exl_cli.server.session_router:SessionRouter"},
        )
        try:
            ray_serve.run(deployment.bind(), name=_NAME, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            reason = brief(str(error).strip().partition("\n")[0])
            raise EngineError(f"the replicas did not start: {reason}", "see their log lines above") from None
        note(f"{count} replicas are ready")
        stopping.wait()
        ray_serve.delete(_NAME)  # returns once the replicas have ended
        stopping.close()
    finally:
        ray.shutdown()


def _resources(cluster: Mapping[str, float], plan: Plan, count: int) -> dict[str, float]:
    """What each replica takes of the machines."""
    models = (inspect(path, name) for name, path in plan.models.items())
    each = max((loader.gpus_per_engine(model, plan.loading) for model in models), default=1)
    gpus = int(cluster.get("GPU", 0))
    if gpus and plan.loading.engine != "cpu":
        if gpus < count * each:
            raise UsageError(
                f"{param('replicas')} {count} needs {count * each} GPUs, but there are {gpus}", "use fewer replicas"
            )
        return {"num_gpus": each}
    # torch gets as many threads.
    return {"num_cpus": max(1, int(cluster.get("CPU", 1)) // count), "num_gpus": 0}


class _Stopping:
    """SIGTERM and SIGINT: the first is waited for, a second one ends the process."""

    def __init__(self, note: Callable[[str], None], grace: float) -> None:
        self._came = threading.Event()
        self._note, self._grace = note, grace
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def wait(self) -> None:
        """Until a signal comes."""
        while not self._came.wait(1.0):  # a handler runs between two of these
            pass

    def close(self) -> None:
        """Handle signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._came.is_set():
            os._exit(ExitCode.INTERRUPTED)
        self._came.set()
        self._note(f"shutting down: waiting up to {self._grace:g} s for running generations")
