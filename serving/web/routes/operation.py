"""What is loaded, whether it works, and reloading it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from serving.web.openapi import problems
from serving.web.problems import ProblemError
from serving.web.schemas import Info, ModelList, ReloadParameters
from serving.web.scopes import needs
from serving.web.service import Service, service_of
from serving.web.siblings import from_sibling

router = APIRouter(tags=["operation"])
TheService = Annotated[Service, Depends(service_of)]


@router.get("/livez", response_class=PlainTextResponse)
@needs("open")
async def livez() -> str:
    """Whether the process answers. Needs no key."""
    return "ok"


@router.get("/readyz", response_class=PlainTextResponse, responses=problems())
@needs("open")
async def readyz(service: TheService) -> str:
    """Whether requests should come here: every model is warm, and the service is not ending. Needs no key."""
    if not service.ready:
        what = "the service is ending" if service.draining else "a model is starting"
        raise ProblemError("unavailable", what, retry_after=1)
    return "ok"


@router.get("/metrics", response_class=PlainTextResponse, responses=problems())
@needs("metrics")
async def metrics(request: Request, service: TheService) -> Response:
    """Prometheus metrics."""
    text = service.metrics.text()
    if service.siblings is not None and not from_sibling(request):
        text = await service.siblings.metrics(request, text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", response_model=ModelList, responses=problems())
@needs("use")
async def models(service: TheService) -> JSONResponse:
    """The loaded models."""
    return JSONResponse({"object": "list", "data": service.models(), "classifiers": service.classifiers()})


@router.get("/info", response_model=Info, responses=problems())
@needs("use")
async def info(service: TheService) -> JSONResponse:
    """Version, limits and models."""
    return JSONResponse(service.info())


@router.post("/v1/models/reload", response_model=ModelList, responses=problems())
@needs("admin")
async def reload(
    request: Request, service: TheService, parameters: Annotated[ReloadParameters, Query()]
) -> JSONResponse:
    """Loads models from their folders again (scope `admin`). Requests under way end on the old ones."""
    await service.registry.reload(parameters.model)
    if service.siblings is not None and not from_sibling(request):
        await service.siblings.reload(request)
    return JSONResponse({"object": "list", "data": service.models(), "classifiers": service.classifiers()})
