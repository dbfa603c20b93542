"""`bridle doctor`: says what is wrong, what to do, and whether pretraining can run."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bridle import diagnostics


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bridle.cli", "doctor", *arguments]
    environment = dict(os.environ) | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_machine_that_can_run_the_tests_can_pretrain(tmp_path: Path) -> None:
    done = doctor("--run", str(tmp_path / "not" / "yet"))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "pretraining can run here"
    for line in lines[:-1]:
        assert re.match(r"(ok|warn|missing) +\S|  +-> ", line), line
    for name in ("Python", "torch", "torchvision", "torchaudio", "DeepSpeed ops", "compiler", "FFmpeg codecs", "ranks"):
        assert re.search(rf"^(ok|warn|missing) +{name} ", done.stdout, re.MULTILINE), name
    assert "GiB free" in done.stdout
    assert not (tmp_path / "not").exists(), "the doctor only looks"


def test_what_is_broken_is_named_in_json_and_in_the_exit_code(tmp_path: Path) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "file").touch()
    done = doctor("--json", "--run", str(tmp_path / "file" / "run"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["can_pretrain"] is False
    blocked = {check["name"]: check for check in report["checks"] if check["blocks"]}
    assert set(blocked) == {"torchvision", "run folder"}
    assert "torchvision::nms does not exist" in blocked["torchvision"]["found"]
    assert all(check["status"] == "missing" and check["advice"] for check in blocked.values())


def test_a_missing_compiler_is_a_warning_that_says_who_needs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check = diagnostics.check_compiler()
    assert (check.status, check.blocks) == ("warn", False)
    assert "C++ compiler" in check.found
    assert "needed only for DeepSpeed's compiled ops" in check.advice


def test_packages_that_are_absent_or_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2.11", "numpy<1", "no-such-package-here>=3", "absent; extra == 'dev'"]
    monkeypatch.setattr(diagnostics.metadata, "requires", lambda name: wanted)
    check = diagnostics.check_packages()
    assert (check.status, check.blocks) == ("missing", True)
    assert re.fullmatch(r"numpy is \S+, expected <1; no-such-package-here is not installed", check.found)


def test_gloo_without_its_interface_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert diagnostics.check_gloo().status == "ok"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    check = diagnostics.check_gloo()
    assert check.status == "warn"
    assert "no-such-interface" in check.found
    assert socket.if_nameindex()[0][1] in check.advice


def test_a_taken_port_is_named_with_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(diagnostics, "PORTS", {"training metrics": (port, "choose another")})
        check = diagnostics.check_ports()
    assert (check.status, check.found) == ("warn", f"taken: {port} (training metrics)")
    assert diagnostics.check_ports().status == "ok"


def test_little_shared_memory_disk_or_files_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for limit in ("SHARED_MEMORY", "FREE_DISK", "OPEN_FILES"):
        monkeypatch.setattr(diagnostics, limit, 2**62)
    checks = [diagnostics.check_shared_memory(tmp_path), diagnostics.check_disk("disk", tmp_path)]
    assert [(check.status, check.blocks) for check in checks] == [("warn", False)] * 2
    assert "--shm-size" in checks[0].advice
    files = diagnostics.check_open_files()
    assert files.status == "warn" or "unlimited" in files.found
