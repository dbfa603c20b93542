"""Parts of the OpenAPI document that cannot be told from the code."""

from __future__ import annotations

from typing import Any

from serving.web.problems import TYPES
from serving.web.schemas import Problem

TIMEOUT: dict[str, Any] = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "description": "Seconds after which nobody waits for the answer any more.",
    "schema": {"type": "number", "minimum": 0.1},
}
FILES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One file as it is, or many as parts named `file`.",
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    },
    "parameters": [TIMEOUT],
}


def problems(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Responses of a route: further media types of the good answer, and all the problems."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in sorted({status for status, _ in TYPES.values()}):
        names = [name for name, (number, _) in TYPES.items() if number == status]
        found[status] = {
            "description": "; ".join(TYPES[name][1] for name in names),
            "model": Problem,
            "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    if kinds:
        found[200] = {"content": {kind: {} for kind in kinds}, "description": "The clips, in the order sent."}
    return found
