"""Ray on this machine: the files of a run without it, also when actors are killed; codes for a Ray Data pipeline."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from corpus_inputs import hashes, sample_media, write_tar

import bridle
import bridle.ray
from bridle.cli import main

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of two CPUs on this machine, whose workers see what this process sees."""
    os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"
    path = os.pathsep.join(
        filter(None, [str(Path(bridle.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(":")])
    )
    ray.init(
        _system_config={"worker_niceness": 0},  # actors that give way to all others take minutes on a busy machine
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}},
    )  # fmt: skip
    yield
    ray.shutdown()


def kill_an_actor(parts: Path, killed: list[int]) -> None:
    """As soon as an output is there, kills the process of an actor of this cluster that does units."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not killed:
        if list(parts.glob("*.json")):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::") and "_Unit" in title:
                        process.kill()
                        killed.append(process.pid)
                        break
        time.sleep(0.02)


def test_ray_gives_the_same_files_and_an_actor_killed_loses_nothing(
    cluster: None, models: dict[str, Path], tmp_path: Path
) -> None:
    media = sample_media("audio", 12)
    shards = [
        write_tar(tmp_path / f"s{i}.tar", [(f"k{i}-{j}.{media[j][0]}", media[j][1]) for j in range(12)])
        for i in range(16)  # so that a busy machine finds one at work
    ]
    command = ["tokenize", str(models["audio"]), *map(str, shards), "--workers", "0", "--out"]
    assert main([*command, str(tmp_path / "local")]) == 0
    killed: list[int] = []
    out = tmp_path / "ray"
    killer = threading.Thread(target=kill_an_actor, args=(out / "parts", killed))
    killer.start()
    assert main([*command, str(out), "--engine", "ray"]) == 0
    killer.join()
    assert killed, "no actor was caught at work"
    assert hashes(out) == hashes(tmp_path / "local")


def test_a_ray_data_pipeline_gets_codes(cluster: None, models: dict[str, Path]) -> None:
    media = [data for _, data in sample_media("audio", 5)]
    items: list[dict[str, Any]] = [{"id": i, "bytes": data} for i, data in enumerate([*media, b"no sound"])]
    rows = bridle.ray.tokenize(ray.data.from_items(items), str(models["audio"])).take_all()
    model = bridle.load(models["audio"])
    assert len(rows) == 6
    for row in rows:
        if row["id"] == 5:
            assert row["error"]
            assert row["codes"] is None
            continue
        stream = model.tokenize(media[row["id"]])
        np.testing.assert_array_equal(np.stack(list(row["codes"])), stream.codes.T.numpy())
        assert row["grid"] == stream.grid
        assert row["duration_s"] == stream.duration_s
        assert row["error"] is None
