"""Recording and alerting rules. docs/runbook.md has a section for each alert, of its name."""

from __future__ import annotations

from typing import Any

from names import SERVE, TRAIN

AVAILABLE, QUICK, SECONDS = 0.995, 0.95, 2.5
"""Objectives over 30 days: the share of calls answered with no 5xx, and of /tokenize calls within so many seconds."""
WINDOWS = ("5m", "30m", "1h", "6h", "30d")
BURN = {"fast": (14.4, "1h", "5m", "2m", "page"), "slow": (6.0, "6h", "30m", "15m", "ticket")}
"""Times the rate at which a budget lasts 30 days; over a long and a short window; for so long; severity."""
CALLS = 'route!~"/livez|/readyz|/metrics|/|/docs|/playground/.*|other"'
BY = "sum by (namespace, job)"
SEVERITIES = ("page", "ticket")


def groups() -> list[dict[str, Any]]:
    """Groups as in Prometheus's rule files."""
    return [
        {"name": "bridle-serve-objectives", "rules": _objectives()},
        {"name": "bridle-serve", "rules": _serving()},
        {"name": "bridle-train", "rules": _training()},
    ]


def error_ratio(window: str) -> str:
    """Share of calls that failed by our fault."""
    calls = f"{BY} (rate({SERVE.requests}{{{CALLS}}}[{window}]))"
    failed = f'{BY} (rate({SERVE.requests}{{status=~"5..",{CALLS}}}[{window}]))'
    return f"({failed} or 0 * {calls}) / {calls}"


def slow_ratio(window: str) -> str:
    """Share of /tokenize calls that took longer than the objective says."""
    quick = f'{BY} (rate({SERVE.request_seconds}_bucket{{route="/tokenize",le="{SECONDS}"}}[{window}]))'
    return f'1 - {quick} / {BY} (rate({SERVE.request_seconds}_count{{route="/tokenize"}}[{window}]))'


def _objectives() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = []
    for window in WINDOWS:
        rules.append({"record": f"bridle:serve_error_ratio:rate{window}", "expr": error_ratio(window)})
        rules.append({"record": f"bridle:serve_slow_ratio:rate{window}", "expr": slow_ratio(window)})
    for speed, (factor, long, short, lasting, severity) in BURN.items():
        for kind, budget, alert, what in (
            ("error", 1 - AVAILABLE, "Error", f"answered with 5xx; the objective allows {1 - AVAILABLE:.1%}"),
            ("slow", 1 - QUICK, "Latency", f"slower than {SECONDS} s; the objective allows {1 - QUICK:.0%}"),
        ):
            limit = round(factor * budget, 6)
            ratios = [f"bridle:serve_{kind}_ratio:rate{window}" for window in (long, short)]
            rules.append(
                _alert(
                    f"BridleServe{alert}BudgetBurns{speed.capitalize()}",
                    " and ".join(f"{ratio} > {limit}" for ratio in ratios),
                    lasting,
                    severity,
                    f"{{{{ $value | humanizePercentage }}}} of calls in {long} are {what}.",
                )
            )
    return rules


def _serving() -> list[dict[str, Any]]:
    busy = f'{BY} (rate({SERVE.requests}{{status="429"}}[5m]))'
    queue = f"histogram_quantile(0.95, sum by (namespace, job, model, le) (rate({SERVE.queue_seconds}_bucket[5m])))"
    restarts = f"sum by (namespace, job, kind, model) (increase({SERVE.worker_restarts}[15m]))"
    reloads = f'sum by (namespace, job, model) (increase({SERVE.reloads}{{outcome="failed"}}[15m]))'
    contents = f"count by (namespace, job, model) (count by (namespace, job, model, sha256) ({SERVE.model_info}))"
    return [
        _alert("BridleServeAbsent", f"absent({SERVE.ready})", "5m", "page", "No service answers Prometheus."),
        _alert("BridleServeNotReady", f"{SERVE.ready} == 0", "10m", "ticket", "{{ $labels.instance }} is not ready."),
        _alert(
            "BridleServeNoneReady", f"max by (namespace, job) ({SERVE.ready}) == 0", "2m", "page",
            "No process of {{ $labels.job }} is ready.",
        ),
        _alert(
            "BridleServeBusy", f"{busy} / {BY} (rate({SERVE.requests}{{{CALLS}}}[5m])) > 0.05", "10m", "ticket",
            "{{ $value | humanizePercentage }} of calls are refused with 429.",
        ),
        _alert(
            "BridleServeQueueSlow", f"{queue} > 1", "10m", "ticket",
            "Clips wait {{ $value | humanizeDuration }} for a batch of {{ $labels.model }} (95th percentile).",
        ),
        _alert(
            "BridleServeWorkersDie", f"{restarts} > 3", "1m", "ticket",
            "{{ $value | humanize }} processes ({{ $labels.kind }}) of {{ $labels.model }} were replaced in 15 min.",
        ),
        _alert(
            "BridleServeReloadFailed", f"{reloads} > 0", "0m", "ticket",
            "{{ $labels.model }} could not be reloaded; the one before still serves.",
        ),
        _alert(
            "BridleServeModelsDiffer", f"{contents} > 1", "30m", "ticket",
            "{{ $value }} different contents are served as {{ $labels.model }}.",
        ),
    ]  # fmt: skip


def _training() -> list[dict[str, Any]]:
    corrupt = f"sum by (namespace, job, instance) (rate({TRAIN.corrupt}[15m]))"
    samples = f"sum by (namespace, job, instance) (rate({TRAIN.samples}[15m]))"
    alarms = f"sum by (namespace, job, instance, kind) (increase({TRAIN.alarms}[15m]))"
    return [
        _alert(
            "BridleTrainNotStarted", f"{TRAIN.stepped} == 0", "1h", "ticket",
            "{{ $labels.instance }} has made no step since it started.",
        ),
        _alert(
            "BridleTrainStalled", f"time() - ({TRAIN.stepped} > 0) > 900", "0m", "page",
            "{{ $labels.instance }} has made no step for {{ $value | humanizeDuration }}.",
        ),
        _alert(
            "BridleTrainHeartbeatLate", f"time() - ({TRAIN.heartbeat} > 0) > 180", "0m", "ticket",
            "{{ $labels.instance }} has not renewed its lock for {{ $value | humanizeDuration }}.",
        ),
        _alert(
            "BridleTrainAlarm", f"{alarms} > 0", "0m", "ticket",
            "{{ $labels.instance }} goes on with an alarm: {{ $labels.kind }}.",
        ),
        _alert(
            "BridleTrainCheckpointOld", f"time() - ({TRAIN.checkpointed} > 0) > 7200", "0m", "ticket",
            "{{ $labels.instance }} would lose {{ $value | humanizeDuration }} of work.",
        ),
        _alert(
            "BridleTrainNoCheckpoint", f"{TRAIN.checkpointed} == 0", "2h", "ticket",
            "{{ $labels.instance }} has written no checkpoint since it started.",
        ),
        _alert(
            "BridleTrainCheckpointSlow", f"{TRAIN.checkpoint} > 240", "0m", "ticket",
            "A checkpoint took {{ $value | humanizeDuration }}; the pod's grace period is 5 min.",
        ),
        _alert(
            "BridleTrainDataStarved",
            f"rate({TRAIN.data_wait}[15m]) > 0.3", "15m", "ticket",
            "{{ $labels.instance }} waits for clips {{ $value | humanizePercentage }} of its time.",
        ),
        _alert(
            "BridleTrainCorruptSamples", f"{corrupt} / {samples} > 0.01", "15m", "ticket",
            "{{ $value | humanizePercentage }} of samples cannot be read and are replaced.",
        ),
        _alert(
            "BridleTrainCodebookCollapses", f"{TRAIN.usage} < 0.1", "30m", "ticket",
            "Codebook {{ $labels.codebook }} uses {{ $value | humanizePercentage }} of its codes.",
        ),
    ]  # fmt: skip


def _alert(name: str, expr: str, lasting: str, severity: str, summary: str) -> dict[str, Any]:
    assert severity in SEVERITIES
    return {
        "alert": name,
        "expr": expr,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "runbook": f"docs/runbook.md#{name.lower()}"},
    }
