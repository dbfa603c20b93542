"""What a run says of itself: metrics.jsonl, TensorBoard, Prometheus and a progress line. Rank 0 only."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from bridle.files import whole_file
from bridle.training.patient_file import PatientFile
from bridle.training.timing import PARTS

log = logging.getLogger("bridle")
ALARMS = ("checkpoint", "damaged_checkpoint", "heartbeat", "metrics")
"""Kinds of alarms: a checkpoint could not be written; one was damaged and the one before was taken; a heartbeat could
not be written; a row of metrics could not, and waits in memory."""
STEP_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class PrometheusMetrics:
    """The `bridle_train_*` metrics and their endpoint."""

    def __init__(self, port: int) -> None:
        to = self.registry = CollectorRegistry()
        self.samples = Counter("bridle_train_samples_total", "Clips trained on.", ["phase"], registry=to)
        self.steps = Counter("bridle_train_steps_total", "Optimizer steps.", ["phase"], registry=to)
        self.step_seconds = Histogram(
            "bridle_train_step_seconds", "Mean step of a log window.", buckets=STEP_BUCKETS, registry=to
        )
        self.data_wait = Counter(
            "bridle_train_data_wait_seconds_total", "Seconds spent waiting for clips.", registry=to
        )
        self.parts = Counter(
            "bridle_train_part_seconds_total",
            "Seconds of steps in each part, mean of ranks.",
            ["part"],
            registry=to,
        )
        self.straggling = Gauge(
            "bridle_train_straggling_ratio",
            "Slowest rank's time before it waits for others, over the median rank's.",
            registry=to,
        )
        self.memory = Gauge(
            "bridle_train_memory_bytes", "The most that a rank has taken: of its GPU, else resident.", registry=to
        )
        self.flops = Gauge(
            "bridle_train_flops_per_second", "Model FLOP/s of a rank, attention included.", ["phase"], registry=to
        )
        self.mfu = Gauge("bridle_train_mfu_ratio", "The same over the device's peak.", ["phase"], registry=to)
        self.loss = Gauge("bridle_train_loss", "Loss.", ["phase"], registry=to)
        self.usage = Gauge(
            "bridle_train_codebook_usage_ratio", "Share of codes used in a log window.", ["codebook"], registry=to
        )
        self.corrupt = Counter(
            "bridle_train_corrupt_samples_total", "Clips that could not be read and were replaced.", registry=to
        )
        self.checkpoint = Gauge(
            "bridle_train_checkpoint_seconds", "Seconds that writing the last checkpoint took.", registry=to
        )
        self.checkpoint_stall = Gauge(
            "bridle_train_checkpoint_stall_seconds",
            "Seconds that training waited for the last checkpoint.",
            registry=to,
        )
        self.checkpointed = Gauge(
            "bridle_train_checkpoint_timestamp_seconds", "When the last checkpoint was written.", registry=to
        )
        self.stepped = Gauge("bridle_train_step_timestamp_seconds", "When the last step ended.", registry=to)
        self.heartbeat = Gauge(
            "bridle_train_heartbeat_timestamp_seconds", "When the run last said that it holds its folder.", registry=to
        )
        self.alarms = Counter(
            "bridle_train_alarms_total", "What went wrong and did not end the run.", ["kind"], registry=to
        )
        for kind in ALARMS:
            self.alarms.labels(kind)
        self.port = self._serve(port) if port else 0

    def _serve(self, port: int) -> int:
        try:
            server, _ = start_http_server(port, registry=self.registry)
        except OSError:  # taken, by another run on this machine most likely
            server, _ = start_http_server(0, registry=self.registry)
        return int(server.server_port)

    def beaten(self, written: bool) -> None:
        """Takes over a heartbeat of the run's lock."""
        if written:
            self.heartbeat.set_to_current_time()
        else:
            self.alarms.labels("heartbeat").inc()

    def alarm_counts(self) -> dict[str, float]:
        """How often each kind of alarm was raised."""
        samples = [sample for metric in self.alarms.collect() for sample in metric.samples]
        return {sample.labels["kind"]: sample.value for sample in samples if sample.name.endswith("_total")}

    def observe(self, row: Mapping[str, Any], steps: int, clips: int, corrupt: int) -> None:
        """Takes over one row of metrics."""
        phase = row["phase"]
        self.samples.labels(phase).inc(clips)
        self.steps.labels(phase).inc(steps)
        self.step_seconds.observe(row["step_seconds"])
        self.data_wait.inc(row["data_wait"] * row["step_seconds"] * steps)
        for part in PARTS:
            self.parts.labels(part).inc(row[part] * row["step_seconds"] * steps)
        self.straggling.set(row["straggling"])
        self.memory.set(row["memory_bytes"])
        self.flops.labels(phase).set(row["flops_per_second"])
        self.mfu.labels(phase).set(row["mfu"])
        self.loss.labels(phase).set(row["loss"])
        self.corrupt.inc(corrupt)
        for m, share in enumerate(row.get("codebook_usage", ()), start=1):
            self.usage.labels(str(m)).set(share)


class RunLog:
    """Writes rows of metrics everywhere. On resume, rows past the checkpoint go, so that each step has one row."""

    def __init__(self, run: Path, prometheus_port: int) -> None:
        self.path = run / "metrics.jsonl"
        self.rows = PatientFile(self.path)
        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        self.events = PatientFile(folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}")
        self.events.append(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        self.prometheus = PrometheusMetrics(prometheus_port)
        if self.prometheus.port:
            log.info("metrics at http://localhost:%d/metrics", self.prometheus.port)

    def forget_after(self, phase_index: int, step: int, evaluation_due: bool) -> None:
        """Drops rows of later steps, from a run that was killed after its last checkpoint, and a torn last line.

        Args:
            evaluation_due: the checkpoint was written before the held-out row of its step, which comes again.
        """
        if not self.path.exists():
            return
        kept, text = [], self.path.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            comes_again = evaluation_due and row["split"] == "heldout"
            at = (row["phase_index"], row["step"])
            if at < (phase_index, step) or (at == (phase_index, step) and not comes_again):
                kept.append(line + "\n")
        if "".join(kept) != text:
            with whole_file(self.path) as aside:
                aside.write_text("".join(kept), encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row to metrics.jsonl and TensorBoard; on a full disk it waits in memory, with an alarm."""
        self._keep(self.rows, (json.dumps(row) + "\n").encode())
        self._keep(self.events, b"".join(map(_record, _scalars(row))))

    def flush(self) -> None:
        """Writes rows that wait.

        Raises:
            OSError: there is still no room for them.
        """
        self.rows.flush()

    def _keep(self, file: PatientFile, data: bytes) -> None:
        try:
            file.append(data)
        except OSError as error:
            self.prometheus.alarms.labels("metrics").inc()
            log.warning("%s; rows of metrics wait in memory", error)


def _scalars(row: Mapping[str, Any]) -> Iterator[Event]:
    """A row's numbers as TensorBoard has them."""
    prefix = f"{row['phase_index']}-{row['phase']}/{row['split']}"
    for key, value in row.items():
        values = value if isinstance(value, list) else [value]
        for i, number in enumerate(values, start=1):
            if isinstance(number, (int, float)) and key not in ("phase_index", "step"):
                name = f"{prefix}/{key}_{i}" if isinstance(value, list) else f"{prefix}/{key}"
                yield Event(wall_time=time.time(), step=row["step"], summary=scalar(name, number))


def _record(event: Event) -> bytes:
    data = io.BytesIO()
    RecordWriter(data).write(event.SerializeToString())
    return data.getvalue()


def progress_line(row: Mapping[str, Any], phase: str, total: int, seconds_left: float) -> str:
    """One line for a person."""
    parts = [f"{phase} step {row['step']}/{total}", f"loss {row['loss']:.4f}"]
    if "accuracy" in row:
        each = row["accuracy"] if isinstance(row["accuracy"], list) else [row["accuracy"]]
        parts.append("accuracy " + " ".join(f"{value:.3f}" for value in each))
    if "mean_average_precision" in row:
        parts.append(f"mAP {row['mean_average_precision']:.3f}")
    if "cosine" in row:
        parts.append(f"cosine {row['cosine']:.4f}")
    if "codebook_usage" in row:
        parts.append("usage " + " ".join(f"{value:.2f}" for value in row["codebook_usage"]))
    if row["split"] == "train":
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        parts += [
            f"lr {row['lr']:.2e}",
            f"grad {row['gradient_norm']:.2f}",
            f"{row['samples_per_second']:.1f} clips/s",
            f"wait {100 * row['data_wait']:.0f}%",
            f"MFU {100 * row['mfu']:.0f}%",
            f"ETA {hours}:{minutes:02d}:{seconds:02d}",
        ]
    else:
        parts.insert(1, "held out")
    return "  ".join(parts)
