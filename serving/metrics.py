"""Prometheus metrics of the service; names are a contract (DESIGN.md)."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from bridle import __version__
from serving.logs import dropped_lines

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._lost = 0
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.build_info = Gauge("bridle_serve_build_info", "Constant 1; the version.", ["version"], registry=registry)
        self.build_info.labels(__version__).set(1)

        def histogram(name: str, text: str, labels: list[str], buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"bridle_serve_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"bridle_serve_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests by route and status.", ["route", "status"])
        self.request_seconds = histogram("request_seconds", "From the first byte to the last.", ["route"])
        self.in_flight = Gauge("bridle_serve_in_flight", "Requests being served.", registry=registry)
        self.queued = Gauge("bridle_serve_queued", "Files accepted and not yet answered.", registry=registry)
        self.upload_bytes = Gauge("bridle_serve_upload_bytes", "Bytes of bodies in memory.", registry=registry)
        self.received_bytes = counter("received_bytes", "Bytes of bodies received.", [])
        self.clips = counter("clips", "Windows that a model has worked on.", ["model", "operation"])
        self.queue_seconds = histogram("queue_seconds", "A window's wait for its batch.", ["model"])
        self.batch_size = histogram("batch_size", "Windows in a forward pass.", ["model"], _BATCH)
        self.model_seconds = histogram("model_seconds", "A forward pass.", ["model", "operation"])
        self.decode_seconds = histogram("decode_seconds", "Waiting for, decoding and preparing a window.", ["model"])
        self.rejected = counter("rejected", "Requests refused before any work, by problem type.", ["type"])
        self.dropped = counter("dropped", "Windows dropped before the model: client gone, deadline.", ["model"])
        self.worker_restarts = counter("worker_restarts", "Processes that ended and were replaced.", ["kind", "model"])
        self.reloads = counter("reloads", "Model reloads, by outcome.", ["model", "outcome"])
        self.lost_lines = counter("log_lines_dropped", "Lines of the log that nobody took in time.", [])
        self.ready = Gauge("bridle_serve_ready", "1 when /readyz says so.", registry=registry)
        self.model_info = Gauge(
            "bridle_serve_model_info", "Constant 1; what is loaded.", ["model", "modality", "sha256"], registry=registry
        )

    def text(self) -> bytes:
        """The exposition format."""
        self.lost_lines.inc(dropped_lines() - self._lost)
        self._lost = dropped_lines()
        return generate_latest(self.registry)
