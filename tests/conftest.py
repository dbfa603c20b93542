"""Makes the helpers of tests/training importable everywhere: `from launching import pretrain`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("bridle", deadline=None)  # a machine's load is no fault of an example
settings.load_profile("bridle")
sys.path[:0] = [str(Path(__file__).parent / room) for room in ("training", "serving")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that share the files out (xdist) then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
