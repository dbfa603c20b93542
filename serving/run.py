"""Running the service: start, listen, reload on SIGHUP, drain on SIGTERM, end."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket

import uvicorn

from bridle.settings import RecipeError
from serving.logs import log, take_over_logging
from serving.settings import ServeSettings
from serving.web.app import build_app
from serving.web.protocol import bounded_protocol
from serving.web.service import Service

SPARE_FILES = 512
"""Open files beside connections: processes, models, libraries, probes."""


def run(settings: ServeSettings) -> int:
    """Serves until a signal ends it. Returns the exit code.

    Raises:
        ValueError, OSError, RuntimeError: wrong settings, a model that does not start, a port that is taken.
    """
    take_over_logging(settings.log_level)
    most = _allow_files(settings.max_connections + SPARE_FILES) - SPARE_FILES
    service = Service(settings)
    listener = _listen(settings)
    with contextlib.closing(listener):
        loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()  # uvloop where it is there
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_serve(service, listener, min(settings.max_connections, max(64, most))))


async def _serve(service: Service, listener: socket.socket, connections: int) -> int:
    settings = service.settings
    config = uvicorn.Config(
        build_app(service),
        http=bounded_protocol(connections, settings.header_timeout),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, int(settings.header_timeout)),
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        backlog=2048,
    )
    server = _Server(config)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload_in_background)
    service.stop = ending.set
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(service.start())
    try:
        host, port = listener.getsockname()[:2]
        log("info", "listening", host=host, port=port)
        stop = asyncio.create_task(ending.wait())
        await asyncio.wait({stop, listening, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # a model that does not start ends the service with its error
            log("info", "ready", host=host, port=port)
            await asyncio.wait({stop, listening}, return_when=asyncio.FIRST_COMPLETED)
            service.drain()
            await asyncio.wait({listening}, timeout=settings.lame_duck_seconds)
        stop.cancel()
        server.should_exit = True
        await listening
        return 0
    finally:
        server.should_exit = True
        starting.cancel()
        await asyncio.gather(starting, listening, return_exceptions=True)
        await service.close()
        log("info", "ended")


class _Server(uvicorn.Server):
    """uvicorn's server without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Leaves signals to `run`."""
        yield


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        listener.close()
        raise RecipeError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def _allow_files(wanted: int) -> int:
    """Raises the limit of open files; returns what it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log("warning", "few open files are allowed; raise ulimit -n", allowed=allowed, wanted=wanted)
    return allowed
