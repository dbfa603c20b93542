"""What works on this machine, and what to do about what does not. Each check looks, and changes nothing."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from bridle.config import TrainSettings
from bridle.cores import available_cores

GIB = 2**30
SHARED_MEMORY = 2 * GIB
"""Bytes of /dev/shm for 8 ranks on recipe `audio`: each has 8 loaders with 3 batches of 16 x 512 KiB, in 3/4 of it."""
FREE_DISK = 5 * GIB
"""Bytes below which a run's checkpoints, or the cache of shards, may fill the disk."""
OPEN_FILES = 1024
"""Files that one process may hold open: every shard, and every tensor that a loader process hands over, is one."""
GLOO_SECONDS = timedelta(seconds=4)
METRICS_PORT = TrainSettings.model_fields["prometheus_port"].default
PORTS = {
    "DeepSpeed's rendezvous": (29500, "deepspeed --master_port PORT"),
    "training metrics": (METRICS_PORT, "the run takes another and logs it, or set train.prometheus_port"),
}


@dataclass(frozen=True)
class Check:
    """One finding. `blocks`: whether pretraining cannot run here until it is put right."""

    name: str
    status: Literal["ok", "warn", "missing"]
    found: str
    advice: str = ""
    blocks: bool = False


def examine(run: Path, cache: Path) -> list[Check]:
    """All checks; `run` and `cache` are the folders whose disks are looked at. Takes a few seconds."""
    checks: list[tuple[str, bool, Callable[[], Check | list[Check]]]] = [
        ("Python", True, check_python),
        ("packages", True, check_packages),
        ("torch", True, check_torch),
        ("torchvision", True, check_torchvision),
        ("torchaudio", True, lambda: check_import("torchaudio", "functional")),
        ("DeepSpeed", True, check_deepspeed),
        ("compiler", False, check_compiler),
        ("audio decoders", True, check_audio),
        ("FFmpeg codecs", True, check_codecs),
        ("image formats", False, check_images),
        ("decord", False, check_decord),
        ("ffmpeg command", False, check_ffmpeg),
        ("serving", False, check_serving),
        ("disk", True, lambda: [check_disk("run folder", run), check_disk("shard cache", cache)]),
        ("shared memory", False, check_shared_memory),
        ("open files", False, check_open_files),
        ("ranks", False, check_gloo),
        ("ports", False, check_ports),
    ]
    found: list[Check] = []
    for name, blocks, check in checks:
        try:
            result = check()
        except Exception as error:  # a doctor must not die of what it looks for
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            result = Check(name, "missing", reason, "run `make setup` again in a fresh environment", blocks)
        found += result if isinstance(result, list) else [result]
    return found


def check_python() -> Check:
    """Which Python this is (an older one than 3.11 cannot install bridle)."""
    return Check("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def check_packages() -> Check:
    """What pyproject.toml asks for, in versions that it allows."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires("bridle") or []]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": "train"})]
    faults = []
    for need in wanted:
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{need.name} is not installed")
        else:
            if not need.specifier.contains(version, prereleases=True):
                faults.append(f"{need.name} is {version}, expected {need.specifier}")
    if faults:
        return Check("packages", "missing", "; ".join(faults), "make setup, or pip install 'bridle[train]'", True)
    return Check("packages", "ok", f"all {len(wanted)} that pretraining needs, in versions it allows")


def check_torch() -> Check:
    """torch's build and devices, and whether they compute in bfloat16."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use ds_configs without it"
        counted = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
        return Check("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}: {counted} ({bf16})")
    ones = torch.ones(16, 16, dtype=torch.bfloat16)
    assert (ones @ ones).sum() == 16**3
    found = f"{torch.__version__}, CPU with {available_cores()} cores (bf16 computes)"
    if torch.version.cuda and shutil.which("nvidia-smi"):
        advice = f"the driver must support CUDA {torch.version.cuda}: see nvidia-smi; training would use the CPU"
        return Check("torch", "warn", f"{found}; nvidia-smi is here, but torch sees no GPU", advice)
    return Check("torch", "ok", found)


def check_torchvision() -> Check:
    """torchvision's compiled part fits torch."""
    import torch
    import torchvision

    kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    assert kept.tolist() == [0]
    return Check("torchvision", "ok", f"{torchvision.__version__}, fits torch")


def check_import(name: str, *parts: str) -> Check:
    """A package that imports, with some of its parts."""
    module = importlib.import_module(name)
    for part in parts:
        importlib.import_module(f"{name}.{part}")
    return Check(name, "ok", f"{getattr(module, '__version__', metadata.version(name))}, fits torch")


def check_deepspeed() -> list[Check]:
    """DeepSpeed, its accelerator, and its compiled operations, none of which the shipped configurations need."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from torch.utils.cpp_extension import get_default_build_root

    accelerator = get_accelerator()
    backend = accelerator.communication_backend_name()
    found = f"{deepspeed.__version__}, accelerator {accelerator.device_name()}, {backend} between ranks"
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    ready = {name for name, installed in installed_ops.items() if installed}
    ready |= {library.stem for library in cache.glob("**/*.so")} & set(ALL_OPS)
    buildable = sorted(name for name, builder in ALL_OPS.items() if name not in ready and _is_compatible(builder))
    buildable = [name for name in buildable if name != "deepspeed_not_implemented"]
    ops = f"built: {', '.join(sorted(ready)) or 'none'}; can be built on first use: {', '.join(buildable) or 'none'}"
    return [
        Check("DeepSpeed", "ok", found),
        Check("DeepSpeed ops", "ok", f"{ops}; the configurations in ds_configs/ need none"),
    ]


def _is_compatible(builder: Any) -> bool:
    with suppress(Exception):  # a CUDA op's builder raises where there is no CUDA toolkit
        return bool(builder.is_compatible(verbose=False))
    return False


def check_compiler() -> Check:
    """A C++ compiler and ninja, for DeepSpeed's own optimizers and offloading."""
    name = os.environ.get("CXX") or "c++"
    compiler = shutil.which(name) or shutil.which("g++") or shutil.which("clang++")
    beside = Path(sys.executable).parent / "ninja"
    ninja = shutil.which("ninja") or (str(beside) if beside.is_file() else None)
    if compiler and ninja:
        return Check("compiler", "ok", f"{compiler}, ninja at {ninja}")
    parts = {f"C++ compiler ({name})": compiler, "ninja": ninja}
    lacking = " and ".join(part for part, path in parts.items() if not path)
    advice = "needed only for DeepSpeed's compiled ops, none of which ds_configs/ use (Debian: apt-get install g++)"
    return Check("compiler", "warn", f"no {lacking}", advice)


def check_audio() -> Check:
    """Formats that soundfile decodes, and soxr, which resamples."""
    import soundfile
    import soxr

    formats = soundfile.available_formats()
    lacking = [name for name in ("WAV", "FLAC", "OGG", "MP3") if name not in formats]
    found = f"soundfile {soundfile.__version__}, soxr {soxr.__version__}"
    if lacking:
        advice = "install the soundfile wheel of requirements.lock, which brings its own libsndfile"
        return Check("audio decoders", "warn", f"{found}; no {', '.join(lacking)}", advice)
    return Check("audio decoders", "ok", f"{found}: wav, flac, ogg, mp3")


def check_codecs() -> Check:
    """Codecs of the FFmpeg inside PyAV."""
    import av

    wanted = ("opus", "aac", "h264", "hevc", "vp9", "av1")
    lacking = [name for name in wanted if name not in av.codecs_available]
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    found = f"PyAV {av.__version__} with libavcodec {ffmpeg}"
    if lacking:
        advice = "install the av wheel of requirements.lock, which brings its own FFmpeg"
        return Check("FFmpeg codecs", "warn", f"{found}; no {', '.join(lacking)}", advice)
    return Check("FFmpeg codecs", "ok", f"{found}: {', '.join(wanted)}")


def check_images() -> Check:
    """Formats of this Pillow."""
    import PIL
    from PIL import features

    formats = {"jpg": "JPEG", "zlib": "PNG", "webp": "WebP", "avif": "AVIF"}
    lacking = [name for feature, name in formats.items() if not features.check(feature)]
    if lacking:
        advice = "install the pillow wheel of requirements.lock"
        return Check("image formats", "warn", f"Pillow {PIL.__version__}; no {', '.join(lacking)}", advice)
    return Check("image formats", "ok", f"Pillow {PIL.__version__}: {', '.join(formats.values())}")


def check_decord() -> Check:
    """decord, a second video decoder for trusted shards."""
    try:
        import decord
    except (ImportError, OSError) as error:
        advice = "optional: PyAV decodes all video; decord has wheels for x86-64 only"
        return Check("decord", "warn", f"not usable ({' '.join(str(error).split())[:100]})", advice)
    return Check("decord", "ok", f"{decord.__version__} (optional)")


def check_ffmpeg() -> Check:
    """The ffmpeg command, which nothing in the package calls."""
    path = shutil.which("ffmpeg")
    return Check("ffmpeg command", "ok", path or "not installed, and not needed: PyAV brings its own FFmpeg")


def check_serving() -> Check:
    """The extra `serving`."""
    packages = ("fastapi", "uvicorn", "python-multipart", "pyarrow")
    try:
        versions = [f"{name} {metadata.version(name)}" for name in packages]
    except metadata.PackageNotFoundError as error:
        advice = "for `bridle serve`: pip install '.[serving]'"
        return Check("serving", "warn", f"{error.name} is not installed", advice)
    return Check("serving", "ok", ", ".join(versions))


def check_disk(name: str, folder: Path) -> Check:
    """Free space, and leave to write, where `folder` is or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / GIB:.1f} GiB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "missing", f"{folder}: {there} cannot be written to", "choose another folder", True)
    if free < FREE_DISK:
        advice = "a large model's checkpoints take more; free some space or choose another disk"
        return Check(name, "warn", found, advice)
    return Check(name, "ok", found)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Room for what loader processes hand over."""
    if not folder.is_dir():
        return Check("shared memory", "ok", f"no {folder} on this system; loaders use its own way")
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / GIB:.2f} GiB free"
    if free < SHARED_MEMORY:
        advice = "large batches go through pipes, slower: docker run --shm-size=2g (Kubernetes: emptyDir in memory)"
        return Check("shared memory", "warn", found, advice)
    return Check("shared memory", "ok", found)


def check_open_files() -> Check:
    """The soft limit on open files."""
    try:
        import resource
    except ImportError:
        return Check("open files", "ok", "no limit to read on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return Check("open files", "warn", f"at most {limit}", f"ulimit -n {min(65536, hard) if hard > 0 else 65536}")
    return Check("open files", "ok", f"at most {limit}")


def check_gloo() -> Check:
    """Two ranks, here two threads, sum a tensor over loopback as CPU ranks do in a run."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Check("ranks", "warn", "this torch has no gloo", "one CPU process works; more need another torch build")
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=GLOO_SECONDS)
    sums, faults = [torch.full((4,), float(rank)) for rank in (1, 2)], []

    def join(rank: int) -> None:
        try:
            own = store if rank == 0 else dist.TCPStore("127.0.0.1", store.port, 2, False, GLOO_SECONDS)
            group: Any = dist.ProcessGroupGloo(own, rank, 2, GLOO_SECONDS)
            group.allreduce([sums[rank]]).wait()
        except (RuntimeError, ValueError) as error:
            faults.append(" ".join(str(error).split())[:160])

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * GLOO_SECONDS.total_seconds())
    if faults or any(values.tolist() != [3.0] * 4 for values in sums):
        interfaces = ", ".join(name for _, name in socket.if_nameindex())
        advice = f"set GLOO_SOCKET_IFNAME to one of {interfaces}; see that this host's name resolves"
        return Check("ranks", "warn", f"gloo cannot sum over two ranks: {faults[0] if faults else 'no answer'}", advice)
    return Check("ranks", "ok", "gloo sums over two ranks on this machine")


def check_ports() -> Check:
    """Ports that a run listens on."""
    taken = []
    for use, (port, instead) in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append((f"{port} ({use})", instead))
    if taken:
        busy = ", ".join(port for port, _ in taken)
        return Check("ports", "warn", f"taken: {busy}", "; ".join(advice for _, advice in taken))
    return Check("ports", "ok", f"free: {', '.join(f'{port} ({use})' for use, (port, _) in PORTS.items())}")
