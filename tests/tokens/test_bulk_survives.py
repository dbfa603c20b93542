"""A bulk job that is killed, lost or joined ends with the bytes of one that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from bulk_process import start
from corpus_inputs import hashes, sample_media, write_tar

from bridle.cli import main
from bridle.ports import free_port
from bridle.tokens.claims import Claims
from bridle.tokens.corpus import Corpus
from bridle.tokens.store import Store

SHARDS, SAMPLES = 14, 2
KILLS = 20


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Many small shards, so that kills fall between outputs and within them."""
    folder = tmp_path_factory.mktemp("many")
    media = sample_media("audio", SHARDS * SAMPLES)
    return [
        write_tar(
            folder / f"s{shard:02d}.tar",
            [
                (f"k{shard:02d}-{i}.{media[shard * SAMPLES + i][0]}", media[shard * SAMPLES + i][1])
                for i in range(SAMPLES)
            ],
        )
        for shard in range(SHARDS)
    ]


def done(out: Path) -> int:
    return len(list((out / "parts").glob("*.json")))


def command(model: Path, shards: list[Path], out: Path, workers: int, *more: str) -> list[str]:
    return ["tokenize", str(model), *map(str, shards), "--out", str(out), "--workers", str(workers), *more]


@pytest.mark.slow
def test_killed_at_random_moments_and_one_rank_lost_for_good(
    models: dict[str, Path], many: list[Path], tmp_path: Path
) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    began = time.monotonic()
    assert main(command(models["audio"], many, undisturbed, 0)) == 0
    whole_s = time.monotonic() - began
    chance = random.Random(0)
    killed = torn = 0
    while killed < KILLS:
        before = done(out)
        process = start(command(models["audio"], many, out, int(killed % 5 == 4)))
        while killed % 3 and process.is_alive() and done(out) <= before:  # every third may not even have begun
            time.sleep(0.005)
        process.join(chance.uniform(0.0, 0.1 * whole_s))
        killed += process.is_alive()
        process.kill()
        process.join()
        torn += 0 < done(out) < SHARDS
        if done(out) > SHARDS // 2:  # so that there is something to kill until the end
            for path in [*(out / "parts").glob("*.json"), *(out / "data").glob("*.parquet")][:: chance.randint(2, 3)]:
                path.unlink()
    assert torn > KILLS // 2
    ranks = [
        start(command(models["audio"], many, out, 1), {"JOB_COMPLETION_INDEX": str(rank), "JOB_COMPLETIONS": "3"})
        for rank in range(3)
    ]
    ranks[1].join(0.3)
    ranks[1].kill()
    for rank in (0, 2):
        ranks[rank].join(400)
        assert ranks[rank].exitcode == 0
    assert hashes(out) == hashes(undisturbed)
    keys = [row.key for row in Corpus(str(out))]
    assert sorted(keys) == sorted(f"k{shard:02d}-{i}" for shard in range(SHARDS) for i in range(SAMPLES))
    assert not list((out / "claims").glob("*.json"))


def test_what_a_silent_machine_claimed_is_taken_over_after_its_lease(
    models: dict[str, Path], many: list[Path], tmp_path: Path
) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    assert main(command(models["audio"], many[:3], expected, 0)) == 0
    assert main(command(models["audio"], many[:1], out, 0)) == 0
    name = next(path.stem for path in (expected / "parts").iterdir() if path.stem.startswith("s02"))
    Store(str(out)).put_json(f"claims/{name}.json", {"rank": 7, "host": "elsewhere", "pid": 1, "nonce": "n", "beat": 3})
    began = time.monotonic()
    assert main(command(models["audio"], many[:3], out, 0, "--lease", "1.5")) == 0
    assert time.monotonic() - began > 1.5
    assert hashes(out) == hashes(expected)


def test_prometheus_says_how_far_a_job_is(models: dict[str, Path], many: list[Path], tmp_path: Path) -> None:
    """The last shard is another machine's, so that the job waits, and can be asked."""
    out, expected = tmp_path / "out", tmp_path / "expected"
    assert main(command(models["audio"], many[:2], expected, 0)) == 0
    name = next(path.stem for path in (expected / "parts").iterdir() if path.stem.startswith("s01"))
    Store(str(out)).put_json(f"claims/{name}.json", {"host": "elsewhere"})
    assert main(command(models["audio"], many[:1], tmp_path / "other", 0)) == 0
    shutil.copy(tmp_path / "other" / "job.json", out / "job.json")
    port = free_port()
    process = start(command(models["audio"], many[:2], out, 0, "--lease", "600", "--metrics-port", str(port)))
    text = ""
    while process.is_alive() and "bridle_tokenize_outputs_total 1.0" not in text:
        with contextlib.suppress(requests.ConnectionError):
            text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
        time.sleep(0.1)
    process.kill()
    process.join()
    all_of_it = ("job_outputs 2.0", f"job_samples {2.0 * SAMPLES}", "job_outputs_done 1.0")
    for line in (*all_of_it, f"samples_total {SAMPLES}.0", "outputs_total 1.0"):
        assert f"bridle_tokenize_{line}" in text


def test_what_killed_writers_left_goes_with_the_next_run(
    models: dict[str, Path], many: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(command(models["audio"], many[:2], out, 0)) == 0
    old, new = (out / "data" / f".{age}.partial" for age in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    name = next((out / "parts").glob("*.json")).stem
    Store(str(out)).put_json(f"claims/{name}.json", {"host": "elsewhere"})  # killed when its part was there
    assert main(command(models["audio"], many[:2], out, 0)) == 0
    assert not old.exists()
    assert new.exists(), "another process may be at it"
    assert not list((out / "claims").glob("*.json"))


def test_a_claim_is_kept_while_its_owner_beats_and_lost_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own: each beat that is seen is worth nearly a lease."""
    store, file, now = Store(str(tmp_path)), tmp_path / "claims" / "a.json", [0.0]
    monkeypatch.setattr("bridle.tokens.claims.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Claims(store, 0, lease_s=0.4) as owner:
        assert owner.take("a")
        other, seen = Claims(store, 1, lease_s=0.4), -1
        for _ in range(5):
            while (content := json.loads(file.read_text()))["beat"] == seen:
                time.sleep(0.01)
            seen = content["beat"]
            assert not other.take("a")
            now[0] += 0.39
        assert seen >= 2
    assert other.take("a")
    silent = Claims(store, 3, lease_s=0.4)
    assert not silent.take("a")
    now[0] += 0.41
    assert silent.take("a")
    file.write_text(json.dumps({**content, "pid": 2**22 + 1}))
    assert Claims(store, 2, lease_s=60).take("a"), "its process is gone from this machine"


def test_a_claim_of_another_container_on_this_machine_counts(tmp_path: Path) -> None:
    owner = "from bridle.tokens.claims import Claims; from bridle.tokens.store import Store; import sys; "
    owner += "print(Claims(Store(sys.argv[1]), 0, 300).take('a'), flush=True); sys.stdin.read()"
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("no namespace of processes to be had here")
    command = [*apart, sys.executable, "-c", owner, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert not Claims(Store(str(tmp_path)), 1, lease_s=300).take("a")
        process.communicate("")
