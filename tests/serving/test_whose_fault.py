"""A user's mistake, a damaged file and a fault of ours are different answers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from fastapi import APIRouter
from starlette.requests import Request

from bridle.modalities.clip import TooLargeError
from serving import logs
from serving.engine.deployment import Deployment
from serving.engine.errors import ChoiceError, FaultError, FileError, ProcessEndedError
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.web.problems import log_fault, problem_of
from serving.web.scopes import needs, scopes_of


def test_an_error_inside_the_model_is_a_fault_with_its_traceback(audio_folder: Path) -> None:
    settings = ServeSettings(models=(str(audio_folder),), device=("cpu",), decode_workers=1, threads=1)

    async def ask() -> None:
        deployment = Deployment(audio_folder, settings, Metrics(), ["cpu"])
        await deployment.start()
        try:
            good = await anext(deployment.dequantize(np.zeros((5, 4), np.int64)))
            assert good.shape[0] == 5
            with pytest.raises(FaultError) as caught:  # the routes check codes; here nobody did
                await anext(deployment.dequantize(np.full((5, 4), 10**6)))
            assert "Traceback" in caught.value.traceback and "ValueError" in caught.value.traceback
            assert (await anext(deployment.dequantize(np.zeros((5, 4), np.int64))) == good).all()
        finally:
            await deployment.stop()

    asyncio.run(ask())


def test_every_kind_of_error_has_its_problem(capfd: pytest.CaptureFixture[str]) -> None:
    assert problem_of(ChoiceError("x")).status == 422
    assert problem_of(ProcessEndedError("x")).headers()["Retry-After"] == "1"
    too_large = problem_of(FileError(3, TooLargeError("x")))
    assert (too_large.status, too_large.extra) == (413, {"clip": 3})
    fault = FaultError("KeyError: 'secret'", "Traceback: here")
    problem = problem_of(fault)
    assert problem.status == 500
    assert "secret" not in json.dumps(problem.body("id-1"))
    logs.set_level("info")
    log_fault(fault, "id-1")
    line = _last_line(capfd)
    assert (line["request_id"], line["traceback"]) == ("id-1", "Traceback: here")


def test_a_route_that_declares_no_scope_is_refused() -> None:
    router = APIRouter()

    @router.get("/said")
    @needs("admin")
    async def said(request: Request) -> str:
        return ""

    assert scopes_of(router.routes) == {"/said": "admin"}

    @router.get("/forgotten")
    async def forgotten(request: Request) -> str:
        return ""

    with pytest.raises(TypeError, match="/forgotten: declares no scope"):
        scopes_of(router.routes)


def _last_line(capfd: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert logs.flush()
    line: dict[str, object] = json.loads(capfd.readouterr().err.splitlines()[-1])
    return line
