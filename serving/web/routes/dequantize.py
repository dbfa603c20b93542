"""`/dequantize`: codes in, quantized latents out."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from bridle.tokens.layouts import TokenError, Vocabulary
from serving.engine.deployment import Deployment
from serving.engine.turns import aside
from serving.engine.work import MAX_NUMBERS, SMALL
from serving.settings import ServeSettings
from serving.web.admission import Places
from serving.web.answers import ARROW, JSON, NPZ, answer, negotiate, streamed
from serving.web.formats import PIECE, Clip, Later
from serving.web.lean import LeanRoute
from serving.web.npz import read_npz
from serving.web.openapi import TIMEOUT, problems
from serving.web.problems import ProblemError
from serving.web.schemas import DequantizeAnswer, DequantizeRequest, Parameters
from serving.web.scopes import needs
from serving.web.service import Service, service_of
from serving.web.waiting import while_wanted

router = APIRouter(tags=["codes"], route_class=LeanRoute)
MAX_JSON = 2 * 1024 * 1024
"""Bytes of a JSON body; parsing it stops everything else for as long as it takes (2 MB: 30 ms)."""
AHEAD = 2 * 1024 * 1024
"""Bytes of an answer, made while it is read, that are here at a time: a piece of the model's, and what the connection
holds."""
Codes = npt.NDArray[np.int64]


@router.post(
    "/dequantize",
    response_model=DequantizeAnswer,
    responses=problems(NPZ, ARROW),
    openapi_extra={
        "parameters": [TIMEOUT],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": DequantizeRequest.model_json_schema(ref_template="#/components/schemas/{model}")},
                NPZ: {"schema": {"type": "string", "format": "binary"}},
            },
        },
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
    places = service.places(request)
    places.look()
    deadline = service.admission.deadline(request.headers.get("x-request-timeout"))
    model = _model(service, parameters)
    with model.used():  # a reload may come while the body does
        return await _answered(request, service, model, kind, places, deadline)


async def _answered(
    request: Request, service: Service, model: Deployment, kind: str, places: Places, deadline: float
) -> Response:
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent not in (JSON, NPZ):
        raise ProblemError("unsupported-kind", f"Content-Type {sent[:40]!r}: expected {JSON} or {NPZ}")
    limit = MAX_JSON if sent == JSON else service.settings.max_codes * 8 + (1 << 16)
    body = await service.uploads.body(request, places, deadline, limit)
    places.take_files(1)
    read = partial(_clips, body, sent, model, service.settings)
    small = sent == JSON and len(body) < SMALL  # an NPZ of any size may unfold to much
    rows = read() if small else await aside(read)
    dim = model.model_config.quantizer.dim
    numbers = sum(len(codes) for codes in rows) * dim
    clips = [
        {"model": model.name, "codebooks": codes.shape[1], "dim": dim, "latents": Later((len(codes), dim), latents)}
        for codes, latents in ((codes, model.dequantize(codes)) for codes in rows)
    ]
    if numbers < SMALL or kind == ARROW:
        places.take_bytes(4 * numbers)
        made = await while_wanted(request, _whole(model, clips), deadline)
        return await answer(request, lambda: made, numbers, kind, {}, places)
    places.take_bytes(sum(codes.nbytes for codes in rows) + AHEAD)
    places.give_back_files()
    return await while_wanted(request, streamed(request, clips, kind, {}, model.used()), deadline)


async def _whole(model: Deployment, clips: list[Clip]) -> list[Clip]:
    """The same clips with all their latents."""
    made = []
    with model.used():
        for clip in clips:
            found = [block async for block in clip["latents"].blocks]
            latents = found[0] if len(found) == 1 else await aside(partial(np.concatenate, found))
            made.append({**clip, "latents": latents})
    return made


def _clips(body: bytearray, sent: str, model: Deployment, settings: ServeSettings) -> list[Codes]:
    """The codes of a request, ``[N, M']`` a clip, checked.

    Raises:
        ProblemError: 400, 413, 422.
    """
    clips = _from_json(body, model, settings) if sent == JSON else _from_npz(body, settings)
    rows = [_rows(codes, model, index) for index, codes in enumerate(clips)]
    if sum(codes.size for codes in rows) > settings.max_codes:
        raise ProblemError("too-large", f"more than max_codes = {settings.max_codes} codes")
    if sum(len(codes) for codes in rows) * model.model_config.quantizer.dim > MAX_NUMBERS:
        raise ProblemError("too-large", f"the latents would have more than {MAX_NUMBERS} numbers")
    return rows


def _model(service: Service, parameters: Parameters) -> Deployment:
    if parameters.model is None and parameters.modality is None:
        if len(service.registry.models) != 1:
            raise ProblemError(
                "wrong-parameter", f"{len(service.registry.models)} models are loaded; say which by model= or modality="
            )
        return service.registry.models[0]
    return service.registry.choose(parameters.model, parameters.modality, b"")[0]


def _rows(codes: Any, model: Deployment, index: int) -> Codes:
    """Codes ``[M', N]`` from outside as ``[N, M']``, checked."""
    quantizer = model.model_config.quantizer
    try:
        array = codes if isinstance(codes, np.ndarray) else _array(codes)
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


def _array(rows: list[list[int]]) -> Codes:
    """Lists of integers as an array; piece by piece, between which other threads have their turn."""
    width = len(rows[0]) if rows else 0
    if any(len(row) != width for row in rows):
        raise TokenError("codes of several lengths: expected M' lists of equally many integers")
    array = np.empty((len(rows), width), np.int64)
    for row, into in zip(rows, array, strict=True):
        for start in range(0, width, PIECE):
            into[start : start + PIECE] = row[start : start + PIECE]
    return array


def _from_npz(body: bytearray, settings: ServeSettings) -> list[Any]:
    arrays = read_npz(body, max_arrays=settings.max_clips, max_numbers=settings.max_codes)
    expected = ["codes"] if set(arrays) == {"codes"} else [f"codes_{i}" for i in range(len(arrays))]
    if not arrays or set(arrays) != set(expected):
        names = ", ".join(sorted(arrays))[:200]
        raise ProblemError(
            "wrong-parameter", f"the NPZ holds {names or 'nothing'}: expected codes, or codes_0, codes_1, ..."
        )
    return [arrays[name] for name in expected]


class _Clip(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    codes: list[list[int]]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    clips: list[_Clip]


_decode = msgspec.json.Decoder(_Body).decode
_BROKEN = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What reading something raises that is no JSON; names of members that are no UTF-8 have the third."""


def _from_json(body: bytearray, model: Deployment, settings: ServeSettings) -> list[Any]:
    # Counted before anything is made of them: a million empty lists cost more than a million codes.
    most_lists = 1 + settings.max_clips * (1 + model.model_config.quantizer.codebooks)
    if body.count(b"{") > 1 + settings.max_clips:
        if body.count(b"{") != body.count(b"}"):
            raise ProblemError("malformed", "the body is not JSON: its braces do not match")
        raise ProblemError("too-large", f"more than max_clips = {settings.max_clips} clips; send several requests")
    if body.count(b"[") > most_lists:
        if body.count(b"[") != body.count(b"]"):
            raise ProblemError("malformed", "the body is not JSON: its brackets do not match")
        raise ProblemError("wrong-parameter", f"the body: more lists than {most_lists}, for clips and their codebooks")
    try:
        found = _decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_json(body, error) from None
    except _BROKEN as error:
        raise _no_json(error) from None
    if not found.clips:
        raise ProblemError("wrong-parameter", 'the body: expected {"clips": [{"codes": [[...], ...]}, ...]}')
    return [clip.codes for clip in found.clips]


def _wrong_json(body: bytearray, error: Exception) -> ProblemError:
    """JSON of another shape, or what only began like JSON."""
    try:
        msgspec.json.decode(body)
    except _BROKEN as broken:
        return _no_json(broken)
    told = str(error)[:200]
    return ProblemError("wrong-parameter", f'the body: {told}; expected {{"clips": [{{"codes": [[...], ...]}}, ...]}}')


def _no_json(error: Exception) -> ProblemError:
    return ProblemError("malformed", f"the body is not JSON: {str(error)[:200]}")
