"""Two instances behind a balancer that asks for readiness, as Kubernetes does, are restarted one after the other."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from running_service import Server, serving

PROBE_SECONDS = 0.2
CLIENTS = 4
THINK_SECONDS = 0.05
"""Without it the clients alone fill two cores, and each new instance takes long to start."""


class Balancer:
    """Clients in a closed loop over the instances that are ready; counts the statuses, 0 for no answer."""

    def __init__(self, instances: dict[str, Server], contents: list[bytes]) -> None:
        self.instances, self.contents = instances, contents
        self.ready: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.served: Counter[str] = Counter()
        self._stop = threading.Event()
        jobs = [self._probe, *[self._ask] * CLIENTS]
        self._threads = [threading.Thread(target=job) for job in jobs]

    def __enter__(self) -> Balancer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _probe(self) -> None:
        while not self._stop.wait(PROBE_SECONDS):
            self.ready = [url for url in list(self.instances) if _is_ready(url)]

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            turn = 0
            while not self._stop.is_set():
                if not (ready := self.ready):
                    time.sleep(PROBE_SECONDS)
                    continue
                turn += 1
                url = ready[turn % len(ready)]
                try:
                    status = client.post(
                        f"{url}/tokenize", content=self.contents[turn % len(self.contents)]
                    ).status_code
                except httpx.TransportError:
                    status = 0
                self.statuses[status] += 1
                self.served[url] += status == 200
                time.sleep(THINK_SECONDS)

    def wait_until_served_by(self, url: str, more: int = 10) -> None:
        wanted, end = self.served[url] + more, time.monotonic() + 300
        while self.served[url] < wanted:
            assert time.monotonic() < end, f"{url} serves nothing; statuses {self.statuses}"
            time.sleep(0.05)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_rolling_restart_under_load_fails_no_request(tmp_path: Path, audio_folder: Path, sounds: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:

        def start(name: str, lame_duck_seconds: int) -> Server:
            folder = tmp_path / name
            folder.mkdir()
            return stack.enter_context(serving(folder, audio_folder, lame_duck_seconds=lame_duck_seconds))

        instances = {server.url: server for server in (start("first", 12), start("second", 12))}
        with Balancer(instances, sounds) as balancer:
            for number, old in enumerate(list(instances)):
                balancer.wait_until_served_by(old)
                instances[old].process.send_signal(signal.SIGTERM)
                assert instances[old].process.wait(300) == 0
                del instances[old]
                new = start(f"again-{number}", 0)
                instances[new.url] = new
                balancer.wait_until_served_by(new.url)
    assert set(balancer.statuses) == {200}, balancer.statuses
