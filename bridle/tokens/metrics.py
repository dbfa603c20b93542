"""Prometheus metrics of bulk work, one server a process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from bridle.tokens.engine import Timings
from bridle.tokens.parts import Part
from bridle.tokens.state import Progress


class Metrics:
    """What this process has done so far, and what is done in all.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, port: int, units: int, samples: int) -> None:
        registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"bridle_tokenize_{name}", text, registry=registry)
            for name, text in {
                "samples": "Samples written by this process.",
                "skipped_samples": "Samples that this process could not read.",
                "codes": "Codes written by this process.",
                "tokens": "Ids of documents written by this process.",
                "outputs": "Outputs written by this process.",
                "data_wait_seconds": "Seconds that the model waited for decoded clips.",
                "model_seconds": "Seconds in the model.",
            }.items()
        }
        self._done = Gauge("bridle_tokenize_job_outputs_done", "Outputs done, by any process.", registry=registry)
        self._samples = Gauge("bridle_tokenize_job_samples_done", "Samples done, by any process.", registry=registry)
        Gauge("bridle_tokenize_job_outputs", "Outputs of the whole job.", registry=registry).set(units)
        Gauge("bridle_tokenize_job_samples", "Samples of the whole job.", registry=registry).set(samples)
        self._waited = self._modelled = 0.0
        self._server, _ = start_http_server(port, registry=registry)

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()

    def told(self, progress: Progress, part: Part | None, timings: Timings) -> None:
        """Takes over what a job tells; see `Told`."""
        self._done.set(progress.done)
        self._samples.set(progress.samples)
        if part is None:
            return
        for name, value in {
            "samples": part.samples,
            "skipped_samples": len(part.skipped),
            "codes": part.codes,
            "tokens": part.tokens,
            "outputs": 1,
            "data_wait_seconds": timings.waiting - self._waited,
            "model_seconds": timings.model - self._modelled,
        }.items():
            self._counters[name].inc(value)
        self._waited, self._modelled = timings.waiting, timings.model
