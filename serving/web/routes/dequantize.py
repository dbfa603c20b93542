"""`/dequantize`: codes in, quantized latents out."""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from bridle.tokens.layouts import TokenError, Vocabulary
from serving.engine.deployment import Deployment
from serving.engine.work import MAX_NUMBERS, each_clip
from serving.web.answers import ARROW, JSON, NPZ, answer, negotiate
from serving.web.npz import read_npz
from serving.web.openapi import problems
from serving.web.problems import ProblemError
from serving.web.schemas import DequantizeAnswer, DequantizeRequest, Parameters
from serving.web.scopes import needs
from serving.web.service import Service, service_of
from serving.web.waiting import while_wanted

router = APIRouter(tags=["codes"])
MAX_JSON = 2 * 1024 * 1024
"""Bytes of a JSON body; parsing it stops everything else for as long as it takes (2 MB: 30 ms)."""
Codes = npt.NDArray[np.int64]


@router.post(
    "/dequantize",
    response_model=DequantizeAnswer,
    responses=problems(NPZ, ARROW),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": DequantizeRequest.model_json_schema(ref_template="#/components/schemas/{model}")},
                NPZ: {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
)
@needs("use")
async def dequantize(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    parameters: Annotated[Parameters, Query()],
) -> Response:
    """Codes to quantized latents. NPZ: arrays `codes_0`, `codes_1`, ... of shape [M', N], one for each clip."""
    kind = negotiate(request.headers.get("accept"), (JSON, NPZ, ARROW))
    with service.admission.request() as places:
        deadline = service.admission.deadline(request.headers.get("x-request-timeout"))
        model = _model(service, parameters)
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent not in (JSON, NPZ):
            raise ProblemError("unsupported-kind", f"Content-Type {sent[:40]!r}: expected {JSON} or {NPZ}")
        limit = MAX_JSON if sent == JSON else service.settings.max_codes * 8 + (1 << 16)
        places.take_file()
        body = await service.uploads.body(request, places, deadline, limit)
        clips = _from_json(body) if sent == JSON else _from_npz(body, service)
        rows = [_rows(codes, model, index) for index, codes in enumerate(clips)]
        dim = model.config.quantizer.dim
        if sum(codes.size for codes in rows) > service.settings.max_codes:
            raise ProblemError("too-large", f"more than max_codes = {service.settings.max_codes} codes")
        if sum(len(codes) for codes in rows) * dim > MAX_NUMBERS:
            raise ProblemError("too-large", f"the latents would have more than {MAX_NUMBERS} numbers")
        with model.used():
            work = each_clip([model.dequantize(codes, deadline) for codes in rows])
            latents = await while_wanted(request, work, deadline)
        about = [{"model": model.name, "codebooks": codes.shape[1], "dim": dim} for codes in rows]
        return await answer([one | {"latents": found} for one, found in zip(about, latents, strict=True)], kind, {})


def _model(service: Service, parameters: Parameters) -> Deployment:
    if parameters.model is None and parameters.modality is None:
        if len(service.registry.models) > 1:
            raise ProblemError("wrong-parameter", "several models are loaded; say which by model= or modality=")
        return service.registry.models[0]
    return service.registry.choose(parameters.model, parameters.modality, b"")[0]


def _rows(codes: Any, model: Deployment, index: int) -> Codes:
    """Codes ``[M', N]`` from outside as ``[N, M']``, checked."""
    quantizer = model.config.quantizer
    try:
        array = np.array(codes)
        if array.ndim != 2 or not 1 <= array.shape[0] <= quantizer.codebooks:
            raise TokenError(
                f"codes of shape {list(array.shape)}: expected [M', N] with M' from 1 to {quantizer.codebooks}"
            )
        if not array.size:
            raise TokenError("codes are empty: expected at least one position")
        vocabulary = Vocabulary(array.shape[0], quantizer.codebook_size)
        vocabulary.flatten(array.T)  # its checks: integers, range
    except (ValueError, OverflowError) as error:
        raise ProblemError("wrong-parameter", f"clip {index}: {error}", clip=index) from None
    return np.ascontiguousarray(array.T, dtype=np.int64)


def _from_npz(body: bytearray, service: Service) -> list[Any]:
    settings = service.settings
    arrays = read_npz(body, max_arrays=settings.max_clips, max_numbers=settings.max_codes)
    expected = ["codes"] if set(arrays) == {"codes"} else [f"codes_{i}" for i in range(len(arrays))]
    if not arrays or set(arrays) != set(expected):
        names = ", ".join(sorted(arrays))[:200]
        raise ProblemError(
            "wrong-parameter", f"the NPZ holds {names or 'nothing'}: expected codes, or codes_0, codes_1, ..."
        )
    return [arrays[name] for name in expected]


def _from_json(body: bytearray) -> list[Any]:
    try:
        found = json.loads(bytes(body), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProblemError("malformed", f"the body is not JSON: {str(error)[:200]}") from None
    clips = found.get("clips") if isinstance(found, dict) and set(found) == {"clips"} else None
    if not isinstance(clips, list) or not clips:
        raise ProblemError("wrong-parameter", 'the body: expected {"clips": [{"codes": [[...], ...]}, ...]}')
    for index, clip in enumerate(clips):
        rows = clip.get("codes") if isinstance(clip, dict) and set(clip) == {"codes"} else None
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise ProblemError("wrong-parameter", f"clip {index}: expected codes, M' lists of N integers", clip=index)
        if any(type(code) is not int for row in rows for code in row) or len({len(row) for row in rows}) > 1:
            raise ProblemError("wrong-parameter", f"clip {index}: expected lists of equally many integers", clip=index)
    return [clip["codes"] for clip in clips]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
