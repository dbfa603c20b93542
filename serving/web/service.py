"""Everything a request needs, in one place."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import Request

from bridle import __version__
from bridle.settings import RecipeError
from serving.engine.deployment import Deployment
from serving.engine.errors import EngineError
from serving.engine.registry import Registry
from serving.engine.turns import OWNER
from serving.logs import log
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.tracing import Tracing
from serving.web.admission import Admission, Places
from serving.web.keys import KeyRing
from serving.web.siblings import Siblings
from serving.web.uploads import Uploads


class Service:
    """The parts of a running service.

    siblings: all HTTP processes, where this is one of several.

    Raises:
        RecipeError: wrong settings or keys.
    """

    def __init__(self, settings: ServeSettings, siblings: Siblings | None = None) -> None:
        self.settings = settings
        self.siblings = siblings
        self.metrics = Metrics()
        self.keys = KeyRing(settings)
        self.admission = Admission(settings, self.metrics, siblings.counts if siblings is not None else None)
        self.uploads = Uploads(settings, self.metrics)
        self.registry = Registry(settings, self.metrics)
        self.tracing = Tracing(settings.otlp_endpoint)
        self.draining = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Starts all models; returns when they are warm.

        Raises:
            ValueError, OSError, RuntimeError: one does not start.
        """
        try:
            await self.registry.start()
        except BaseException:
            await self.registry.stop()
            raise
        self.metrics.ready.set(1)
        if self.siblings is not None:
            self.siblings.counts.started()

    async def close(self) -> None:
        """Ends all processes."""
        await self.registry.stop()
        self.tracing.close()

    def places(self, request: Request) -> Places:
        """Places for a request's files and bytes, given back when its answer is sent (see `Around`)."""
        key = request.scope["state"].get("key")
        address = request.client.host if request.client else ""
        client = f"key {key}" if key else f"address {address}"
        OWNER.set(client)
        places = self.admission.places(client)
        request.scope["state"]["places"] = places
        return places

    @property
    def ready(self) -> bool:
        """Whether new requests should come here."""
        return self.registry.running and not self.draining and self.all_started

    @property
    def all_started(self) -> bool:
        """Whether every HTTP process has been ready; one that takes another's place listens only when it is."""
        return self.siblings is None or self.siblings.counts.all_started

    def drain(self) -> None:
        """Stops being ready; everything is still served until the server stops."""
        self.draining = True
        self.metrics.ready.set(0)
        log("info", "draining")

    def reload_in_background(self) -> None:
        """SIGHUP: keys and all models."""

        async def reload() -> None:
            try:
                self.keys.reload()
            except (RecipeError, OSError, UnicodeError) as error:
                log("error", "the keys could not be read; the old ones stay", error=str(error))
            with contextlib.suppress(EngineError):
                await self.registry.reload()

        task = asyncio.ensure_future(reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def info(self) -> dict[str, Any]:
        """What `/info` says."""
        limits = (
            "max_bytes", "max_clips", "max_seconds", "max_pixels", "max_frames", "max_queue", "max_codes",
            "max_batch", "max_wait_ms", "request_timeout",
        )  # fmt: skip
        largest = max((model.max_batch for model in self.registry.models), default=self.settings.max_batch)
        return {
            "version": __version__,
            "limits": {name: getattr(self.settings, name) for name in limits} | {"max_batch": largest},
            "models": self.models(),
            "classifiers": self.classifiers(),
        }

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` says of each model."""
        return [
            {
                "id": model.name,
                "object": "model",
                **model.info,
                "codes_depend_on_batch": model.codes_depend_on_batch,
                "device": self._devices(model),
                "dtype": self.settings.dtype,
            }
            for model in self.registry.models
        ]

    def classifiers(self) -> list[dict[str, Any]]:
        """What `/v1/models` says of each classifier."""
        return [
            {
                "id": one.name,
                "object": "classifier",
                **one.info,
                "device": self._devices(one),
                "dtype": self.settings.dtype,
            }
            for one in self.registry.classifiers
        ]

    def _devices(self, model: Deployment) -> list[str]:
        return model.devices if self.siblings is None else self.siblings.devices


async def service_of(request: Request) -> Service:
    """The service behind a request. Async, since FastAPI would run a plain function in a thread."""
    service: Service = request.app.state.service
    return service
