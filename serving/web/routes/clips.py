"""`/tokenize`, `/encode` and `/v1/picture`: files in."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from bridle.modalities.clip import ClipError, WrongKindError
from bridle.processes.messages import Drawn
from bridle.tokens.layouts import Vocabulary, to_text
from serving.engine.deployment import Deployment, all_used
from serving.engine.errors import DeadlineError, FileError
from serving.engine.work import FileResult, each_clip, windows_of
from serving.web.answers import ARROW, JSON, NDJSON, NPZ, Begun, answer, negotiate
from serving.web.formats import Clip, json_clip
from serving.web.job import Job
from serving.web.lean import LeanRoute
from serving.web.openapi import FILES, problems
from serving.web.problems import ProblemError
from serving.web.schemas import EncodeAnswer, EncodeParameters, Parameters, TokenizeAnswer, TokenizeParameters
from serving.web.scopes import needs
from serving.web.service import Service, service_of
from serving.web.waiting import while_wanted

router = APIRouter(tags=["clips"], route_class=LeanRoute)
TheService = Annotated[Service, Depends(service_of)]


@router.post("/tokenize", response_model=TokenizeAnswer, responses=problems(NPZ, ARROW, NDJSON), openapi_extra=FILES)
@needs("use")
async def tokenize(
    request: Request, service: TheService, parameters: Annotated[TokenizeParameters, Query()]
) -> Response:
    """Files to codes, one stream for each file. With `Accept: application/x-ndjson`, window by window."""
    kind = negotiate(request.headers.get("accept"), (JSON, NPZ, ARROW, NDJSON))
    if kind == NDJSON and parameters.layout not in (None, "interleaved"):
        raise ProblemError("wrong-parameter", f"layout {parameters.layout} needs the whole stream; not with {NDJSON}")
    job = Job(request, service, parameters)
    if kind != NDJSON:
        streams = await job.streams("codes")
        numbers = sum(one.values.size for one in streams)
        extra = 1 + (parameters.layout is not None) + 2 * parameters.text
        return await answer(
            request,
            lambda: [_codes(one, parameters) for one in streams],
            extra * numbers,
            kind,
            job.headers(),
            job.places,
            job.held,
        )
    lines = _lines(job, await job.files(), parameters)
    try:
        first = await while_wanted(request, anext(lines), job.deadline)
    except BaseException:
        await lines.aclose()
        raise
    return _Lines(first, lines, request.state.request_id, {"Cache-Control": "no-store"}, NDJSON)


@router.post("/encode", response_model=EncodeAnswer, responses=problems(NPZ, ARROW), openapi_extra=FILES)
@needs("use")
async def encode(request: Request, service: TheService, parameters: Annotated[EncodeParameters, Query()]) -> Response:
    """Files to the encoder's embeddings: their mean, or one for each position."""
    kind = negotiate(request.headers.get("accept"), (JSON, NPZ, ARROW))
    job = Job(request, service, parameters)
    streams = await job.streams("embed", mean=parameters.pool == "mean")
    numbers = sum(one.values.size for one in streams)
    return await answer(
        request,
        lambda: [_embedding(one, parameters.pool) for one in streams],
        numbers,
        kind,
        job.headers(),
        job.places,
        job.held,
    )


@router.post(
    "/v1/picture",
    response_class=Response,
    responses={**problems(), 200: {"content": {"image/png": {}}, "description": "A picture for people."}},
    openapi_extra=FILES,
)
@needs("use")
async def picture(request: Request, service: TheService, parameters: Annotated[Parameters, Query()]) -> Response:
    """The beginning of a file as a model sees it: a spectrogram, a picture, or a film's frames side by side.

    Headers: X-Bridle-Frames, the frames shown; X-Bridle-Steps, the positions along the first axis that it covers.
    """
    negotiate(request.headers.get("accept"), ("image/png",))
    job = Job(request, service, parameters)
    files = await job.files()
    if len(files) != 1:
        raise ProblemError("wrong-parameter", f"{len(files)} files, expected one", clip=1)
    (file, models), *_ = files
    drawn, png = (await while_wanted(request, each_clip([_picture(models, file)]), job.deadline))[0]
    job.places.give_back_files()
    measures = {"X-Bridle-Frames": str(drawn.frames), "X-Bridle-Steps": str(drawn.steps)}
    return Response(png, headers=measures, media_type="image/png")


async def _picture(models: list[Deployment], file: bytearray) -> tuple[Drawn, bytes]:
    with all_used(models):
        for model in models[:-1]:
            with contextlib.suppress(WrongKindError):
                return await model.pool.picture(file)
        return await models[-1].pool.picture(file)


def _about(stream: FileResult) -> Clip:
    return {
        "model": stream.deployment.name,
        "modality": stream.deployment.config.modality,
        "grid": stream.grid,
        "duration_s": stream.duration_s,
    }


def _codes(stream: FileResult, parameters: TokenizeParameters) -> Clip:
    quantizer = stream.deployment.model_config.quantizer
    clip = _about(stream)
    clip |= {"codebooks": quantizer.codebooks, "codebook_size": quantizer.codebook_size}
    clip["codes"] = np.ascontiguousarray(stream.values.T).astype(np.int32)
    return clip | _tokens(stream.deployment, stream.values, parameters)


def _tokens(deployment: Deployment, codes: Any, parameters: TokenizeParameters) -> Clip:
    quantizer = deployment.model_config.quantizer
    vocabulary = Vocabulary(quantizer.codebooks, quantizer.codebook_size, parameters.offset)
    layout = parameters.layout or "interleaved"
    extra: Clip = {}
    if parameters.layout is not None:
        extra["ids"] = vocabulary.flatten(codes, layout)
    if parameters.text:
        extra["text"] = to_text(deployment.config.modality, codes, vocabulary, layout)
    return extra


def _embedding(stream: FileResult, pool: str) -> Clip:
    clip = _about(stream) | {"width": stream.values.shape[-1]}
    if pool == "mean":
        clip["embedding"] = stream.values
    else:
        clip["embeddings"] = stream.values
    return clip


async def _lines(
    job: Job, files: list[tuple[bytearray, list[Deployment]]], parameters: TokenizeParameters
) -> AsyncGenerator[bytes, None]:
    """One line for each window, in order, and one at the end of each file."""
    with all_used(model for _, models in files for model in models):
        for index, (file, models) in enumerate(files):
            async with contextlib.aclosing(_lines_of(job, index, file, models, parameters)) as lines:
                async for line in lines:
                    yield line
    job.note(len(files))


async def _lines_of(
    job: Job, index: int, file: bytearray, models: list[Deployment], parameters: TokenizeParameters
) -> AsyncGenerator[bytes, None]:
    count, seconds = 0, None
    try:
        async with contextlib.aclosing(windows_of(models, "codes", file, job.deadline, job.timings)) as results:
            async for result in results:
                place, deployment = result.place, result.deployment
                line: Clip = {"clip": index, "window": count, "model": deployment.name}
                line |= {"modality": deployment.config.modality, "grid": result.grid}
                line |= {"start_s": place.start_s, "duration_s": place.duration_s}
                line["codes"] = np.ascontiguousarray(result.values.T)
                yield json_clip(line | _tokens(deployment, result.values, parameters)) + b"\n"
                count += 1
                if place.duration_s is not None:
                    seconds = (seconds or 0.0) + place.duration_s
    except ClipError as error:
        raise FileError(index, error) from None
    except TimeoutError:
        raise DeadlineError from None
    yield json_clip({"clip": index, "end": True, "windows": count, "duration_s": seconds}) + b"\n"


class _Lines(Begun):
    """Lines as they come. An error after the first line becomes the last line: `{"problem": {...}}`."""

    def last_words(self, problem: ProblemError) -> bytes:
        """The line that tells of it."""
        return json.dumps({"problem": problem.body()}).encode() + b"\n"
