"""Running the service: start, listen, reload on SIGHUP, drain on SIGTERM, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import sys

import uvicorn

from bridle.processes.confinement import STOPS
from bridle.processes.memory import keep_large_blocks_apart
from bridle.settings import RecipeError
from serving.logs import log, take_over_logging
from serving.settings import ServeSettings
from serving.web.app import build_app
from serving.web.protocol import BoundedProtocol, bounded_protocol
from serving.web.service import Service
from serving.web.siblings import Siblings

BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted."""
SWITCH_SECONDS = 0.001
"""After which a thread lets the event loop have the interpreter."""
SPARE_FILES = 512
"""Open files beside connections: processes, models, libraries, probes."""


def serve(settings: ServeSettings, siblings: Siblings | None = None) -> int:
    """Serves until a signal ends it. Returns the exit code.

    siblings: the HTTP processes, where this is one of several.

    Raises:
        ValueError, OSError, RuntimeError: wrong settings, a model that does not start, a port that is taken.
    """
    take_over_logging(settings.log_level)
    keep_large_blocks_apart()
    sys.setswitchinterval(SWITCH_SECONDS)
    most = _allow_files(settings.max_connections + SPARE_FILES) - SPARE_FILES
    service = Service(settings, siblings)
    listener = None if siblings is not None and siblings.replaces else _listen(settings, shared=siblings is not None)
    loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()  # uvloop where it is there
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_serve(service, listener, min(settings.max_connections, max(64, most))))


async def _serve(service: Service, listener: socket.socket | None, connections: int) -> int:
    """listener: none where others listen meanwhile; then there is one when the models are warm."""
    settings, siblings = service.settings, service.siblings
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
        backlog=BACKLOG,
    )
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload_in_background)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # one of several begins with them blocked
    if siblings is not None:
        loop.add_reader(sys.stdin.fileno(), _gone, loop, ending)
    starting = asyncio.create_task(service.start())
    stop = asyncio.create_task(ending.wait())
    server, listening = _Server(config, siblings), None
    try:
        if listener is None:
            await asyncio.wait({stop, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return 0
            await starting
            listener = _listen(settings, shared=True)
        host, port = listener.getsockname()[:2]
        listening = asyncio.create_task(server.serve(sockets=[listener]))
        log("info", "listening", host=host, port=port)
        await asyncio.wait({stop, listening, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # a model that does not start ends the service with its error
            gc.collect()
            gc.freeze()  # else each full collection looks through all that was imported, and holds the loop for 20 ms
            if service.all_started:
                log("info", "ready", host=host, port=port)
            await asyncio.wait({stop, listening}, return_when=asyncio.FIRST_COMPLETED)
            service.drain()
            await asyncio.wait({listening}, timeout=settings.lame_duck_seconds)
        server.should_exit = True
        await listening
        return 0
    finally:
        server.should_exit = True
        for task in (stop, starting):
            task.cancel()
        await asyncio.gather(starting, *([listening] if listening else []), return_exceptions=True)
        await service.close()
        if listener is not None:
            listener.close()
        log("info", "ended")


def _gone(loop: asyncio.AbstractEventLoop, ending: asyncio.Event) -> None:
    """Standard input has ended, and with it the process that started this one."""
    loop.remove_reader(sys.stdin.fileno())
    ending.set()


class _Server(uvicorn.Server):
    """uvicorn's server without its own handling of signals, and with a door for the other HTTP processes."""

    def __init__(self, config: uvicorn.Config, siblings: Siblings | None) -> None:
        super().__init__(config)
        self._siblings = siblings

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Leaves signals to `serve`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if self._siblings is None:
            return

        def protocol() -> asyncio.Protocol:
            kind: type[BoundedProtocol] = self.config.http_protocol_class  # type: ignore[assignment]
            return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        self._siblings.door.unlink(missing_ok=True)
        server = await asyncio.get_running_loop().create_unix_server(protocol, str(self._siblings.door))
        self.servers.append(server)


def bound(settings: ServeSettings, *, shared: bool) -> socket.socket:
    """A socket at the address of the settings; `shared`, beside others there that are shared, too.

    Raises:
        RecipeError: somebody else listens there, or we may not.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        sock.close()
        raise RecipeError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    return sock


def _listen(settings: ServeSettings, *, shared: bool) -> socket.socket:
    listener = bound(settings, shared=shared)
    listener.listen(BACKLOG)
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
