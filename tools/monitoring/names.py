"""Names of metrics, taken from the code that exports them, so that a rule or a panel cannot name one that is not."""

from __future__ import annotations

from typing import Any

from bridle.training.metrics import PrometheusMetrics
from serving.metrics import Metrics


class Names:
    """``names.step_seconds`` is the name that Prometheus knows the holder's metric `step_seconds` by.

    Histograms have ``_bucket``, ``_sum`` and ``_count`` behind it.

    Args:
        holder: an object with prometheus_client's metrics as attributes.
    """

    def __init__(self, holder: Any) -> None:
        self._holder = holder

    def __getattr__(self, attribute: str) -> str:
        [family] = getattr(self._holder, attribute).describe()
        return str(family.name) + ("_total" if family.type == "counter" else "")


TRAIN = Names(PrometheusMetrics(0))
SERVE = Names(Metrics())
