"""The metrics of several processes as one text, whose counters never fall though a process ends and another comes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

CUMULATIVE = {"counter", "histogram"}
START = "process_start_time_seconds"
_LEAST = (START, "bridle_serve_ready")
_MOST = ("bridle_serve_build_info", "bridle_serve_model_info", "python_info")

Numbers = dict[str, float]
"""Values by sample: its name and labels as JSON."""
Families = dict[str, Numbers]


def add_up(texts: Mapping[int, str], store: Path) -> bytes:
    """The exposition format of all processes together.

    texts: of each process that answered, by its number; store: a file that remembers what each had counted when it was
    last asked, for those that have ended since or do not answer.
    """
    found = {number: list(text_string_to_metric_families(text)) for number, text in texts.items()}
    counted = _counted({number: _numbers(metrics) for number, metrics in found.items()}, _cumulative(found), store)
    whole: dict[str, Metric] = {}
    for metric in (metric for metrics in found.values() for metric in metrics):
        whole.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
    for metric in whole.values():
        rows = counted if metric.type in CUMULATIVE else [_numbers(metrics) for metrics in found.values()]
        ours = [row[metric.name] for row in rows if metric.name in row]
        for key in dict.fromkeys(key for row in ours for key in row):
            name, labels = json.loads(key)
            metric.add_sample(name, labels, _together(name)(row[key] for row in ours if key in row))
    return generate_latest(cast(CollectorRegistry, _Collected(whole.values())))


def _together(name: str) -> Callable[[Iterable[float]], float]:
    if name in _LEAST or name.endswith("_created"):
        return min
    return max if name in _MOST else sum


def _counted(found: Mapping[int, Families], cumulative: set[str], store: Path) -> list[Families]:
    """What has been counted in each process's place, by it and by those before it."""
    with store.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        places: dict[str, dict[str, Any]] = json.loads(file.read() or "{}")
        for number, families in found.items():
            place = places.setdefault(str(number), {"start": None, "last": {}, "ended": {}})
            (start,) = families[START].values()
            if start != place["start"]:
                place["ended"] = _sum(place["ended"], place["last"])
            place["start"] = start
            place["last"] = {name: rows for name, rows in families.items() if name in cumulative}
        file.truncate(0)
        file.write(json.dumps(places))
    return [_sum(place["ended"], place["last"]) for place in places.values()]


def _sum(first: Families, second: Families) -> Families:
    return {
        name: {
            key: first.get(name, {}).get(key, 0.0) + second.get(name, {}).get(key, 0.0)
            for key in {**second.get(name, {}), **first.get(name, {})}
        }
        for name in {**second, **first}
    }


def _cumulative(found: Mapping[int, list[Metric]]) -> set[str]:
    return {metric.name for metrics in found.values() for metric in metrics if metric.type in CUMULATIVE}


def _numbers(metrics: Iterable[Metric]) -> Families:
    return {
        metric.name: {json.dumps([one.name, one.labels], sort_keys=True): one.value for one in metric.samples}
        for metric in metrics
    }


class _Collected:
    """Metrics that are there already, as a registry."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        yield from self._metrics
