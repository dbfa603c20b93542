"""The service does what its OpenAPI document says, whatever is asked."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from running_service import Server
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

ROUTES = (
    "POST /tokenize", "POST /encode", "POST /classify", "POST /dequantize", "POST /v1/picture", "GET /v1/models",
    "GET /info", "GET /livez", "GET /readyz", "GET /metrics",
)  # fmt: skip
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schemathesis.serializer("application/x-npz")
def as_it_is(context: object, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.fixture(scope="module")
def schema(server: Server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_as_documented(schema: schemathesis.BaseSchema, route: str) -> None:
    method, path = route.split()
    seen = set()

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def ask(case: schemathesis.Case) -> None:
        case.headers.pop("X-Request-Timeout", None)  # a deadline that passes is rightly a 504
        seen.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

    ask()
    assert seen


def test_good_answers_are_as_documented(
    client: httpx.Client, schema: schemathesis.BaseSchema, sounds: list[bytes]
) -> None:
    answers = [
        client.post("/tokenize?layout=delay&text=true", content=sounds[0]),
        client.post("/tokenize", content=sounds[0], headers={"Accept": "application/x-npz"}),
        client.post("/encode", content=sounds[0]),
        client.post("/encode?pool=none", content=sounds[0]),
        client.post("/classify", content=sounds[0]),
        client.post("/dequantize?modality=audio", json={"clips": [{"codes": [[1, 2], [3, 4]]}]}),
        client.post("/v1/picture", content=sounds[0]),
    ]
    for answer in answers:
        assert answer.status_code == 200
        schema[answer.request.url.path]["POST"].validate_response(answer)


def test_the_document_names_every_route(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *(route.split()[1] for route in ROUTES), "/v1/models/reload",
    }  # fmt: skip
    for path, methods in document["paths"].items():
        for about in methods.values():
            assert about["description"], path
            names = {parameter["name"] for parameter in about.get("parameters", [])}
            assert ("X-Request-Timeout" in names) == ("requestBody" in about), path
            assert "requestBody" not in about or {"model", "modality"} <= names, path
