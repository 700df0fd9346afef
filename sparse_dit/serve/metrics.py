"""Figures for Prometheus, read from the store, so that they outlive the server."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .store import Store


class _Queue(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Jobs, workers, bytes and seconds."""
        jobs = GaugeMetricFamily("sparse_dit_jobs", "Jobs in the store.", labels=["status"])
        for status, number in self._store.counts().items():
            jobs.add_metric([status], number)
        yield jobs
        workers = GaugeMetricFamily(
            "sparse_dit_worker_beat_age_seconds",
            "Seconds since a worker's last sign of life.",
            labels=["device", "state"],
        )
        now = self._store.now()
        for row in self._store.workers():
            workers.add_metric([row["device"], row["state"]], max(0.0, now - row["beat"]))
        yield workers
        totals = self._store.totals()
        for name, text in (
            ("waited_seconds", "Seconds that the jobs in the store waited for a worker."),
            ("run_seconds", "Seconds that the completed jobs in the store ran."),
            ("bytes", "Bytes of files."),
        ):
            yield GaugeMetricFamily(f"sparse_dit_{name}", text, value=totals[name])


def registry_of(store: Store) -> CollectorRegistry:
    """A registry with the figures of a store."""
    registry = CollectorRegistry()
    registry.register(_Queue(store))
    return registry
