"""What the routes that take files share: the files of a request, the models to try for each, deadline and timings."""

from __future__ import annotations

from fastapi import Request

from serving.engine.deployment import Deployment
from serving.engine.errors import EngineError
from serving.engine.work import FileResult, Timings, each_clip, pooled, whole
from serving.web.problems import problem_of
from serving.web.schemas import Parameters
from serving.web.service import Service
from serving.web.waiting import while_wanted

HEAD = 4096
"""Bytes by which content is recognised."""


class Job:
    """What the routes here share: the files of a request, the models to try for each, its deadline and timings."""

    def __init__(self, request: Request, service: Service, parameters: Parameters, *, classify: bool = False) -> None:
        """classify: whether classifiers are wanted."""
        self._classify = classify
        self.request = request
        self.service = service
        self.deadline = service.admission.deadline(request.headers.get("x-request-timeout"))
        self.timings = Timings()
        self.held = 0
        """Bytes of answers that are here and have taken places already."""
        self._parameters = parameters
        self.places = service.places(request)
        if parameters.model is not None or parameters.modality is not None:
            service.registry.choose(
                parameters.model, parameters.modality, b"", classify=classify
            )  # wrong ones are told before reading

    async def files(self) -> list[tuple[bytearray, list[Deployment]]]:
        """The files, and the models to try for each.

        Raises:
            ProblemError: see `Uploads.files`; no model takes one of them.
        """
        with self.service.tracing.step("receive"):
            files = await self.service.uploads.files(self.request, self.places, self.deadline)
        return [(file, self._candidates(file, index)) for index, file in enumerate(files)]

    def _candidates(self, file: bytearray, index: int) -> list[Deployment]:
        try:
            return self.service.registry.choose(
                self._parameters.model,
                self._parameters.modality,
                bytes(memoryview(file)[:HEAD]),
                classify=self._classify,
            )
        except EngineError as error:
            problem = problem_of(error)
            problem.extra["clip"] = index
            raise problem from None

    async def streams(self, operation: str, *, mean: bool = False) -> list[FileResult]:
        """Every file's whole answer, or the mean of it."""
        files = await self.files()
        if mean:
            work = [pooled(models, operation, file, self.deadline, self.timings) for file, models in files]
        else:
            work = [whole(models, operation, file, self.deadline, self.timings, self._hold) for file, models in files]
        with self.service.tracing.step(operation):
            streams = await while_wanted(self.request, each_clip(work), self.deadline)
        self.note(len(files))
        return streams

    def _hold(self, size: int) -> None:
        self.places.take_bytes(size)
        self.held += size

    def note(self, files: int) -> None:
        """Adds to the request's log line."""
        self.request.state.log = {
            "clips": files,
            "windows": self.timings.windows,
            "models": ",".join(sorted(self.timings.models)) or None,
            "queue_s": round(self.timings.queue, 4),
            "model_s": round(self.timings.model, 4),
        }

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {"Server-Timing": self.timings.header()}
