"""Spans reach a collector, as children of the caller's trace."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from running_service import serving

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


def test_a_request_is_a_span_of_the_callers_trace(tmp_path: Path, audio_folder: Path, sounds: list[bytes]) -> None:
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    trace = "0af7651916cd43dd8448eb211c80319c"
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{collector.server_port}"
            with serving(tmp_path, audio_folder, otlp_endpoint=endpoint) as server:
                headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
                answer = httpx.post(server.url + "/tokenize", content=sounds[0], headers=headers, timeout=60)
                assert answer.status_code == 200
                assert server.stop() == 0
        finally:
            collector.shutdown()
            thread.join()
    spans = [
        span
        for body in bodies
        for resource in trace_service.ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.trace_id.hex() == trace
    ]
    assert {"POST /tokenize", "receive", "codes"} <= {span.name for span in spans}
