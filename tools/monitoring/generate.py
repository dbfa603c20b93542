"""Writes k8s/monitoring/: rules and dashboards, for Prometheus and Grafana as they are and for their operators.

make dashboards
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import dashboards
import rules
import yaml

PLACE = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
HEADER = "# Written by `make dashboards` (tools/monitoring/); change it there.\n"


def files() -> dict[str, str]:
    """Every file's content, by its path under k8s/monitoring/."""
    groups = rules.groups()
    found = {
        "rules.yaml": _yaml({"groups": groups}),
        "dashboards/bridle-serve.json": dashboards.serving(),
        "dashboards/bridle-train.json": dashboards.training(),
    }
    for name in ("bridle-serve", "bridle-train"):
        chosen = [group for group in groups if group["name"].startswith(name)]
        found[f"{name}-rules.yaml"] = _yaml(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "PrometheusRule",
                "metadata": {"name": name, "labels": {"app.kubernetes.io/name": name}},
                "spec": {"groups": chosen},
            }
        )
    return found


def _yaml(data: Any) -> str:
    return HEADER + yaml.safe_dump(data, sort_keys=False, width=1000)


def main() -> None:
    """Writes them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=PLACE, metavar="DIR")
    to = parser.parse_args().to
    for name, text in files().items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
