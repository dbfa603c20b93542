"""How the ranks of a run find each other: a roll call before any collective, so that what is wrong has a name.

Libraries wait for half an hour for a peer that cannot be reached, and then say "timed out". So all ranks first meet at
a store at MASTER_ADDR:MASTER_PORT. There rank 0 is admitted to the run folder, all say where they are and at which
address gloo listens, and each tries to reach one on another machine; rank 0's verdict ends the start of all alike.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from bridle.gpus import device_index
from bridle.ports import free_port
from bridle.settings import OneRankError, RecipeError
from bridle.training.ranks import Ranks

log = logging.getLogger("bridle")
PATIENCE = 45.0
"""Seconds for what does not depend on how soon the other machines start: a name, a route, an answer from this one."""
MARGIN = timedelta(minutes=2)
"""How much longer the collectives wait than the watchdog, which says more."""


@dataclass(frozen=True)
class Place:
    """Where a rank is. machine: the same for ranks that share a network; address, port: where it can be reached, on
    the interface that gloo takes; without an address, `interfaces` says why; gpu: its GPU's own name, empty on a CPU.
    """

    rank: int
    host: str
    machine: str
    address: str
    port: int
    interfaces: str
    gpu: str


def join(timeout: float = 600.0, admit: Callable[[], None] = lambda: None) -> Ranks:
    """Joins the group that the environment describes (none: a group of one).

    timeout: seconds to wait for ranks that are not there yet; admit: what rank 0 does first, while the others wait.

    Raises:
        RecipeError: a variable that makes no sense, or admit's, on all ranks.
        OSError: the ranks cannot meet; names the variable to set.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if "LOCAL_RANK" not in os.environ and "SLURM_LOCALID" in os.environ:
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]  # of a rank that srun started by itself
    rank, world, local = _whole("RANK", 0), _whole("WORLD_SIZE", 1), _whole("LOCAL_RANK", 0)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # The shared-memory op is compiled on first use, for a minute, with a compiler that may not be there; gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        local = device_index(local, accelerator.device_count())
        os.environ["LOCAL_RANK"] = str(local)  # by which DeepSpeed takes its device
    accelerator.set_device(local)
    store = _meet(rank, timeout, admit)  # kept until the group has its own: rank 0's last one ends the server
    _roll_call(dist.PrefixStore("bridle", store), rank, world, timeout, admit)
    limit = timedelta(seconds=timeout) + MARGIN
    # nccl's own watchdog ends a process by SIGABRT after 8 minutes in which its thread got no word: before ours speaks.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil((limit + MARGIN).total_seconds())))
    deepspeed.init_distributed(
        accelerator.communication_backend_name(), auto_mpi_discovery=False, timeout=limit, verbose=False
    )
    control = dist.new_group(backend="gloo", timeout=limit)
    assert isinstance(control, dist.ProcessGroup)
    device = torch.device("cpu" if accelerator.device_name() == "cpu" else accelerator.device_name(local))
    return Ranks(rank, world, device, control, local=local)


def leave() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _whole(name: str, default: int) -> int:
    text = os.environ.setdefault(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise OneRankError(f"the environment's {name} is '{text}'; expected a whole number")
    return int(text)


def _meet(rank: int, timeout: float, admit: Callable[[], None]) -> dist.Store:
    """The store, which rank 0 (or torchrun) serves; waits for it.

    Raises:
        OSError: MASTER_ADDR does not resolve or leads to this machine while rank 0 is on another; the port is taken.
    """
    address, port = os.environ["MASTER_ADDR"], _whole("MASTER_PORT", 0)
    loopback = _resolved(address)
    if rank and loopback:
        _wait_for_an_answer(address, port)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except dist.DistNetworkError as error:
        if rank == 0:
            admit()  # where the port is taken by a run in the same folder, that is what to say
        raise OSError(
            f"the ranks cannot meet at {address}:{port} ({str(error).splitlines()[0]}); if another job on this machine"
            " uses that port, give one with deepspeed --master_port PORT; if rank 0 is elsewhere, set MASTER_ADDR"
        ) from None
    assert isinstance(store, dist.Store)
    return store


def _resolved(address: str) -> bool:
    """Waits until a name resolves; whether it leads to this machine itself."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            return all(_is_loopback(str(entry[4][0])) for entry in found)
        except OSError as error:
            if time.monotonic() > until:
                raise OSError(
                    f"MASTER_ADDR={address} does not resolve ({error.strerror}); set MASTER_ADDR to the name or address"
                    " of rank 0's machine"
                ) from None
        time.sleep(1.0)


def _wait_for_an_answer(address: str, port: int) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise OSError(
                    f"nothing answers at MASTER_ADDR={address}, MASTER_PORT={port}, and that address is this machine"
                    " itself; set MASTER_ADDR to the name or address of rank 0's machine"
                ) from None
        time.sleep(0.2)


def _roll_call(store: dist.Store, rank: int, world: int, timeout: float, admit: Callable[[], None]) -> None:
    """Raises the same on all ranks: RecipeError or OSError."""
    if world == 1:
        return admit()
    try:
        with _door() as (address, port, problem):
            here = Place(rank, socket.gethostname(), _network(), address, port, problem or _interfaces(), _gpu())
            store.set(f"place/{rank}", json.dumps(asdict(here)))
            if rank == 0:
                _preside(store, world, timeout, admit)
            else:
                _obey(store, rank, timeout)
    except dist.DistError as error:
        raise OSError(f"rank 0 went away while the ranks were meeting ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def _door() -> Iterator[tuple[str, int, str]]:
    """Listens where gloo will: the address, the port, and what is wrong where there is no address."""
    try:
        address = gloo_address()
        door = socket.create_server((address, 0), family=_family(address))
    except OSError as error:
        yield "", 0, str(error)
        return
    with door:
        yield address, door.getsockname()[1], ""


def _preside(store: dist.Store, world: int, timeout: float, admit: Callable[[], None]) -> None:
    """Rank 0: is admitted, waits for all, has them try their ways, and gives the verdict."""
    verdict: list[str | bool] | None = None
    try:
        admit()
        places = [Place(**json.loads(text)) for text in _collect(store, "place", world, timeout, "did not come")]
        _refuse_addresses(places)
        refuse_shared_gpus(places)
        store.set("all", json.dumps([asdict(place) for place in places]))
        store.set("way/0", _try_the_way(places, 0))
        lost = [text for text in _collect(store, "way", world, PATIENCE, "came and went silent") if text]
        if lost:
            advice = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface between the nodes"
            raise OSError(f"{'; '.join(lost[:3])}; {advice}")
    except (RecipeError, OSError) as error:
        verdict = [isinstance(error, RecipeError), str(error)]
        raise
    finally:
        store.set("verdict", json.dumps(verdict))
        if verdict is not None:
            _let_them_read(store, world)


def _obey(store: dist.Store, rank: int, timeout: float) -> None:
    """Tries the way to a rank on another machine, and waits for the verdict."""
    until = time.monotonic() + timeout + 4 * PATIENCE
    tried = False
    while not store.check(["verdict"]):
        if not tried and store.check(["all"]):
            tried = True
            store.set(f"way/{rank}", _try_the_way([Place(**place) for place in json.loads(store.get("all"))], rank))
        if time.monotonic() > until:
            raise OSError(f"rank 0 answers at {os.environ['MASTER_ADDR']} but says nothing; see what it prints")
        time.sleep(0.05)
    verdict = json.loads(store.get("verdict"))
    store.set(f"read/{rank}", "")
    if verdict is not None:
        raise RecipeError(verdict[1]) if verdict[0] else OSError(f"rank 0 ended: {verdict[1]}")


def _let_them_read(store: dist.Store, world: int) -> None:
    """The store ends with rank 0."""
    until = time.monotonic() + 2.0
    keys = [f"read/{rank}" for rank in range(1, world)]
    while time.monotonic() < until and not store.check(keys):
        time.sleep(0.05)


def _collect(store: dist.Store, what: str, world: int, timeout: float, otherwise: str) -> list[str]:
    until = time.monotonic() + timeout
    missing = list(range(world))
    while missing:
        missing = [rank for rank in missing if not store.check([f"{what}/{rank}"])]
        if missing and time.monotonic() > until:
            raise OSError(f"{ranks_named(missing)} of {world} {otherwise} within {timeout:.0f} s; see what they print")
        time.sleep(0.05 if missing else 0.0)
    return [store.get(f"{what}/{rank}").decode() for rank in range(world)]


def _refuse_addresses(places: list[Place]) -> None:
    for place in places:
        if not place.address:
            raise OSError(f"rank {place.rank} on {place.host}: {place.interfaces}")
    if len({place.machine for place in places}) == 1:
        return
    for place in places:
        if _is_loopback(place.address):
            raise OSError(
                f"rank {place.rank} on {place.host} would listen at {place.address}, where no other machine reaches it;"
                f" set GLOO_SOCKET_IFNAME there to the interface that leads to the others (it has {place.interfaces})"
            )


def refuse_shared_gpus(places: Sequence[Place]) -> None:
    """Raises RecipeError where two ranks would compute on one GPU, which nccl cannot."""
    owners: dict[str, Place] = {}
    for place in places:
        other = owners.setdefault(place.gpu, place)
        if place.gpu and other is not place:
            raise RecipeError(
                f"ranks {other.rank} and {place.rank} on {place.host} have the same GPU ({place.gpu}); start as many"
                " ranks on a node as it has GPUs: deepspeed without --num_gpus does"
            )


def _gpu() -> str:
    if not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _try_the_way(places: list[Place], rank: int) -> str:
    """Connects to the next rank on another machine; what is wrong, or nothing."""
    here = places[rank]
    others = [place for place in places[rank:] + places[:rank] if place.machine != here.machine]
    if not others:
        return ""
    there = others[0]
    try:
        socket.create_connection((there.address, there.port), timeout=PATIENCE / 2).close()
    except OSError as error:
        return (
            f"rank {rank} on {here.host} ({here.address}) cannot reach rank {there.rank} on {there.host} at"
            f" {there.address} ({error.strerror or error})"
        )
    return ""


def gloo_address() -> str:
    """The address that gloo listens at: of GLOO_SOCKET_IFNAME's interface, or the host name's, or the loopback.

    Raises:
        OSError: no such interface.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if name:
        entries = psutil.net_if_addrs().get(name, [])
        for family in (socket.AF_INET, socket.AF_INET6):
            for entry in entries:
                if entry.family == family:
                    return entry.address
        raise OSError(
            f"GLOO_SOCKET_IFNAME={name}: no such interface with an address here; there are {_interfaces()}; set"
            " GLOO_SOCKET_IFNAME to one of them"
        )
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
                return str(address[0])
    return "127.0.0.1"


def ranks_named(numbers: list[int]) -> str:
    """``rank 3``, or ``ranks 1, 2, 5``; of many, the first few."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(map(str, numbers[:8]))}" + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _interfaces() -> str:
    found = [
        f"{name} {entry.address}"
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    ]
    return ", ".join(found) or "none"


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "localhost")


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _network() -> str:
    """Names the network stack that this process is in: of this boot of this machine, or of a container."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/net")):  # noqa: PTH115
        with contextlib.suppress(OSError):
            parts.append(read().strip())
    return " ".join(parts)
