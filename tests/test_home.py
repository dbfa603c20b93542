"""A user without a home that can be written, as in a container, gets caches elsewhere, without noise."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOWHERE = "/dev/null/home"
SHOW = """
from bridle.home import settle
settle()
import matplotlib.pyplot, os
from bridle.data.cache import default_folder
print(default_folder(), matplotlib.get_cachedir(), os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    named = {"XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"}  # torch sets the last, in this very process
    kept = {name: value for name, value in os.environ.items() if name not in named}
    return subprocess.run(
        words, env=kept | environment, cwd="/", capture_output=True, text=True, timeout=300, check=False
    )


def bridle(*words: str) -> list[str]:
    return [sys.executable, "-m", "bridle.cli", *words]


def test_every_cache_goes_to_one_private_folder_without_a_word(tmp_path: Path) -> None:
    for _ in range(2):
        done = run([sys.executable, "-c", SHOW], HOME=NOWHERE, TMPDIR=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        own = tmp_path / f"bridle-{os.getuid()}"
        assert all(Path(folder).is_relative_to(own) for folder in done.stdout.split()), done.stdout
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("bridle", "matplotlib"))] == [own.name]


def test_a_folder_that_another_user_could_have_prepared_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"bridle-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    done = run([sys.executable, "-c", SHOW], HOME=NOWHERE, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_home_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    show = "from bridle.home import settle; settle(); import os; print('XDG_CACHE_HOME' in os.environ)"
    assert run([sys.executable, "-c", show], HOME=str(tmp_path)).stdout == "False\n"


def test_a_named_cache_that_cannot_be_written_is_refused_with_what_the_command_has(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = bridle("shards", "index", "https://127.0.0.1:1/s.tar", "--cache", str(tmp_path / "file" / "cache"))
    done = run(words)
    assert done.returncode == 1
    assert "name a folder you may write" in done.stderr
    assert "--cache" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_any_place_for_temporary_files_a_command_says_what_to_mount() -> None:
    back = f'mkdir -p "{ROOT}" && mount --no-canonicalize --bind /proc/self/fd/9 "{ROOT}"'  # of a clone below /tmp
    read_only = " && ".join([
        f'exec 9<"{ROOT}"', "mount -t tmpfs tmpfs /tmp", "mount -t tmpfs tmpfs /var/tmp",
        f'{{ [ -e "{ROOT}/bridle" ] || {{ {back}; }}; }}', "mount -o remount,ro /tmp", "mount -o remount,ro /var/tmp",
    ])  # fmt: skip
    words = ["unshare", "--mount", "sh", "-c"]
    if run([*words, read_only]).returncode:
        pytest.skip("no mount namespace may be made here (unshare --mount), so /tmp cannot be made read-only")
    command = " ".join(bridle("shards", "check", "s.tar"))
    done = run([*words, f"{read_only} && cd /proc && {command}"], HOME=NOWHERE, TMPDIR="/tmp")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "docker run --tmpfs /tmp" in done.stderr
    assert len(done.stderr.splitlines()) == 1
