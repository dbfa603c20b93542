"""All models in service: which one a request means, and how one is swapped for another without a failed request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bridle.hub import BUILTIN, local_folder
from bridle.settings import RecipeError, nearest
from serving.engine.deployment import Deployment
from serving.engine.devices import devices_of
from serving.engine.errors import ChoiceError, EmptyError, ReloadError, UnknownKindError
from serving.logs import log
from serving.metrics import Metrics
from serving.settings import ServeSettings
from serving.workers.template import start_workers_template

SPECIFIC = ("image", "video")
"""Modalities asked first, for a film has sound: what both film and sound could be is tried as a film."""


_NAMED = re.compile(r"([A-Za-z0-9._-]{1,64})=(.+)")


def named_folder(text: str) -> tuple[str | None, Path]:
    """The name and the folder of ``NAME=FOLDER``; no name where it is a folder as it stands.

    FOLDER may be ``builtin:MODALITY``.

    Raises:
        HubError: no such model ships.
    """
    match = _NAMED.fullmatch(text)
    if match is None or Path(text).exists():
        return None, _folder(text)
    return match[1], _folder(match[2])


def _folder(text: str) -> Path:
    return local_folder(text) if text.startswith(BUILTIN) else Path(text)


class Registry:
    """The models, in the order of the settings."""

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._models: dict[str, Deployment] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()

    async def start(self) -> None:
        """Starts all models.

        Raises:
            RecipeError: two models of one name. ModelError, ChildError, ConnectionError: one does not start.
        """
        start_workers_template()
        devices = await asyncio.to_thread(devices_of, self._settings)
        made = [
            Deployment(folder, self._settings, self._metrics, devices, alias)
            for alias, folder in map(named_folder, self._settings.models)
        ]
        for one in made:
            if one.name in self._models:
                raise RecipeError(f"two models are called '{one.name}'; give one a name of its own: NAME={one.folder}")
            self._models[one.name] = one
        for one in made:
            await one.start()
            self._announce(one)

    async def stop(self) -> None:
        """Stops all models."""
        await asyncio.gather(*(model.stop() for model in self._models.values()), return_exceptions=True)
        for task in self._retiring:
            task.cancel()

    @property
    def models(self) -> list[Deployment]:
        """What is loaded and gives codes."""
        return [model for model in self._models.values() if not model.classifies]

    @property
    def classifiers(self) -> list[Deployment]:
        """What is loaded and gives classes."""
        return [model for model in self._models.values() if model.classifies]

    @property
    def running(self) -> bool:
        """Whether every model has a process that is up."""
        return bool(self._models) and all(model.running for model in self._models.values())

    def get(self, name: str) -> Deployment:
        """The model of a name: the one that the settings gave it, or else the folder's own.

        Raises:
            ChoiceError: there is none.
        """
        found = self._models.get(name) or next((m for m in self._models.values() if m.config.name == name), None)
        if found is None:
            raise ChoiceError(f"model '{name[:80]}' is not loaded{_meant(name, self._models)}")
        return found

    def choose(
        self, name: str | None, modality: str | None, head: bytes, *, classify: bool = False
    ) -> list[Deployment]:
        """The models to try, in order: the one named, that of the modality named, or those that recognise the content.

        classify: whether classifiers are wanted, else models that give codes.

        Raises:
            ChoiceError: no such model, or none of that modality or kind.
            EmptyError, UnknownKindError: none takes the content.
        """
        if name is not None:
            model = self.get(name)
            if model.classifies != classify:
                use = "is a classifier; use /classify" if model.classifies else "tells no classes; name a classifier"
                raise ChoiceError(f"model '{name}' {use}")
            if modality not in (None, model.config.modality):
                raise ChoiceError(f"model '{name}' is for {model.config.modality}, not {modality}")
            return [model]
        firsts: dict[str, Deployment] = {}
        for model in self.classifiers if classify else self.models:
            firsts.setdefault(model.config.modality, model)
        if not firsts:
            what = "classifier" if classify else "model that gives codes"
            raise ChoiceError(f"no {what} is loaded; start the service with the folder of one")
        if modality is not None:
            if modality not in firsts:
                raise ChoiceError(f"no model for modality '{modality[:80]}' is loaded{_meant(modality, firsts)}")
            return [firsts[modality]]
        if not head:
            raise EmptyError("the content is empty; send the bytes of a file")
        names: Sequence[str] = [
            *(name for name in SPECIFIC if name in firsts),
            *(n for n in firsts if n not in SPECIFIC),
        ]
        found = [firsts[kind] for kind in names if firsts[kind].modality.recognises(head)]
        if not found:
            raise UnknownKindError(_not_recognised(head, firsts.values()))
        return found

    async def reload(self, name: str | None = None) -> list[Deployment]:
        """Loads one model, or all, from its folder again; requests under way end on the old one.

        Raises:
            ChoiceError: no such model. ReloadError: it does not start; the old one stays in service.
        """
        async with self._reloading:  # what another reload has put in place meanwhile is what this one replaces
            wanted = [self.get(name)] if name is not None else list(self._models.values())
            return [await self._reload(model) for model in wanted]

    async def _reload(self, old: Deployment) -> Deployment:
        try:
            new = Deployment(old.folder, self._settings, self._metrics, devices_of(self._settings), old.alias)
            if new.name != old.name and new.name in self._models:
                raise RecipeError(f"another model is called '{new.name}'")
            await new.start()
        except (ValueError, OSError, RuntimeError, EOFError, TimeoutError) as error:
            self._metrics.reloads.labels(old.name, "failed").inc()
            log("error", "a model could not be reloaded; the old one stays", model=old.name, error=str(error))
            raise ReloadError(f"{old.name}: {error}") from None
        self._models = {
            (new.name if model is old else name): (new if model is old else model)
            for name, model in self._models.items()
        }
        self._metrics.reloads.labels(new.name, "done").inc()
        self._metrics.model_info.remove(old.name, old.config.modality, old.info["sha256"])
        self._announce(new)
        task = asyncio.create_task(old.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return new

    def _announce(self, model: Deployment) -> None:
        self._metrics.model_info.labels(model.name, model.config.modality, model.info["sha256"]).set(1)
        log("info", "a model is ready", model=model.name, modality=model.config.modality, sha256=model.info["sha256"])


def _meant(word: str, loaded: Iterable[str]) -> str:
    hint = nearest(word, loaded)
    return f"{hint} (loaded: {', '.join(loaded)})" if "did you mean" in hint else f"; loaded: {', '.join(loaded)}"


def _not_recognised(head: bytes, models: Iterable[Deployment]) -> str:
    kinds = "; ".join(f"{one.config.modality} ({', '.join(one.modality.extensions)})" for one in models)
    packed = "; it looks like gzip: send it with Content-Encoding: gzip" if head.startswith(b"\x1f\x8b") else ""
    return f"the content is not recognised{packed}; taken are {kinds}"
