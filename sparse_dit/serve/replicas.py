"""Replicas of a server on Ray Serve: what `sparse-dit serve --ray` runs.

Each replica is a whole server with one worker process. All of them open the same store, so that any of them
answers for any job, and their workers take jobs from it as those of one server do. Ray starts, replaces and
stops replicas, and passes requests to any; it schedules no jobs.
"""

from __future__ import annotations

import functools
import importlib
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from ..words import option
from .app import create_app
from .command import Served, configure_log, prepared
from .options import ServeOptions
from .service import Service
from .supervisor import GRACE
from .worker import WorkerOptions

NAME = "sparse_dit"  # of the application in the cluster
REQUESTS = 1000  # that a replica answers at a time; most wait for a job
OBJECTS = 80 << 20  # bytes of a store that Ray wants, and that nothing is put into
LOOK_BACK = 20.0  # seconds over which the length of the queue is averaged

Prepare = Callable[[], tuple[Service, Sequence[WorkerOptions]]]


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are: one for each job that waits or runs, within bounds.

    Args:
        least, most: The bounds.
        cpus: Processors that each has; torch uses as many threads.
        idle_seconds: How long fewer must be needed before some are stopped; none is while a job runs.
        upscale_seconds: How long more must be needed before they are started.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    idle_seconds: float = 300.0
    upscale_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"{option('min_replicas')} must be at least 1 and at most {option('max_replicas')}, "
                f"got {self.least} and {self.most}"
            )
        if not 0 < self.cpus < float("inf"):
            raise ValueError(f"{option('replica_cpus')} must be above 0, got {self.cpus:g}")


class Replica:
    """What runs in a replica's process.

    Args:
        prepare: Gives the service and the options of its worker.
        log: Level of the log.
    """

    def __init__(self, prepare: Prepare, log: str = "info") -> None:
        configure_log(log)
        self._service, self._workers = prepare()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app, whose start and end are those of the worker process."""
        return create_app(self._service, self._workers)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The jobs of this model that wait and that run, in all replicas."""
        counts = self._service.store.counts(self._service.card.name)
        return {"waiting": counts["queued"], "running": counts["in_progress"]}


def wanted_replicas(context: Any) -> tuple[float, dict[str, Any]]:
    """How many replicas there should be: one for each job, and none is stopped while a job runs.

    Ray can't say which of them it stops. One that runs a job gives it back, and its steps are lost.

    Args:
        context: Ray's `AutoscalingContext`; each replica said the same of the one queue, at some time.
    """
    said = context.aggregated_metrics or {}
    waiting, running = (
        max(said.get(name, {}).values(), default=0.0) for name in ("waiting", "running")
    )
    wanted = waiting + running
    if running > 0:
        wanted = max(wanted, context.target_num_replicas)
    return wanted, {}


def application(prepare: Prepare, scaling: Scaling, device: str, log: str = "info") -> Any:
    """The application that Ray Serve runs.

    Args:
        prepare: Called in each replica; must be a function that can be pickled.
        scaling: How many replicas.
        device: The device of each: `"cuda"` takes one GPU of the cluster, `"cpu"` none.
        log: Level of the log.
    """
    serve, config = _ray("serve"), _ray("serve.config")
    resources = {"num_cpus": scaling.cpus, "num_gpus": 1 if device.startswith("cuda") else 0}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="server",
        max_ongoing_requests=REQUESTS,
        ray_actor_options=resources,
        graceful_shutdown_timeout_s=2 * GRACE,
        autoscaling_config=config.AutoscalingConfig(
            min_replicas=scaling.least,
            max_replicas=scaling.most,
            upscale_delay_s=scaling.upscale_seconds,
            downscale_delay_s=scaling.idle_seconds,
            look_back_period_s=LOOK_BACK,
            policy=config.AutoscalingPolicy(policy_function=f"{__name__}:wanted_replicas"),
        ),
    )
    return deployment.bind(prepare, log)


def serve_on_ray(
    served: Served,
    options: ServeOptions,
    scaling: Scaling,
    *,
    host: str,
    port: int,
    log: str = "info",
) -> None:
    """Serve until stopped, on the cluster that this machine belongs to, or on one that is made here.

    Raises:
        ValueError: If it can't be started so: Ray isn't installed, or several machines would share a file of
            SQLite.
        TypeError, NotImplementedError, OSError: See `serve`.
    """
    try:
        ray, serve = _ray(), _ray("serve")
    except ImportError:
        raise ValueError("--ray needs Ray: pip install 'sparse_dit[ray]'") from None
    if len(served.devices) != 1:
        raise ValueError(f"--ray: each replica has one device, got {', '.join(served.devices)}")
    service, _ = prepared(served, options)  # raises here what would fail in each replica
    service.store.close()
    mine = not _joined(ray)
    try:
        machines = sum(node["Alive"] for node in ray.nodes())
        if machines > 1 and options.store.startswith("sqlite"):
            raise ValueError(
                f"the cluster has {machines} machines, which can't share a file of SQLite: give --store "
                "the URL of a database, and --files a folder that all of them see"
            )
        serve.start(http_options={"host": host, "port": port})
        prepare = functools.partial(prepared, served, options)
        serve.run(application(prepare, scaling, served.devices[0], log), name=NAME)
        _wait()
        serve.delete(NAME)
    finally:
        if mine:
            serve.shutdown()
        ray.shutdown()


def _ray(module: str = "") -> Any:
    """Ray, or a module of it: an extra that most installations lack."""
    return importlib.import_module(f"ray.{module}" if module else "ray")


def _joined(ray: Any) -> bool:
    """Connect to a cluster; False if there was none, and one was made."""
    try:
        ray.init(address="auto")
        return True
    except ConnectionError:
        ray.init(include_dashboard=False, object_store_memory=OBJECTS)
        return False


def _wait() -> None:
    """Wait until told to stop."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
