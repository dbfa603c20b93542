"""What is installed where: one lock that gives each image its own part, and a wheel that is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from warm import run_warm

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
SETS = {
    "library": (),
    "train": ("train", "s3", "tokens"),
    "serving": ("serving", "s3", "tracing"),
}
"""The extras of each image; `library` is what `pip install bridle` brings."""
FOREIGN = {
    "library": {"deepspeed", "fastapi", "uvicorn", "starlette", "tensorboard", "boto3", "botocore"},
    "train": {"fastapi", "uvicorn", "starlette", "python-multipart"},
    "serving": {"deepspeed", "ninja", "tensorboard", "decord"},
}
TRAINING = ("bridle.training", "bridle.pretrain", "bridle.finetune", "bridle.measuring")
LEFT_OUT = {"library": (*TRAINING, "bridle.tokens.metrics", "serving"), "train": ("serving",), "serving": TRAINING}
"""Modules whose libraries that set is free of. `bridle.client` needs httpx, of the set `serving`; `bridle.hf`
needs transformers, of none."""

IMPORT_ALL = """
import importlib, json, pkgutil, sys
hidden, left_out = json.loads(sys.argv[1]), tuple(json.loads(sys.argv[2]))

class Rest:
    finders = sys.meta_path[:]

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)

sys.meta_path[:] = [Rest()]
import bridle, serving
names = [m.name for top in (bridle, serving) for m in pkgutil.walk_packages(top.__path__, top.__name__ + ".")
         if not m.name.startswith(left_out)]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    """Name to the text of its entry, hashes included."""
    entries = re.split(r"(?m)^(?=[a-z0-9])", LOCK.read_text(encoding="utf-8"))[1:]
    return {canonicalize_name(re.split(r"[=\s]", entry, maxsplit=1)[0]): entry for entry in entries}


def closure(extras: tuple[str, ...]) -> set[str]:
    """Every distribution that the package with these extras needs on this machine."""
    given = project()
    lines = given["dependencies"] + [line for extra in extras for line in given["optional-dependencies"][extra]]
    found: set[str] = set()
    todo = [(Requirement(line), "") for line in lines]
    while todo:
        need, extra = todo.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(need.name)
        for wanted in {"", *need.extras}:
            if (key := f"{name}[{wanted}]") not in found:
                found.add(key)
                todo += [(Requirement(line), wanted) for line in metadata.requires(name) or []]
    return {key.partition("[")[0] for key in found}


@pytest.mark.parametrize("name", SETS)
def test_the_lock_pins_with_hashes_all_that_a_set_needs_and_the_set_has_nothing_foreign(name: str) -> None:
    needed = closure(SETS[name])
    assert not needed & FOREIGN[name]
    pinned = pins()
    assert {"torch", "numpy"} <= needed
    assert not {need for need in needed if "--hash=sha256:" not in pinned.get(need, "")}


@pytest.mark.parametrize("name", SETS)
def test_the_installer_resolves_a_set_from_the_lock_alone(name: str) -> None:
    """As the Dockerfiles do: the lock's pins and hashes, and nothing that it does not name."""
    extras = [word for extra in SETS[name] for word in ("--extra", extra)]
    command = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--dry-run", "--require-hashes"]
    command += ["--constraint", str(LOCK), "--requirement", str(ROOT / "pyproject.toml"), *extras]
    command += ["--target", os.devnull + "-nothing", "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if re.search("error sending request|dns error|Connection refused|timed out", done.stderr):
        pytest.skip(f"no package index can be reached from here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    chosen = dict(re.findall(r"^ \+ (\S+)==(\S+)$", done.stderr, re.MULTILINE))
    assert set(chosen) >= {"torch", "numpy"}
    assert not chosen.keys() & FOREIGN[name]
    pinned = pins()
    assert not {need for need, version in chosen.items() if not pinned[need].startswith(f"{need}=={version} ")}


@pytest.mark.parametrize("name", SETS)
def test_a_set_imports_without_the_libraries_of_the_others(name: str) -> None:
    needed = closure(SETS[name])
    hidden = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & (needed | {"bridle", "pip"})
    }
    assert {"pytest", "moto"} <= hidden
    left_out = [*LEFT_OUT[name], "bridle.hf", *(() if name == "serving" else ("bridle.client",))]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(sorted(hidden)), json.dumps(left_out)],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 40


def test_a_command_that_lacks_an_extra_names_it(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'deepspeed'\", name='deepspeed')"
    )
    command = [sys.executable, "-m", "bridle.pretrain", "--deepspeed_config", "builtin:zero2", "--run", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "pretrain: error: No module named 'deepspeed'; it comes with pip install 'bridle[train]'"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, built from what git tracks."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(built), str(source)], timeout=300, check=True)
    return built


def test_a_wheel_holds_every_file_that_is_no_code(wheel: Path) -> None:
    for folder in ("bridle", "serving"):
        shipped = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        shipped |= {Path("bridle/ds_configs") / path.name for path in (ROOT / "ds_configs").iterdir()}
        expected = {path for path in shipped if path.parts[0] == folder and "__pycache__" not in path.parts}
        assert not {str(path) for path in expected if not (wheel / path).is_file()}


@pytest.mark.slow
def test_an_installed_wheel_pretrains_with_a_shipped_configuration_under_the_launcher(
    wheel: Path, tmp_path: Path
) -> None:
    tiny = Path(__file__).with_name("training") / "tiny.yaml"
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = [deepspeed, "--num_gpus", "1", "--master_port", str(free_port()), "--module", "bridle.pretrain"]
    command += ["--deepspeed_config", "builtin:zero2", "--recipe", str(tiny), "--run", "run", "train.log_every=1"]
    environment = {**os.environ, "PYTHONPATH": str(wheel), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: run/models/final" in done.stdout
    used = json.loads((tmp_path / "run/ds_config.json").read_text(encoding="utf-8"))
    assert used["zero_optimization"]["stage"] == 2


def test_an_unknown_shipped_configuration_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    script = str(ROOT / "bridle/pretrain.py")
    words = [sys.executable, script, "--deepspeed_config", "builtin:zero9", "--run", str(tmp_path)]
    done = run_warm(words, env=os.environ, cwd=ROOT)
    assert done.returncode == 2
    assert "found 'zero9', expected one of zero1, zero1_bf16, zero2, zero2_bf16, zero3, zero3_bf16" in done.stderr


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
