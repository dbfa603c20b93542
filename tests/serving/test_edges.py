"""What proxies, clusters and hurried people do to a service."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import torch
from running_service import Server, serving
from small_models import write_model

import bridle
from bridle.processes.child import Child

ROOT = Path(__file__).parents[2]
SERVICE_LINKS = {
    "BRIDLE_PORT": "tcp://10.0.0.7:8000",
    "BRIDLE_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "BRIDLE_PORT_8000_TCP_PORT": "8000",
    "BRIDLE_SERVICE_HOST": "10.0.0.7",
    "BRIDLE_SERVICE_PORT": "8000",
}


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory, audio_folder: Path) -> Iterator[Server]:
    """A service in a cluster: behind a proxy's path, with a model's name of the operator's, among service links,
    without a home, as where the root is read-only."""
    folder = tmp_path_factory.mktemp("behind")
    shutil.copytree(audio_folder, folder / "model")
    variables = {**SERVICE_LINKS, "HOME": "/dev/null/home", "XDG_CACHE_HOME": ""}
    with serving(folder, Path(f"speech={folder}/model"), root_path="/bridle", device="auto", env=variables) as running:
        yield running


def test_service_links_of_kubernetes_are_no_settings(behind: Server) -> None:
    told = [line["event"] for line in behind.lines() if line["level"] == "warning" and "BRIDLE_" in line["event"]]
    assert len(told) == 1 and "enableServiceLinks: false" in told[0]


def test_a_wrong_variable_is_named(audio_folder: Path) -> None:
    command = [sys.executable, "-m", "bridle.cli", "serve", str(audio_folder)]
    for name, value in (("BRIDLE_PORT", "http"), ("BRIDLE_MAX_BATCH", "many")):
        done = subprocess.run(command, env={name: value}, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 2
        assert name in done.stderr and value in done.stderr and "Traceback" not in done.stderr


def test_head_answers_as_get_without_a_body(client: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/info", "/"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
    assert client.head("/nothing").status_code == 404
    assert client.head("/tokenize").status_code == 405


def test_a_slash_at_the_end_is_no_redirect(client: httpx.Client, sounds: list[bytes]) -> None:
    headers = {"X-Forwarded-Proto": "https"}
    answer = client.post("/tokenize/", content=sounds[0], headers=headers, follow_redirects=False)
    assert answer.status_code == 200
    assert client.get("/info/", follow_redirects=False).status_code == 200


def test_a_proxys_path_is_told_and_taken(behind: Server, sounds: list[bytes]) -> None:
    document = httpx.get(behind.url + "/openapi.json", timeout=60).json()
    assert document["servers"] == [{"url": "/bridle"}]
    for prefix in ("", "/bridle"):  # a proxy may cut it off, or leave it
        assert httpx.get(behind.url + prefix + "/readyz", timeout=60).status_code == 200
        assert httpx.post(behind.url + prefix + "/tokenize", content=sounds[0], timeout=60).status_code == 200
    assert httpx.get(behind.url + "/bridlers/readyz", timeout=60).status_code == 404


def test_packed_bodies_are_unfolded_within_the_limits(client: httpx.Client, sounds: list[bytes]) -> None:
    expected = client.post("/tokenize", content=sounds[0]).json()

    def send(body: bytes, encoding: str | None) -> httpx.Response:
        headers = {"Content-Encoding": encoding} if encoding else {}
        return client.post("/tokenize", content=body, headers=headers)

    assert send(gzip.compress(sounds[0]), "gzip").json() == expected
    assert send(zlib.compress(sounds[0]), "deflate").json() == expected
    parts = httpx.Request("POST", "http://x/tokenize", files=[("file", sounds[0])])
    headers = {"Content-Type": parts.headers["content-type"], "Content-Encoding": "gzip"}
    assert client.post("/tokenize", content=gzip.compress(parts.read()), headers=headers).json() == expected
    refused = {
        413: send(gzip.compress(bytes(4_000_001)), "gzip"),
        400: send(gzip.compress(sounds[0])[:-9], "gzip"),
        415: send(sounds[0], "br"),
    }
    assert {status: answer.status_code for status, answer in refused.items()} == {s: s for s in refused}
    assert "gzip" in refused[415].json()["detail"]
    assert send(sounds[0], "gzip").json()["type"].endswith("malformed")
    assert send(gzip.compress(sounds[0]) + b"more", "gzip").status_code == 400
    told = send(gzip.compress(sounds[0]), None)
    assert told.status_code == 415 and "Content-Encoding: gzip" in told.json()["detail"]


def test_info_says_the_device_that_is_used(behind: Server) -> None:
    devices = httpx.get(behind.url + "/info", timeout=60).json()["models"][0]["device"]
    assert devices and all(device.split(":")[0] in ("cpu", "cuda") for device in devices)


def test_an_operators_name_for_a_model_survives_a_redeploy(behind: Server, sounds: list[bytes]) -> None:
    (model,) = httpx.get(behind.url + "/v1/models", timeout=60).json()["data"]
    assert (model["id"], model["name"]) == ("speech", "audio-test")

    def codes(name: str) -> httpx.Response:
        return httpx.post(behind.url + "/tokenize", params={"model": name}, content=sounds[0], timeout=60)

    assert codes("speech").json() == codes("audio-test").json()
    assert codes("speech").json()["clips"][0]["model"] == "speech"
    folder = Path(str(behind.models[0]).partition("=")[2])
    shutil.rmtree(folder)
    write_model(folder, seed=3, name="audio-next-week")
    assert httpx.post(behind.url + "/v1/models/reload", params={"model": "speech"}, timeout=120).status_code == 200
    assert codes("speech").json()["clips"][0]["codes"] == bridle.load(folder).tokenize(sounds[0]).codes.T.tolist()
    assert (codes("audio-next-week").status_code, codes("audio-test").status_code) == (200, 422)


def test_two_models_of_one_name_are_told_apart_by_names_of_ones_own(tmp_path: Path, audio_folder: Path) -> None:
    command = [sys.executable, "-m", "bridle.cli", "serve", str(audio_folder), str(audio_folder), "--port=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert f"NAME={audio_folder}" in done.stderr


def test_misspelt_words_lead_to_what_was_meant(client: httpx.Client, sounds: list[bytes]) -> None:
    meant = {
        "modle=audio-test": "did you mean 'model'?",
        "layuot=delay": "did you mean 'layout'?",
        "model=audio-tset": "did you mean 'audio-test'?",
        "modality=adio": "did you mean 'audio'?",
        "layout=sideways": "'interleaved', 'delay' or 'coarse_first'",
    }
    for query, hint in meant.items():
        answer = client.post(f"/tokenize?{query}", content=sounds[0])
        assert answer.status_code == 422
        assert hint in answer.json()["detail"], query


def test_content_of_no_kind_is_told_which_kinds_are_taken(client: httpx.Client) -> None:
    problem = client.post("/tokenize", content=b"hello").json()
    assert problem["status"] == 415
    for kind in ("audio (", "flac", "wav", "image (", "jpg", "png"):
        assert kind in problem["detail"]


def test_a_page_of_another_site_is_refused_whether_its_browser_says_so_or_not(
    server: Server, sounds: list[bytes]
) -> None:
    def status(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(server.url + "/tokenize", content=sounds[0], headers=named, timeout=60).status_code

    assert status(Origin="http://evil.example") == status(Origin="null") == 403
    assert status(Origin="http://evil.example", Sec_Fetch_Site="cross-site") == 403
    assert status(Origin=server.url) == status(Origin="http://proxy.example", Sec_Fetch_Site="same-origin") == 200


def test_the_demo_does_not_take_another_service_for_its_own(server: Server, audio_folder: Path) -> None:
    port = server.url.rpartition(":")[2]
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "examples/serve_demo.sh"), str(audio_folder)],
        env={**os.environ, "ONCE": "1", "PORT": port, "PATH": commands},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "clips" not in done.stdout
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_help_speaks_of_settings_not_of_types() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bridle.cli", "serve", "--help"], capture_output=True, text=True, timeout=300, check=True
    )
    for word in ("<class", "typing.", "Ellipsis", "FieldInfo", "Literal"):
        assert word not in done.stdout
    assert "One of float32, bfloat16." in " ".join(done.stdout.split())


def test_a_service_without_a_home_says_nothing_that_is_no_log_line(behind: Server) -> None:
    """`lines` refuses whatever a library would say of its cache."""
    assert "ready" in {line["event"] for line in behind.lines()}


def test_the_services_own_process_has_neither_torch_nor_decoders(behind: Server, sounds: list[bytes]) -> None:
    """Not at its start, `device` left open, and not for a request: torch alone is 0.4 GB, and seconds."""
    assert httpx.post(behind.url + "/tokenize", content=sounds[0], timeout=60).status_code == 200

    def loaded(pid: int) -> set[str]:
        return set(re.findall("libtorch|libsndfile|libavcodec", Path(f"/proc/{pid}/maps").read_text()))

    for pid in behind.children("decode"):
        assert loaded(pid) == {"libtorch", "libsndfile", "libavcodec"}
    assert loaded(behind.process.pid) == set()


def test_a_child_counts_the_gpus() -> None:
    with closing(Child("serving.workers.gpus:counted", seconds=300, memory_bytes=1 << 46)) as child:
        ((told, _),) = child.answers(b"", {})
    assert told == {"gpus": torch.cuda.device_count()}
