"""Every example in docs/serving.md and docs/tokens.md runs, the table of settings is whole, the demo works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running_service import Server

from serving.settings import ServeSettings

ROOT = Path(__file__).parents[2]
SERVING = (ROOT / "docs/serving.md").read_text()
CURLS = [line for line in SERVING.splitlines() if line.startswith("curl ")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sounds: list[bytes]) -> Path:
    made = tmp_path_factory.mktemp("docs")
    (made / "sound.flac").write_bytes(sounds[0])
    (made / "other.flac").write_bytes(sounds[1])
    return made


@pytest.mark.parametrize("command", CURLS)
def test_every_curl_example_works(server: Server, folder: Path, command: str) -> None:
    environment = {**os.environ, "URL": server.url}
    done = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    written = re.search(r"-o (\S+)", command)
    assert (folder / written[1]).stat().st_size if written else done.stdout.startswith(b"{")


def test_the_python_examples_work(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (example,) = blocks(SERVING, "python")
    exec(example, {"url": server.url})
    names: dict[str, object] = {}
    for example in blocks((ROOT / "docs/tokens.md").read_text(), "python"):
        code = compile(example, "docs/tokens.md", "exec")
        if "MODEL_DIR" not in example:  # those with a model of one's own are run in tests/tokens
            exec(code, names)


def test_all_settings_are_documented() -> None:
    assert set(ServeSettings.model_fields) <= set(re.findall(r"^\| `(\w+)` \|", SERVING, re.MULTILINE))


def test_the_demo_serves_a_model(audio_folder: Path) -> None:
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as with the environment active
    environment = {**os.environ, "ONCE": "1", "PORT": "18765", "PATH": commands}
    command = ["bash", str(ROOT / "examples/serve_demo.sh"), str(audio_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert '{"clips":[{"model":"audio-test"' in done.stdout
