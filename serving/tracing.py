"""OpenTelemetry traces, when a collector is configured; otherwise nothing is imported and nothing is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bridle import __version__
from bridle.settings import RecipeError


class Tracing:
    """Spans of requests, sent over OTLP/HTTP in the background.

    Raises:
        RecipeError: an endpoint is set and the packages are not there.
    """

    def __init__(self, endpoint: str | None) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise RecipeError(
                f"otlp_endpoint is set but {error.name} is missing; install opentelemetry-sdk and "
                "opentelemetry-exporter-otlp-proto-http"
            ) from None
        resource = Resource.create({"service.name": "bridle-serve", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        url = endpoint.rstrip("/") + "/v1/traces"
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=5)))
        self._tracer = self._provider.get_tracer("bridle.serving")

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of a request, a child of the caller's `traceparent`; none when there is no collector."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(dict(headers))
        with self._tracer.start_as_current_span(name, context=context, kind=SpanKind.SERVER) as span:
            yield span

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step inside a request."""
        if self._tracer is None:
            yield
            return
        with self._tracer.start_as_current_span(name):
            yield

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()
