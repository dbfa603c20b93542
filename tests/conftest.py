"""Makes the helpers of tests/training importable everywhere: `from launching import pretrain`."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# A machine's load is no fault of an example. The same examples each time, unless BRIDLE_EXPLORE asks for others.
settings.register_profile("bridle", deadline=None, derandomize="BRIDLE_EXPLORE" not in os.environ)
settings.load_profile("bridle")
sys.path[:0] = [str(Path(__file__).parent / room) for room in ("training", "serving")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that share the files out (xdist) then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws does not depend on those that ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
