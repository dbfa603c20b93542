"""Several HTTP processes behind one port, each a whole service with its share of devices, decoders and cores.

The kernel deals out connections (SO_REUSEPORT). What has to be one over all of them is shared: places by memory that
all count in (`web/counts.py`), /metrics and reloading by asking each other (`web/siblings.py`). The first process
starts the others, passes signals on to them, and replaces one that ends.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import tempfile
from pathlib import Path

from bridle.cores import available_cores
from bridle.processes.fleet import Fleet
from bridle.settings import parse_settings
from serving.engine.deployment import config_of
from serving.engine.devices import devices_of
from serving.engine.registry import named_folder
from serving.logs import flush, log, take_over_logging
from serving.run import bound, serve
from serving.settings import ServeSettings
from serving.web.counts import Counts, create
from serving.web.siblings import Siblings


def run_fleet(settings: ServeSettings) -> int:
    """Serves with `http_processes` until a signal ends it. Returns the exit code.

    Raises:
        ValueError, OSError: wrong settings, a port that is taken.
    """
    take_over_logging(settings.log_level)
    count = settings.http_processes
    for _, model in map(named_folder, settings.models):
        config_of(model)  # what is no model is told once, by us
    with bound(settings, shared=False) as alone:  # told by this one that somebody else listens there
        settings = settings.model_copy(update={"port": alone.getsockname()[1]})
    reserved = bound(settings, shared=True)  # it never listens, and keeps the port ours while processes come and go
    devices, salt, descriptor = devices_of(settings), secrets.token_bytes(16), create(count)
    counts = Counts(descriptor, 0, salt)

    def ended(number: int, code: int) -> bool:
        counts.forget(number)
        again = counts.was_started(number)
        if again:
            log("error", "an HTTP process ended; starting another", process=number, exit_code=code)
        return again

    with reserved, tempfile.TemporaryDirectory(prefix="bridle-") as folder:
        given = [
            {
                "settings": share_of(settings, number, devices).model_dump(mode="json"),
                "devices": [device.partition("#")[0] for device in devices],
                "salt": salt.hex(),
            }
            for number in range(count)
        ]
        command = [sys.executable, "-m", "bridle.cli", "serve", "--http-process"]
        return Fleet(
            [[*command, f"{number},{descriptor},{folder}"] for number in range(count)],
            [json.dumps(one).encode() + b"\n" for one in given],
            descriptor,
        ).run(ended)


def share_of(settings: ServeSettings, number: int, devices: list[str]) -> ServeSettings:
    """The settings of one HTTP process: its share of what the settings give to all of them."""
    count = settings.http_processes
    own = devices[number::count] or [devices[number % len(devices)]]
    workers = count * len(own) if len(devices) < count else len(devices)
    return settings.model_copy(
        update={
            "device": tuple(device.partition("#")[0] for device in own),
            "threads": settings.threads or max(1, available_cores() // workers),
            "decode_workers": math.ceil(settings.decoders / count),
            "max_connections": math.ceil(settings.max_connections / count),
        }
    )


def run_one(place: str) -> int:
    """One of the HTTP processes; what it is to do stands on standard input, whose end means that the first is gone.

    place: its number, the descriptor of the counts and the folder of the sockets.
    """
    number, descriptor, folder = place.split(",", 2)
    given = json.loads(sys.stdin.buffer.readline())
    settings = parse_settings(ServeSettings, given["settings"], "bridle serve")
    counts = Counts(int(descriptor), int(number), bytes.fromhex(given["salt"]))
    os.set_inheritable(int(descriptor), False)
    siblings = Siblings(int(number), settings.http_processes, Path(folder), counts, given["devices"])
    try:
        return serve(settings, siblings)
    finally:
        flush()
