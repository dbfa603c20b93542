"""`/classify`: files to classes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from serving.engine.work import Classes, classified, each_clip
from serving.web.answers import JSON, answer, negotiate
from serving.web.formats import Clip
from serving.web.job import Job
from serving.web.lean import LeanRoute
from serving.web.openapi import FILES, problems
from serving.web.schemas import ClassifyAnswer, ClassifyParameters
from serving.web.scopes import needs
from serving.web.service import Service, service_of
from serving.web.waiting import while_wanted

router = APIRouter(tags=["clips"], route_class=LeanRoute)
TheService = Annotated[Service, Depends(service_of)]


@router.post("/classify", response_model=ClassifyAnswer, responses=problems(), openapi_extra=FILES)
@needs("use")
async def classify(
    request: Request, service: TheService, parameters: Annotated[ClassifyParameters, Query()]
) -> Response:
    """Files to classes with their probabilities, by a classifier that `bridle finetune` left."""
    kind = negotiate(request.headers.get("accept"), (JSON,))
    job = Job(request, service, parameters, classify=True)
    files = await job.files()
    work = [classified(models, file, job.deadline, job.timings) for file, models in files]
    with service.tracing.step("classify"):
        found = await while_wanted(request, each_clip(work), job.deadline)
    job.note(len(files))
    numbers = sum(len(one.values) for one in found)
    return await answer(
        request, lambda: [_classes(one, parameters.top) for one in found], numbers, kind, job.headers(), job.places
    )


def _classes(found: Classes, top: int) -> Clip:
    config = found.deployment.config
    names: list[str] = found.deployment.info["classes"]
    best = (-found.values).argsort(kind="stable")[:top]
    return {
        "model": found.deployment.name,
        "modality": config.modality,
        "duration_s": found.duration_s,
        "classes": [{"class": names[i], "probability": round(float(found.values[i]), 6)} for i in best],
    }
