"""Grafana's dashboards, one of the service and one of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh
from names import SERVE, TRAIN
from rules import AVAILABLE, CALLS, QUICK, SECONDS

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OF = 'instance=~"$instance"'
STEP = "$__rate_interval"
ROWS = "10m"
"""A run counts when it logs a row, every `train.log_every` steps."""
Query = tuple[str, str]
"""An expression, and what its lines are called."""


def serving() -> str:
    """The dashboard of the service, as JSON."""
    board = _board("bridle-serve", "BRIDLE service", SERVE.ready, "Calls, waiting, batches and models of the service.")
    ready, asked = f"sum({SERVE.ready}{{{OF}}})", f"sum(rate({SERVE.requests}{{{OF},{CALLS}}}[{STEP}]))"
    left = [
        f"1 - max(bridle:serve_{kind}_ratio:rate30d) / {round(1 - share, 6)}"
        for kind, share in (("error", AVAILABLE), ("slow", QUICK))
    ]
    board.with_row(dashboard.Row("Objectives"))
    for title, query, unit, text in (
        ("Ready", ready, "short", "Processes that say they are ready."),
        ("Calls", asked, "reqps", "Without probes, metrics and pages."),
        ("Failing now", "max(bridle:serve_error_ratio:rate5m)", "percentunit", "Answered with 5xx, over 5 min."),
        ("Slow now", "max(bridle:serve_slow_ratio:rate5m)", "percentunit", f"/tokenize over {SECONDS} s, over 5 min."),
        ("Errors left", left[0], "percentunit", f"Of the month's budget: {1 - AVAILABLE:.1%} of calls may fail."),
        ("Slowness left", left[1], "percentunit", f"Of the month's budget: {1 - QUICK:.0%} of calls may be slow."),
    ):
        board.with_panel(_number(title, query, unit, text))
    board.with_row(dashboard.Row("Calls"))
    rate = f"(rate({SERVE.requests}{{{OF},{CALLS}}}[{STEP}]))"
    board.with_panel(_lines("Calls by route", [(f"sum by (route) {rate}", "{{route}}")], "reqps"))
    board.with_panel(_lines("Calls by status", [(f"sum by (status) {rate}", "{{status}}")], "reqps"))
    board.with_panel(_lines("Duration of /tokenize", _quantiles(SERVE.request_seconds, f'{OF},route="/tokenize"'), "s"))
    flight = [(f"sum({SERVE.in_flight}{{{OF}}})", "in flight"), (f"sum({SERVE.queued}{{{OF}}})", "files queued")]
    board.with_panel(_lines("Under way", flight, "short"))
    refused = f"sum by (type) (rate({SERVE.rejected}{{{OF}}}[{STEP}]))"
    board.with_panel(_lines("Refused by problem", [(refused, "{{type}}")], "reqps"))
    board.with_panel(
        _lines(
            "Bodies",
            [
                (f"sum(rate({SERVE.received_bytes}{{{OF}}}[{STEP}]))", "received"),
                (f"sum({SERVE.upload_bytes}{{{OF}}})", "in memory (bytes)"),
            ],
            "Bps",
        )
    )
    board.with_row(dashboard.Row("Models"))
    clips = f"sum by (model, operation) (rate({SERVE.clips}{{{OF}}}[{STEP}]))"
    board.with_panel(_lines("Clips", [(clips, "{{model}} {{operation}}")], "cps"))
    size = [f"sum by (model) (rate({SERVE.batch_size}_{part}{{{OF}}}[{STEP}]))" for part in ("sum", "count")]
    board.with_panel(_lines("Clips in a batch", [(" / ".join(size), "{{model}}")], "short"))
    for title, metric in (
        ("Wait for a batch", SERVE.queue_seconds),
        ("Forward pass", SERVE.model_seconds),
        ("Decoding, with its wait", SERVE.decode_seconds),
    ):
        board.with_panel(_lines(title, _quantiles(metric, OF, "model"), "s"))
    board.with_panel(
        _lines(
            "Lost and replaced (in 5 min)",
            [
                (f"sum by (model) (increase({SERVE.dropped}{{{OF}}}[5m]))", "{{model}}: clips dropped"),
                (f"sum by (kind, model) (increase({SERVE.worker_restarts}{{{OF}}}[5m]))", "{{model}}: {{kind}} ended"),
                (f"sum by (outcome, model) (increase({SERVE.reloads}{{{OF}}}[5m]))", "{{model}}: reload {{outcome}}"),
            ],
            "short",
        )
    )
    lost = f"sum by (instance) (increase({SERVE.lost_lines}{{{OF}}}[5m]))"
    board.with_panel(_lines("Log lines lost (in 5 min)", [(lost, "{{instance}}")], "short"))
    loaded = f"count by (model, modality, sha256) ({SERVE.model_info}{{{OF}}})"
    board.with_panel(_lines("Loaded (pods)", [(loaded, "{{model}} {{modality}} {{sha256}}")], "short"))
    versions = f"count by (version) ({SERVE.build_info}{{{OF}}})"
    board.with_panel(_lines("Versions (pods)", [(versions, "{{version}}")], "short"))
    return _text(board)


def training() -> str:
    """The dashboard of training, as JSON."""
    board = _board("bridle-train", "BRIDLE training", TRAIN.steps, "Loss, codes, speed and safety of runs.")
    board.with_row(dashboard.Row("Now"))
    waiting = f"max(rate({TRAIN.data_wait}{{{OF}}}[{ROWS}]))"
    for title, query, unit, text in (
        ("Clips", f"sum(rate({TRAIN.samples}{{{OF}}}[{ROWS}]))", "cps", "Over all ranks."),
        ("Waiting for clips", waiting, "percentunit", "Share of the time that a step waits for its batch."),
        ("Since a step", f"max(time() - ({TRAIN.stepped}{{{OF}}} > 0))", "s", ""),
        (
            "Since a checkpoint",
            f"max(time() - ({TRAIN.checkpointed}{{{OF}}} > 0))",
            "s",
            "What a loss of the node costs.",
        ),
        ("Since a heartbeat", f"max(time() - ({TRAIN.heartbeat}{{{OF}}} > 0))", "s", "Of the lock on the run folder."),
        ("Alarms", f"sum(increase({TRAIN.alarms}{{{OF}}}[1h]))", "short", "In the last hour."),
    ):
        board.with_panel(_number(title, query, unit, text))
    board.with_row(dashboard.Row("Learning"))
    board.with_panel(_lines("Loss", [(f"{TRAIN.loss}{{{OF}}}", "{{instance}} {{phase}}")], "short"))
    usage = f"{TRAIN.usage}{{{OF}}}"
    board.with_panel(_lines("Codes in use", [(usage, "{{instance}} codebook {{codebook}}")], "percentunit"))
    board.with_row(dashboard.Row("Speed"))
    samples = f"sum by (instance, phase) (rate({TRAIN.samples}{{{OF}}}[{ROWS}]))"
    board.with_panel(_lines("Clips trained on", [(samples, "{{instance}} {{phase}}")], "cps"))
    steps = f"sum by (instance, phase) (rate({TRAIN.steps}{{{OF}}}[{ROWS}]))"
    board.with_panel(_lines("Steps", [(steps, "{{instance}} {{phase}}")], "ops"))
    took = [f"sum by (instance) (rate({TRAIN.step_seconds}_{part}{{{OF}}}[{ROWS}]))" for part in ("sum", "count")]
    board.with_panel(_lines("A step", [(" / ".join(took), "{{instance}}")], "s"))
    wait = f"rate({TRAIN.data_wait}{{{OF}}}[{ROWS}])"
    board.with_panel(_lines("Waiting for clips", [(wait, "{{instance}}")], "percentunit"))
    parts = f"sum by (instance, part) (rate({TRAIN.parts}{{{OF}}}[{ROWS}]))"
    board.with_panel(_lines("Where a step's time goes", [(parts, "{{instance}} {{part}}")], "percentunit"))
    board.with_panel(_lines("MFU", [(f"{TRAIN.mfu}{{{OF}}}", "{{instance}} {{phase}}")], "percentunit"))
    board.with_panel(_lines("Model FLOP/s of a rank", [(f"{TRAIN.flops}{{{OF}}}", "{{instance}} {{phase}}")], "flops"))
    slowest = f"{TRAIN.straggling}{{{OF}}}"
    board.with_panel(_lines("Slowest rank over the median", [(slowest, "{{instance}}")], "short"))
    board.with_panel(_lines("Memory of a rank, at most", [(f"{TRAIN.memory}{{{OF}}}", "{{instance}}")], "bytes"))
    board.with_row(dashboard.Row("Safety"))
    checkpoint = [
        (f"{TRAIN.checkpoint}{{{OF}}}", "{{instance}}: writing"),
        (f"{TRAIN.checkpoint_stall}{{{OF}}}", "{{instance}}: training waits"),
    ]
    board.with_panel(_lines("The last checkpoint", checkpoint, "s"))
    alarms = f"sum by (instance, kind) (increase({TRAIN.alarms}{{{OF}}}[5m]))"
    board.with_panel(_lines("Alarms (in 5 min)", [(alarms, "{{instance}} {{kind}}")], "short"))
    corrupt = f"sum by (instance) (rate({TRAIN.corrupt}{{{OF}}}[{ROWS}]))"
    board.with_panel(_lines("Samples that cannot be read", [(corrupt, "{{instance}}")], "cps"))
    return _text(board)


def _board(uid: str, title: str, metric: str, text: str) -> dashboard.Dashboard:
    instances = dashboard.QueryVariable("instance").label("Instance").datasource(DATASOURCE)
    instances = instances.query(f"label_values({metric}, instance)").refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    instances = instances.multi(True).include_all(True).all_value(".*")
    board = dashboard.Dashboard(title).uid(uid).description(text).tags(["bridle"]).editable().timezone("browser")
    board = board.refresh("15s").time("now-1h", "now").tooltip(DashboardCursorSync.CROSSHAIR)
    return board.with_variable(dashboard.DatasourceVariable("datasource").type("prometheus")).with_variable(instances)


def _number(title: str, query: str, unit: str, text: str) -> stat.Panel:
    panel = stat.Panel().title(title).description(text).datasource(DATASOURCE).unit(unit).height(4).span(4)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.with_target(_target("A", query, title))


def _lines(title: str, queries: Sequence[Query], unit: str) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).datasource(DATASOURCE).unit(unit).height(8).span(12).min(0)
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel = panel.legend(legend.show_legend(True)).tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    for letter, (query, name) in zip("ABC", queries, strict=False):
        panel.with_target(_target(letter, query, name))
    return panel


def _target(letter: str, query: str, name: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(letter).expr(query).legend_format(name)


def _quantiles(histogram: str, labels: str, *by: str) -> list[Query]:
    group, said = ", ".join((*by, "le")), "".join(f"{{{{{label}}}}} " for label in by)
    rate = f"sum by ({group}) (rate({histogram}_bucket{{{labels}}}[{STEP}]))"
    return [(f"histogram_quantile({q}, {rate})", f"{said}p{q * 100:g}") for q in (0.5, 0.95, 0.99)]


def _text(board: dashboard.Dashboard) -> str:
    found: Any = json.loads(JSONEncoder(sort_keys=True).encode(board.build()))
    for number, panel in enumerate(found["panels"], start=1):
        panel["id"] = number
    return json.dumps(found, indent=1, sort_keys=True) + "\n"
