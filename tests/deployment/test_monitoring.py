"""Rules and dashboards: made from the code's metrics, checked and tested by promtool, each alert with its runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bridle.training.metrics import ALARMS, PrometheusMetrics
from serving.metrics import Metrics

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "k8s" / "monitoring"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="NO PROMTOOL: THE RULES ARE NOT TESTED; install Debian's prometheus, or run .ci/run, which does",
)


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load((PLACE / "rules.yaml").read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[str]:
    return [rule["alert"] for rule in rules() if "alert" in rule]


def panels() -> list[str]:
    """The expressions of all panels."""
    boards = [json.loads(path.read_text()) for path in sorted(PLACE.glob("dashboards/*.json"))]
    assert len(boards) == 2
    return [target["expr"] for board in boards for panel in board["panels"] for target in panel.get("targets", [])]


def test_what_is_committed_is_what_the_code_makes(tmp_path: Path) -> None:
    generate = [sys.executable, str(ROOT / "tools/monitoring/generate.py"), "--to", str(tmp_path)]
    subprocess.run(generate, cwd=ROOT, timeout=300, check=True)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(made) == 5
    stale = [str(path) for path, text in made.items() if (PLACE / path).read_text() != text]
    assert not stale, f"run make dashboards: {stale}"


def test_every_metric_of_a_rule_or_panel_is_exported_and_every_exported_one_is_shown() -> None:
    exported = {}
    for registry in (PrometheusMetrics(0).registry, Metrics().registry):
        for family in registry.collect():
            exported[family.name + ("_total" if family.type == "counter" else "")] = family.type
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = set()
    for text in [*panels(), *(rule["expr"] for rule in rules())]:
        used |= {word for word in re.findall(r"\bbridle[\w:]+", text) if word not in recorded}
    plain = {re.sub(r"_(bucket|sum|count)$", "", word): word for word in used}
    assert not {word for name, word in plain.items() if name not in exported and word not in exported}
    own = {name for name in exported if name.startswith("bridle_")}
    assert not own - set(plain), "metrics that no rule and no panel shows"


@needs_promtool
def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    for words in (["check", "rules", "rules.yaml"], ["test", "rules", "rules.test.yaml"]):
        done = subprocess.run(["promtool", *words], cwd=PLACE, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", alerts())
def test_every_alert_is_seen_to_fire_and_has_a_section_in_the_runbook(alert: str) -> None:
    tested = yaml.safe_load((PLACE / "rules.test.yaml").read_text())["tests"]
    samples = [sample for test in tested for query in test["promql_expr_test"] for sample in query["exp_samples"]]
    assert any(f'alertname="{alert}"' in sample["labels"] for sample in samples)
    runbook = (ROOT / "docs/runbook.md").read_text()
    section = re.search(rf"^### {alert}\n(.*?)(?=^##|\Z)", runbook, re.MULTILINE | re.DOTALL)
    assert section, f"docs/runbook.md has no section {alert}"
    for part in ("**Means.**", "**Look.**", "**Do.**"):
        assert part in section.group(1), f"{alert}: the runbook does not say {part}"


def test_the_runbook_says_what_each_kind_of_alarm_means() -> None:
    section = (ROOT / "docs/runbook.md").read_text().split("### BridleTrainAlarm")[1].split("\n###")[0]
    assert not [kind for kind in ALARMS if f"`{kind}`" not in section]
