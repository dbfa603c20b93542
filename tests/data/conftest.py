"""Tars built in memory, and a cache that is each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_inputs import MakeTar, Tree, write_tar


@pytest.fixture
def make_tar() -> MakeTar:
    return write_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing lands in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    return tmp_path / "cache-home" / "bridle"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A folder of files."""

    def write(files: dict[str, bytes]) -> Path:
        root = tmp_path / "source"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    return write
