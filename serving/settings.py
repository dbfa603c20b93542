"""What an operator may set: by flag (``--max-batch 8``) or by environment (``BRIDLE_MAX_BATCH=8``); flags win."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bridle.cores import available_cores
from bridle.modalities.clip import Limits
from bridle.settings import RecipeError, Settings, nearest, parse_settings

PREFIX = "BRIDLE_"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/*\s]+|null")
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+")
"""What Kubernetes puts into ``BRIDLE_PORT`` where a Service is called bridle (docs: enableServiceLinks)."""
_SERVICE_NAME = re.compile(r"_SERVICE_(HOST|PORT)(_\w+)?=|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=|_PORT=(tcp|udp|sctp)://")
"""Other variables that Kubernetes sets for a Service."""


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_split)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class ServeSettings(Settings):
    """Settings of `bridle serve`."""

    models: Annotated[Words, Field(min_length=1)]
    """Model folders, comma-separated in the environment. The first of a modality is that modality's default.
    `NAME=FOLDER` serves it under a name of yours, which stays when another model takes its place."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address but loopback needs API keys."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one and logs it."""
    http_processes: Annotated[int, Field(ge=1, le=64)] = 1
    """HTTP processes behind the port, among which devices, decoders, cores and connections are shared out; more than
    one pays where the model is so fast that HTTP keeps one core busy."""
    root_path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~-]+)*/?$")] = ""
    """Path under which a proxy serves this, such as /bridle; requests may still have it. Told in openapi.json."""
    allowed_hosts: Words = ()
    """Host names that a request without API keys may name, beside localhost and loopback addresses."""
    api_keys: str | None = None
    """Hashed API keys, `name:scopes:sha256` and comma-separated. Make one with `bridle serve --new-key NAME`."""
    api_keys_file: str | None = None
    """File with one such key a line; read again when it changes."""
    cors_origins: Words = ()
    """Origins whose pages may call the service. None by default."""

    device: Words = ("auto",)
    """`cpu`, or GPUs such as `cuda:0,cuda:1`: a process for each model on each, two on a device named twice. `auto`
    takes all GPUs; where there is none, two processes on the CPU (one on a single core)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the transformer; the quantizer is always float32."""
    compile: bool = False
    """Whether to run the model through torch.compile; warm-up then takes a minute or more."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of each model process on the CPU; 0 shares all cores out among those of a model that are at work."""
    max_batch: Annotated[int, Field(ge=0, le=1024)] = 0
    """Clips in one forward pass at most; 0 takes 4 to 64, as many as have 1,600 positions (16,384 on a GPU)."""
    batches_under_way: Annotated[int, Field(ge=0, le=2)] = 0
    """Batches that a model process has at once; 0 takes 2 on a GPU, where one is received and copied while another is
    computed, and 1 on the CPU."""
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 10.0
    """How long a clip may wait for others that are already being decoded; an idle service never waits."""
    model_seconds: Seconds = 120.0
    """Time for one batch; a model process that takes longer is ended and replaced."""
    decode_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Decoding processes per model; 0 takes one per core, up to 4."""
    decode_memory_mb: Annotated[int, Field(ge=64)] = 2048
    """Memory a decoding process may take above what it starts with."""
    decode_seconds: Seconds = 30.0
    """Time for decoding one clip; the process is ended then."""
    decode_cpu_seconds: Seconds = 10.0
    """CPU time for decoding one clip: bounds files made to be slow, whoever else is at work."""

    max_bytes: Count = 64 * 1024 * 1024
    """Bytes of one request's body, and of one file in it."""
    max_clips: Count = 64
    """Files (or clips of codes) in one request."""
    max_seconds: Seconds = 3600.0
    """Seconds of sound or film in one file."""
    max_pixels: Count = 50_000_000
    """Pixels of a picture or frame."""
    max_frames: Count = 36_000
    """Frames of a film that may be decoded."""
    max_queue: Count = 128
    """Files accepted and not yet answered; one more gets 429."""
    max_queue_bytes: Count = 512 * 1024 * 1024
    """Bytes of all bodies and answers in memory; more gets 429."""
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of both queues, and of the decoders, that one key (or one address without keys) gets while others wait."""
    max_connections: Count = 4096
    """Open connections; for one more the longest idle one is closed. /livez and /readyz still find a place."""
    max_codes: Count = 4_000_000
    """Codes in one `/dequantize` request."""
    request_timeout: Seconds = 120.0
    """Seconds a request may take in all; `X-Request-Timeout` may lower it."""
    header_timeout: Seconds = 10.0
    """Seconds for a connection's request line and headers, and to keep an idle connection."""
    body_idle_timeout: Seconds = 10.0
    """Seconds without a byte of a body (or without the client taking a piece of the answer) before it is dropped."""
    min_receive_rate: Annotated[float, Field(ge=0)] = 1024.0
    """Bytes of a body a second, after 5 s; who sends more slowly gets 408."""
    min_send_rate: Annotated[float, Field(ge=0)] = 65536.0
    """Bytes of an answer a second, after 5 s; who reads more slowly is cut off."""
    lame_duck_seconds: Annotated[float, Field(ge=0)] = 3.0
    """Seconds after SIGTERM in which /readyz fails and everything else is still served."""
    drain_seconds: Seconds = 60.0
    """Seconds that requests in flight then have to finish."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe lines that are logged."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector (OTLP over HTTP, such as http://collector:4318); no traces unless set."""

    @model_validator(mode="after")
    def _consistent(self) -> ServeSettings:
        for name in ("api_keys", "api_keys_file"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"{name} is set but empty; remove it, or give keys (bridle serve --new-key NAME)")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"cors_origins: {origin!r} is no origin, and no page would be let in; name each as browsers do, "
                    "such as https://example.org or http://localhost:3000 (no path, no slash at the end, no *)"
                )
        if not self.has_keys and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is not loopback and no API keys are set; set api_keys or api_keys_file "
                "(make one with: bridle serve --new-key NAME), or listen on 127.0.0.1"
            )
        return self

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return self.api_keys is not None or self.api_keys_file is not None

    @property
    def limits(self) -> Limits:
        """What a decoder may be asked to unfold."""
        return Limits(
            max_bytes=self.max_bytes,
            max_seconds=self.max_seconds,
            max_pixels=self.max_pixels,
            max_frames=self.max_frames,
        )

    @property
    def decoders(self) -> int:
        """Decoding processes per model."""
        return self.decode_workers or min(4, available_cores())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> ServeSettings:
    """Settings from flags (those that are not None) over the environment.

    Raises:
        RecipeError: a wrong value; names the flag or variable, what was found and what was expected.
    """
    found: dict[str, Any] = {}
    for name in ServeSettings.model_fields:
        value = environment.get(variable(name))
        if value is not None and not (name == "port" and _SERVICE_LINK.fullmatch(value)):
            found[name] = value
    from_environment = {name for name in found if flags.get(name) is None}
    found |= {name: value for name, value in flags.items() if value is not None}
    if "models" not in found:
        raise RecipeError("no model folder given; write: bridle serve MODEL_DIR, or set BRIDLE_MODELS")
    try:
        return parse_settings(ServeSettings, found, "bridle serve")
    except RecipeError as error:
        told = str(error)
        for name in from_environment:
            told = re.sub(rf"(?<![\w.])'{name}(?=[.'])", f"{variable(name)}: \\g<0>", told)
        raise RecipeError(told) from None


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """One line for each ``BRIDLE_`` variable that is a misspelt setting, or stands for a Kubernetes Service."""
    known = {variable(name) for name in ServeSettings.model_fields}
    strange = [
        name
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in known and not _SERVICE_NAME.search(name + "=" + value)
    ]
    hints = ((name, nearest(name, known)) for name in strange)
    lines = [f"{name} is no setting of bridle serve{hint}" for name, hint in hints if "did you mean" in hint]
    if _SERVICE_LINK.fullmatch(port := environment.get(variable("port"), "")):
        lines.append(
            f"{variable('port')}={port} is a Kubernetes service link and is not read; set enableServiceLinks: false"
        )
    return lines
