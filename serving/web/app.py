"""The application: routes, problems for all errors, and what stands around them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from bridle import __version__
from bridle.settings import nearest
from serving.engine.errors import EngineError
from serving.web.lean import ErrorHandler, Straight
from serving.web.middleware import Around
from serving.web.problems import BY_STATUS, INTERNAL, ClientGoneError, ProblemError, log_fault, problem_of
from serving.web.routes import classify, clips, dequantize, operation, pages
from serving.web.scopes import scopes_of
from serving.web.service import Service


def build_app(service: Service) -> ASGIApp:
    """The ASGI application of a service (started or not; `/readyz` tells)."""
    handlers: dict[type[Exception], ErrorHandler] = {
        ProblemError: _problem,
        EngineError: _engine_error,
        RequestValidationError: _wrong_parameter,
        HTTPException: _http_error,
        ClientGoneError: _nobody,
    }
    app = FastAPI(
        title="BRIDLE",
        version=__version__,
        description="Discrete tokens of sound, images and video.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        root_path=service.settings.root_path.rstrip("/"),
        redirect_slashes=False,
        exception_handlers=dict[Any, Any](handlers) | {Exception: _internal},
    )
    app.state.service = service
    routers = (clips.router, classify.router, dequantize.router, operation.router, pages.router)
    for router in routers:
        app.include_router(router)
    scopes = scopes_of(route for router in routers for route in router.routes)
    inner: ASGIApp = Straight(app, (route for router in routers for route in router.routes), handlers)
    if service.settings.cors_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Timeout", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After", "Server-Timing"],
        )
    return Around(inner, service, scopes)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    request.app.state.service.metrics.rejected.labels(error.type).inc()
    return error.response(request.state.request_id)


async def _engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    log_fault(error, request.state.request_id)
    return await _problem(request, problem_of(error))


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # for the log and the metrics; nobody reads it


async def _internal(request: Request, error: Exception) -> Response:
    """What Starlette answers when a route failed; it raises the error again, which `Around` logs."""
    return ProblemError("internal", INTERNAL).response(request.state.request_id)


async def _wrong_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(_explained(one, request) for one in error.errors()[:8])
    return await _problem(request, ProblemError("wrong-parameter", told))


def _explained(fault: Any, request: Request) -> str:
    """What is wrong with a parameter, and which one was meant where there is none of that name."""
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{place}: {fault['msg']}"
    groups = (field.field_info.annotation for field in request.scope["route"].dependant.query_params)
    known = {name for group in groups for name in getattr(group, "model_fields", {})}
    return f"{place[:80]}: there is no such parameter{nearest(str(fault['loc'][-1]), known)}"


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = ProblemError(BY_STATUS.get(error.status_code, "malformed"), str(error.detail))
    request.app.state.service.metrics.rejected.labels(problem.type).inc()
    return problem.response(request.state.request_id, dict(error.headers or {}))
