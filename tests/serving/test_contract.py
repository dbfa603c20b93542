"""The service does what its OpenAPI document says, whatever is asked."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from running_service import Server
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)


@pytest.fixture(scope="session")
def api_schema(server: Server) -> object:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


schema = schemathesis.pytest.from_fixture("api_schema")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schema.exclude(path_regex="reload").parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_route_answers_as_documented(case: schemathesis.Case) -> None:
    if case.headers is not None:
        case.headers.pop("X-Request-Timeout", None)  # a deadline that passes is rightly a 504
    case.call_and_validate(checks=CHECKS)


def test_the_document_names_every_route(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/tokenize", "/encode", "/dequantize", "/v1/models", "/v1/models/reload", "/v1/picture", "/info", "/livez",
        "/readyz", "/metrics",
    }  # fmt: skip
    for path, methods in document["paths"].items():
        for about in methods.values():
            assert about["description"], path
