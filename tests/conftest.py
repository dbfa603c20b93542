"""Makes the helpers of tests/training importable everywhere: `from launching import pretrain`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "training"))
