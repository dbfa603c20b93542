"""A typed client of the service, for programs that wait and for programs that do not. Needs only httpx and numpy,
and imports nothing of this package: `clients/python` installs this file alone, as `bridle_client`.

```python
from bridle.client import Client

with Client("http://127.0.0.1:8000", key="bridle_...") as client:
    clip = client.tokenize("speech.flac")      # clip.codes: int32 [M, N]
```
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import httpx
import numpy as np
import numpy.typing as npt

Source = bytes | str | Path
T = TypeVar("T")
RETRIED = (429, 503)
BROKEN = (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)
NPZ, NDJSON = "application/x-npz", "application/x-ndjson"


class ServiceError(Exception):
    """An answer that is an error: its RFC 9457 problem.

    status: of HTTP; type: such as `urn:bridle:problem:undecodable`; problem: the whole body.
    """

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}")
        self.status = status
        self.type = str(problem.get("type", "about:blank"))
        self.problem = dict(problem)


@dataclass(frozen=True)
class Codes:
    """One file's codes.

    codes: int32 ``[M, N]``, N row-major over `grid`; ids: int64 flat ids, where a layout was asked for.
    """

    model: str
    modality: str
    grid: dict[str, int]
    duration_s: float | None
    codebooks: int
    codebook_size: int
    codes: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int64] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Window:
    """One window of a long file: its codes, int32 ``[M, n]``, and where it stands."""

    model: str
    modality: str
    grid: dict[str, int]
    start_s: float | None
    duration_s: float | None
    codes: npt.NDArray[np.int32]


class TokenizeOptions(TypedDict, total=False):
    """What `tokenize` takes beside files."""

    model: str | None
    modality: str | None
    layout: str | None
    offset: int | None
    text: bool | None


@dataclass(frozen=True)
class _Call(Generic[T]):
    """One request, as httpx takes it, and how the content of its answer is read."""

    method: str
    path: str
    options: dict[str, Any]
    read: Callable[[bytes], T]


class _Requests:
    """What both clients share. They only differ in who waits: as in httpx, a generator says what to do next."""

    def __init__(self, url: str, key: str | None, timeout: float, retries: int) -> None:
        self._retries = retries
        headers = {"X-Request-Timeout": f"{timeout:g}"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": timeout + 5.0}

    def _tries(self) -> Generator[float, httpx.Response | Exception, httpx.Response]:
        """Yields the seconds to wait before a try, and is sent what came of it: an answer, or a broken connection."""
        tried, pause = 0, 0.0
        while True:
            outcome = yield pause
            again = self._pause(tried, outcome)
            if isinstance(outcome, Exception):
                if again is None:
                    raise outcome
            elif outcome.is_success or again is None:
                return _check(outcome)
            tried, pause = tried + 1, again

    def _pause(self, tried: int, outcome: httpx.Response | Exception) -> float | None:
        """Seconds before the next try; none when there is to be none. A busy service says how long itself."""
        answer = outcome if isinstance(outcome, httpx.Response) else None
        if tried >= self._retries or (answer is not None and answer.status_code not in RETRIED):
            return None
        said = answer.headers.get("retry-after", "") if answer is not None else ""
        least = float(said) if said.isdecimal() else min(8.0, 0.25 * 2**tried)
        return least * random.uniform(1.0, 1.25)


def _tokenize(
    sources: Sequence[Source],
    *,
    model: str | None = None,
    modality: str | None = None,
    layout: str | None = None,
    offset: int | None = None,
    text: bool | None = None,
) -> _Call[list[Codes]]:
    parameters = _parameters(model=model, modality=modality, layout=layout, offset=offset, text=text)
    options = {"params": parameters, "files": _files(sources), "headers": {"Accept": NPZ}}
    return _Call("POST", "/tokenize", options, _codes)


def _stream(source: Source, model: str | None, modality: str | None) -> tuple[str, str, dict[str, Any]]:
    parameters = _parameters(model=model, modality=modality)
    return "POST", "/tokenize", {"params": parameters, "content": _read(source), "headers": {"Accept": NDJSON}}


def _encode(source: Source, pool: str, model: str | None, modality: str | None) -> _Call[npt.NDArray[np.float32]]:
    parameters = _parameters(pool=pool, model=model, modality=modality)
    options = {"params": parameters, "content": _read(source), "headers": {"Accept": NPZ}}
    return _Call("POST", "/encode", options, lambda content: _embeddings(content)[0])


def _dequantize(codes: npt.ArrayLike, model: str | None, modality: str | None) -> _Call[npt.NDArray[np.float32]]:
    parameters = _parameters(model=model, modality=modality)
    headers = {"Accept": NPZ, "Content-Type": NPZ}
    options = {"params": parameters, "content": _latents_body(codes), "headers": headers}
    return _Call("POST", "/dequantize", options, _latents)


def _classify(
    source: Source, top: int | None, model: str | None, modality: str | None
) -> _Call[list[tuple[str, float]]]:
    options = {"params": _parameters(top=top, model=model, modality=modality), "content": _read(source)}
    return _Call("POST", "/classify", options, lambda content: _classes(json.loads(content)))


def _info(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content)
    return found


_INFO = _Call("GET", "/info", {}, _info)


def _files(sources: Sequence[Source]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{i}", _read(source))) for i, source in enumerate(sources)]


def _read(source: Source) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _parameters(**parameters: Any) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _check(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    raise ServiceError(answer.status_code, problem if isinstance(problem, dict) else {"detail": answer.text[:500]})


def _codes(content: bytes) -> list[Codes]:
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    return [
        Codes(**clip, codes=arrays[f"codes_{i}"], ids=arrays.get(f"ids_{i}"))
        for i, clip in enumerate(json.loads(str(arrays["clips"])))
    ]


def _classes(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(found["class"], found["probability"]) for found in answer["clips"][0]["classes"]]


def _embeddings(content: bytes) -> list[npt.NDArray[np.float32]]:
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    count = len(json.loads(str(arrays["clips"])))
    return [arrays[name] for i in range(count) for name in (f"embedding_{i}", f"embeddings_{i}") if name in arrays]


def _window(line: str) -> Window | None:
    """A line of a stream; none for the one at the end of a file."""
    found = json.loads(line)
    if "problem" in found:
        raise ServiceError(found["problem"]["status"], found["problem"])
    if found.get("end"):
        return None
    names = ("model", "modality", "grid", "start_s", "duration_s")
    return Window(**{name: found[name] for name in names}, codes=np.array(found["codes"], np.int32))


def _latents_body(codes: npt.ArrayLike) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, codes_0=np.asarray(codes))
    return file.getvalue()


def _latents(content: bytes) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = np.load(io.BytesIO(content), allow_pickle=False)["latents_0"]
    return array


class Client(_Requests):
    """A client that waits.

    Args:
        url: of the service; key: an API key; timeout: seconds for one request, told to the service too;
        retries: further tries after 429, 503 and broken connections, as long apart as the service says.

    Every method raises ServiceError for an error's answer, httpx.TransportError where there is no answer, OSError for
    a file that cannot be read.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60.0, retries: int = 5) -> None:
        super().__init__(url, key, timeout, retries)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def tokenize(self, source: Source, **options: Unpack[TokenizeOptions]) -> Codes:
        """One file's codes; options as in `tokenize_many`."""
        return self.tokenize_many([source], **options)[0]

    def tokenize_many(self, sources: Sequence[Source], **options: Unpack[TokenizeOptions]) -> list[Codes]:
        """Files (paths or bytes) to codes, in one request; none for none."""
        if not sources:
            return []
        return self._run(_tokenize(sources, **options))

    def windows(self, source: Source, *, model: str | None = None, modality: str | None = None) -> Iterator[Window]:
        """A long file's codes window by window, the first before the last is tokenized. Not retried."""
        method, path, options = _stream(source, model, modality)
        with self._http.stream(method, path, **options) as answer:
            if not answer.is_success:
                answer.read()
            for line in _check(answer).iter_lines():
                if (window := _window(line)) is not None:
                    yield window

    def encode(
        self, source: Source, *, pool: str = "mean", model: str | None = None, modality: str | None = None
    ) -> npt.NDArray[np.float32]:
        """A file's embedding, float32 ``[D]``, or with ``pool="none"`` those of its positions, ``[N, D]``."""
        return self._run(_encode(source, pool, model, modality))

    def classify(
        self, source: Source, *, top: int | None = None, model: str | None = None, modality: str | None = None
    ) -> list[tuple[str, float]]:
        """A file's likeliest classes with their probabilities, the likeliest first; top: how many (5)."""
        return self._run(_classify(source, top, model, modality))

    def dequantize(
        self, codes: npt.ArrayLike, *, model: str | None = None, modality: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Codes ``[M', N]`` to quantized latents, float32 ``[N, d]``."""
        return self._run(_dequantize(codes, model, modality))

    def info(self) -> dict[str, Any]:
        """Version, limits and models."""
        return self._run(_INFO)

    def _run(self, call: _Call[T]) -> T:
        tries = self._tries()
        pause = next(tries)
        while True:
            time.sleep(pause)
            outcome: httpx.Response | Exception
            try:
                outcome = self._http.request(call.method, call.path, **call.options)
            except BROKEN as error:
                outcome = error
            try:
                pause = tries.send(outcome)
            except StopIteration as end:
                return call.read(end.value.content)


class AsyncClient(_Requests):
    """The same for asyncio; see `Client`."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60.0, retries: int = 5) -> None:
        super().__init__(url, key, timeout, retries)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def tokenize(self, source: Source, **options: Unpack[TokenizeOptions]) -> Codes:
        """See `Client.tokenize`."""
        return (await self.tokenize_many([source], **options))[0]

    async def tokenize_many(self, sources: Sequence[Source], **options: Unpack[TokenizeOptions]) -> list[Codes]:
        """See `Client.tokenize_many`."""
        if not sources:
            return []
        return await self._run(_tokenize(sources, **options))

    async def windows(
        self, source: Source, *, model: str | None = None, modality: str | None = None
    ) -> AsyncIterator[Window]:
        """See `Client.windows`."""
        method, path, options = _stream(source, model, modality)
        async with self._http.stream(method, path, **options) as answer:
            if not answer.is_success:
                await answer.aread()
            async for line in _check(answer).aiter_lines():
                if (window := _window(line)) is not None:
                    yield window

    async def encode(
        self, source: Source, *, pool: str = "mean", model: str | None = None, modality: str | None = None
    ) -> npt.NDArray[np.float32]:
        """See `Client.encode`."""
        return await self._run(_encode(source, pool, model, modality))

    async def classify(
        self, source: Source, *, top: int | None = None, model: str | None = None, modality: str | None = None
    ) -> list[tuple[str, float]]:
        """See `Client.classify`."""
        return await self._run(_classify(source, top, model, modality))

    async def dequantize(
        self, codes: npt.ArrayLike, *, model: str | None = None, modality: str | None = None
    ) -> npt.NDArray[np.float32]:
        """See `Client.dequantize`."""
        return await self._run(_dequantize(codes, model, modality))

    async def info(self) -> dict[str, Any]:
        """See `Client.info`."""
        return await self._run(_INFO)

    async def _run(self, call: _Call[T]) -> T:
        tries = self._tries()
        pause = next(tries)
        while True:
            await asyncio.sleep(pause)
            outcome: httpx.Response | Exception
            try:
                outcome = await self._http.request(call.method, call.path, **call.options)
            except BROKEN as error:
                outcome = error
            try:
                pause = tries.send(outcome)
            except StopIteration as end:
                return call.read(end.value.content)
