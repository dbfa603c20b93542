"""Tars for the tests of this room."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from bridle.cli import main
from bridle.data.shards import Sample, open_shards

MakeTar = Callable[[Path, Iterable[tuple[str, bytes]]], Path]
Tree = Callable[[dict[str, bytes]], Path]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A plain tar of (name, content) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def build(kind: str, source: Path, target: Path, *options: str) -> int:
    return main(["shards", "build", "--kind", kind, str(source), str(target), *options])


def samples(target: Path, extension: str = "wav") -> dict[str, Sample]:
    shards = open_shards([f"{target}/*.tar"], extensions=[extension])
    read = [shards.read(i) for i in range(len(shards))]
    assert len({sample.key for sample in read}) == len(read)
    return {sample.key: sample for sample in read}


def clips(count: int, size: int = 1000) -> dict[str, bytes]:
    return {f"{'ab'[i % 2]}/clip_{i}.wav": os.urandom(size) for i in range(count)}
