"""The client as a package of its own: built, put where nothing else is, and imported without torch or bridle."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import httpx
import numpy

import bridle

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
ASK = """
import sys
sys.path[:0] = sys.argv[1:]
from bridle_client import Client, ServiceError
assert not {"torch", "deepspeed", "bridle", "serving"} & {name.partition(".")[0] for name in sys.modules}
try:
    Client("http://127.0.0.1:9", retries=0).info()
except __import__("httpx").ConnectError:
    print("nobody there")
"""


def test_the_client_installs_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in (ROOT / "clients" / "python").iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert sorted(path.name for path in (tmp_path / "site").glob("*.py")) == ["bridle_client.py"]
    needed = {str(Path(module.__file__ or "").parents[1]) for module in (httpx, numpy)}
    command = [sys.executable, "-I", "-S", "-c", ASK, str(tmp_path / "site"), *needed]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    assert told.stdout == "nobody there\n"


def test_its_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())["project"]
    assert project["version"] == bridle.__version__
