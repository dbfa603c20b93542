#!/usr/bin/env python3
"""Builds both images and starts each as the cluster would: another user, a read-only root, 64 MB of shared memory.

One short training run in the first; the second answers a request with the codes of the model that the first left.
Docker where its engine answers, else buildah (as root, with chroot isolation):

    python3 docker/build_and_check.py
    python3 docker/build_and_check.py --base /tmp/bookworm --volume /etc/ssl/certs:/etc/ssl/certs:ro

The base may be a folder, made with `debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates`.
Takes 15 GB of disk under buildah, and 10 minutes. Exit code 0: everything held.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
USER = 10001
EXTRAS = {"train": ("deepspeed", "fastapi"), "serve": ("fastapi", "deepspeed")}
"""What each image has, and what it must not have."""
STEPS = {1: 20, 2: 1, 3: 1}
"""Of each phase of the recipe, so that it takes seconds."""
began = time.monotonic()
started: list[subprocess.Popen[str]] = []


def say(text: str) -> None:
    print(f"[{time.monotonic() - began:6.0f} s] {text}", flush=True)


def output(words: list[str], **more: Any) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, **more).stdout.strip()


def begun(words: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started.append(process)
    return process


class Docker:
    """Images and containers of a Docker engine."""

    name = "docker"

    def build(self, file: str, tag: str, arguments: list[str], volumes: list[str]) -> None:
        if volumes:
            sys.exit("--volume is buildah's; give Docker's build what it needs by its own configuration")
        subprocess.run(["docker", "build", "--file", file, "--tag", tag, *arguments, "."], cwd=ROOT, check=True)

    def config(self, tag: str) -> dict[str, Any]:
        return json.loads(output(["docker", "image", "inspect", tag]))[0]["Config"]

    def start(self, tag: str, words: list[str], mounts: dict[Path, str], **environment: str) -> subprocess.Popen[str]:
        entry, rest = words[:1], words[1:]
        command = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "host", "--shm-size", "64m"]
        command += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--entrypoint", *entry]
        command += [word for place, inside in mounts.items() for word in ("--volume", f"{place}:{inside}")]
        command += [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
        return begun([*command, tag, *rest])

    def stop(self, process: subprocess.Popen[str]) -> None:
        process.terminate()  # docker run passes it on

    def remove(self, tag: str) -> None:
        subprocess.run(["docker", "image", "rm", tag], check=True)


class Buildah:
    """The same without an engine: buildah builds, and a container is a chroot in namespaces of its own."""

    name = "buildah"

    def __init__(self, store: Path) -> None:
        self.buildah = ["buildah", "--root", str(store / "root"), "--runroot", str(store / "run")]
        self.buildah += ["--storage-driver", "vfs"]
        self.roots: dict[str, tuple[str, Path]] = {}

    def import_base(self, folder: Path) -> str:
        container = output([*self.buildah, "from", "scratch"])
        output([*self.buildah, "copy", container, str(folder), "/"])
        output([*self.buildah, "commit", "--rm", container, "localhost/bridle-base:debootstrap"])
        return "localhost/bridle-base:debootstrap"

    def build(self, file: str, tag: str, arguments: list[str], volumes: list[str]) -> None:
        command = [*self.buildah, "build", "--isolation", "chroot", "--format", "docker", "--pull-never"]
        command += [word for volume in volumes for word in ("--volume", volume)]
        command += ["--file", file, "--tag", tag, *arguments, "."]
        subprocess.run(command, cwd=ROOT, check=True)

    def config(self, tag: str) -> dict[str, Any]:
        return json.loads(output([*self.buildah, "inspect", "--type", "image", tag]))["Docker"]["config"]

    def start(self, tag: str, words: list[str], mounts: dict[Path, str], **environment: str) -> subprocess.Popen[str]:
        if tag not in self.roots:
            container = output([*self.buildah, "from", "--pull-never", tag])
            root = Path(output([*self.buildah, "mount", container]))
            self.roots[tag] = container, root
            for name in ("hosts", "resolv.conf"):  # an engine puts its own there
                shutil.copy(f"/etc/{name}", root / "etc" / name)
        root = self.roots[tag][1]
        config = self.config(tag)
        inside = [f"cd {shlex.quote(config['WorkingDir'])} && exec {shlex.join(words)}"]
        variables = [*config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        user, _, group = config["User"].partition(":")
        drop = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups", "--no-new-privs"]
        drop += ["--bounding-set=-all", "--inh-caps=-all"]
        steps = [
            f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}",
            f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o size=64m,mode=1777 tmpfs {root}/dev/shm",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
            *(f"mount --bind {place} {root}{inside}" for place, inside in mounts.items()),
            f"exec chroot {root} " + shlex.join([*drop, "env", "-i", *variables, "sh", "-c", *inside]),
        ]  # fmt: skip
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(steps)]
        return begun(command)

    def stop(self, process: subprocess.Popen[str]) -> None:
        """SIGTERM to the container's first process, which is the child of unshare."""
        child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(child), 15)

    def remove(self, tag: str) -> None:
        if tag in self.roots:
            output([*self.buildah, "rm", self.roots.pop(tag)[0]])
        output([*self.buildah, "rmi", "--force", tag])


def ended(tool: Any, tag: str, words: list[str], mounts: dict[Path, str] | None = None, **environment: str) -> tuple:
    process = tool.start(tag, words, mounts or {}, **environment)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def check_image(tool: Any, kind: str, tag: str) -> dict[str, Any]:
    """What holds for both: user, labels, health check, a root that cannot be written, no foreign libraries."""
    config = tool.config(tag)
    assert config["User"] == f"{USER}:{USER}", config["User"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["title"] == f"bridle-{kind}" and labels["revision"] != "unknown", labels
    assert config["Healthcheck"]["Test"][0] == "CMD", config
    code, said = ended(tool, tag, ["sh", "-c", "id -u; touch /x /opt/bridle/x /usr/x 2>&1; python3 --version"])
    assert said.startswith(f"{USER}\n") and said.count("Read-only file system") == 3, said
    has, lacks = EXTRAS[kind]
    code, said = ended(tool, tag, ["python3", "-c", f"import {has}; print('has', {has}.__version__); import {lacks}"])
    assert code == 1 and f"No module named '{lacks}'" in said, said
    say(f"{tag}: user {USER}, read-only root, version {labels['version']}, revision {labels['revision']}")
    say(f"{tag}: has {has}, lacks {lacks}")
    return config


def healthy(tool: Any, tag: str, config: dict[str, Any], process: subprocess.Popen[str], **environment: str) -> None:
    """Waits until the image's own health check succeeds; the network is the host's."""
    words = config["Healthcheck"]["Test"][1:]
    while ended(tool, tag, words, **environment)[0] != 0:
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}:\n{process.stdout.read()}")  # type: ignore[union-attr]
        time.sleep(0.5)
    say(f"{tag}: its health check succeeds")


def check_training(tool: Any, tag: str, runs: Path) -> None:
    config = check_image(tool, "train", tag)
    words = [*config["Entrypoint"], "--", "--deepspeed_config", "builtin:zero2", "--recipe", "audio-mini"]
    words += ["--run", "/runs/one", "train.log_every=1"]
    words += [word for i, n in STEPS.items() for word in (f"phases.{i}.steps={n}", f"phases.{i}.warmup_steps=1")]
    process = tool.start(tag, words, {runs: "/runs"})
    healthy(tool, tag, config, process)
    said, _ = process.communicate(timeout=900)
    print(said)
    assert process.returncode == 0, process.returncode
    assert (runs / "one/models/final/model.safetensors").is_file()
    say(f"{tag}: trained, exit code 0")


def check_serving(tool: Any, tag: str, runs: Path) -> None:
    config = check_image(tool, "serve", tag)
    mounts = {runs / "one/models": "/models"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    clip = runs / "one/models/clip.wav"
    write_sound(clip)
    process = tool.start(tag, [*config["Entrypoint"], "/models/final"], mounts, BRIDLE_PORT=port)
    healthy(tool, tag, config, process, BRIDLE_PORT=port)
    request = urllib.request.Request(f"http://127.0.0.1:{port}/tokenize", clip.read_bytes(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        codes = json.load(answer)["clips"][0]["codes"]
    say(f"{tag}: POST /tokenize answers {len(codes)} x {len(codes[0])} codes, the first {codes[0][:8]}")
    code, said = ended(tool, tag, ["bridle", "tokenize", "/models/final", "/models/clip.wav"], mounts)
    assert code == 0 and json.loads(said.splitlines()[-1])["codes"] == codes, said
    tool.stop(process)
    said, _ = process.communicate(timeout=60)
    print(said)
    assert process.returncode == 0, process.returncode
    say(f"{tag}: the library in it gives the same codes; SIGTERM ended it with exit code 0")


def write_sound(path: Path) -> None:
    import math
    import struct
    import wave

    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        samples = (int(9000 * math.sin(i * i / 2e5)) for i in range(32000))
        out.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="IMAGE|FOLDER", help="instead of the Dockerfiles' own")
    parser.add_argument("--flavour", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--volume", action="append", default=[], metavar="HOST:INSIDE[:ro]", help="while building")
    parser.add_argument("--keep", action="store_true", help="keep the images")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bridle-images-"))
    engine = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False)
    tool: Any = Docker() if engine and engine.returncode == 0 else Buildah(scratch)
    say(f"with {tool.name}, {shutil.disk_usage(scratch).free / 1e9:.0f} GB free in {scratch}")
    base = args.base
    if base and Path(base).is_dir():
        base = tool.import_base(Path(base))
    labels = {
        "REVISION": output(["git", "describe", "--always", "--dirty"], cwd=ROOT),
        "VERSION": output([sys.executable, "-c", "import bridle; print(bridle.__version__)"], cwd=ROOT),
        "CREATED": datetime.now(UTC).isoformat(timespec="seconds"),
        "FLAVOUR": args.flavour,
    }
    arguments = [word for name, value in labels.items() for word in ("--build-arg", f"{name}={value}")]
    arguments += ["--build-arg", f"BASE={base}"] if base else []
    runs = scratch / "runs"
    runs.mkdir()
    os.chown(runs, USER, USER)
    try:
        for kind, check in (("train", check_training), ("serve", check_serving)):
            tag = f"localhost/bridle-{kind}:{args.flavour}"
            tool.build(f"docker/{kind}.Dockerfile", tag, arguments, args.volume)
            say(f"{tag}: built")
            check(tool, tag, runs)
            if not args.keep:
                tool.remove(tag)
    finally:
        for process in started:
            if process.poll() is None:
                tool.stop(process)
                process.communicate(timeout=60)
        if not args.keep:
            shutil.rmtree(scratch)
    say("both images hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
