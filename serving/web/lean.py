"""Routes with FastAPI's document and without its machinery, which is a quarter of what a small request costs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, get_args, get_type_hints

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
ErrorHandler = Callable[[Request, Exception], Coroutine[Any, Any, Response]]


class LeanRoute(APIRoute):
    """For endpoints of `(request, service, parameters)` that return a response: the parameters are one model."""

    def get_route_handler(self) -> Handler:
        """What answers a request."""
        endpoint: Any = self.endpoint
        model: type[BaseModel] = get_args(get_type_hints(endpoint, include_extras=True)["parameters"])[0]
        plain = model()

        async def handle(request: Request) -> Response:
            sent = request.query_params
            try:
                parameters = model.model_validate(dict(sent)) if sent else plain
            except ValidationError as error:
                faults = [{**fault, "loc": ("query", *fault["loc"])} for fault in error.errors(include_url=False)]
                raise RequestValidationError(faults) from None
            response: Response = await endpoint(request, request.app.state.service, parameters)
            return response

        return handle


class Straight:
    """Goes straight to the lean routes; everything else is the application's.

    handlers: the answers to errors, by their class; an error without one is passed on.
    """

    def __init__(
        self, app: ASGIApp, routes: Iterable[BaseRoute], handlers: Mapping[type[Exception], ErrorHandler]
    ) -> None:
        self._app = app
        self._handlers = handlers
        self._routes: dict[tuple[str, str], tuple[LeanRoute, Handler]] = {
            (method, route.path): (route, route.get_route_handler())
            for route in routes
            if isinstance(route, LeanRoute)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        found = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app
        scope["route"], handle = found
        request = Request(scope, receive, send)
        try:
            response = await handle(request)
        except Exception as error:
            handler = next((self._handlers[kind] for kind in type(error).__mro__ if kind in self._handlers), None)
            if handler is None:
                raise
            response = await handler(request, error)
        await response(scope, receive, send)
