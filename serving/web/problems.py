"""Errors as RFC 9457 problem JSON. `type` is stable: programs may rely on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from bridle.modalities.clip import ClipError, TooLargeError, WrongKindError
from serving.engine import errors
from serving.logs import log

TYPES: dict[str, tuple[int, str]] = {
    "undecodable": (400, "The content cannot be decoded"),
    "malformed": (400, "The request is malformed"),
    "unauthorized": (401, "An API key is needed"),
    "forbidden": (403, "The request is not allowed"),
    "not-found": (404, "There is no such thing here"),
    "method-not-allowed": (405, "The path takes another method"),
    "not-acceptable": (406, "None of the accepted answers can be made"),
    "slow-request": (408, "The request came too slowly"),
    "reload-failed": (409, "The model could not be reloaded"),
    "too-large": (413, "The content is over a limit"),
    "unsupported-kind": (415, "No loaded model takes this kind of content"),
    "wrong-parameter": (422, "A parameter is wrong"),
    "busy": (429, "The service is busy"),
    "headers-too-large": (431, "The request's headers are too large"),
    "internal": (500, "The service failed"),
    "unavailable": (503, "The service cannot answer now"),
    "deadline": (504, "The deadline passed"),
}
"""Every `type`, its status and its title."""

INTERNAL = "the service failed; its log says more under the request id"
BY_STATUS = {status: type for type, (status, _) in TYPES.items()}
"""For errors that come from the framework, which know their status only."""


class ProblemError(Exception):
    """An answer that is an error.

    Args:
        type: a key of `TYPES`; detail: what was found, what was expected, what to do.
        retry_after: seconds after which the same request may succeed.
        extra: further members of the problem, such as `clip`, the index of the clip at fault.
    """

    def __init__(self, type: str, detail: str, *, retry_after: float | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.type = type
        self.status, self.title = TYPES[type]
        self.detail = detail
        self.retry_after = retry_after
        self.extra = extra

    def body(self, request_id: str = "") -> dict[str, Any]:
        """The problem as plain data."""
        found = {"type": f"urn:bridle:problem:{self.type}", "title": self.title, "status": self.status}
        found |= {"detail": self.detail[:2000], **self.extra}
        return found | ({"request_id": request_id} if request_id else {})

    def headers(self) -> dict[str, str]:
        """What belongs beside the body."""
        headers = {"Cache-Control": "no-store"}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="bridle", Basic realm="bridle: any user, the key as password"'
        return headers

    def response(self, request_id: str = "", headers: Mapping[str, str] | None = None) -> Response:
        """The HTTP answer."""
        body = json.dumps(self.body(request_id), ensure_ascii=True)
        merged = {**self.headers(), **(headers or {})}
        return Response(body, self.status, merged, media_type="application/problem+json")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (WrongKindError, "unsupported-kind"),
    (TooLargeError, "too-large"),
    (ClipError, "undecodable"),
    (errors.ChoiceError, "wrong-parameter"),
    (errors.UnknownKindError, "unsupported-kind"),
    (errors.EmptyError, "undecodable"),
    (errors.AnswerTooLargeError, "too-large"),
    (errors.ReloadError, "reload-failed"),
    (errors.ProcessEndedError, "unavailable"),
    (errors.DeadlineError, "deadline"),
)
"""What the engine's errors are to a client; any other is a fault of ours."""
_AGAIN = {"unavailable", "deadline"}


def problem_of(error: errors.EngineError | ClipError) -> ProblemError:
    """The problem that tells a client of an error of the engine."""
    extra = {}
    cause: Exception = error
    if isinstance(error, errors.FileError):
        cause, extra = error.cause, {"clip": error.index}
    for kind, name in _KINDS:
        if isinstance(cause, kind):
            return ProblemError(name, str(cause), retry_after=1 if name in _AGAIN else None, **extra)
    return ProblemError("internal", INTERNAL)


def log_fault(error: errors.EngineError, request_id: str) -> None:
    """Logs a fault of ours with its traceback, under the id that the client is told."""
    if isinstance(error, errors.FaultError):
        log("error", "a request failed", request_id=request_id, error=str(error), traceback=error.traceback)
