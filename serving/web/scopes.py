"""What a key must be good for, declared beside each route."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

NeededScope = Literal["open", "use", "metrics", "admin"]
"""`open` needs no key at all; the others are scopes of keys (`serving/web/keys.py`)."""
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def needs(scope: NeededScope) -> Callable[[Endpoint], Endpoint]:
    """Declares the scope of a route; stands right above the function, under the router's decorator."""

    def mark(endpoint: Endpoint) -> Endpoint:
        endpoint.__dict__["needed_scope"] = scope
        return endpoint

    return mark


def scopes_of(routes: Iterable[BaseRoute]) -> dict[str, str]:
    """The scope of every path.

    Raises:
        TypeError: a route does not declare one.
    """
    found = {}
    for route in routes:
        if not isinstance(route, APIRoute):
            continue
        scope = getattr(route.endpoint, "needed_scope", None)
        if scope is None:
            raise TypeError(f"{route.path}: declares no scope; put @needs(...) above {route.endpoint.__name__}")
        found[route.path] = scope
    return found
