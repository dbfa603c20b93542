"""Images and video resume and split over ranks as sound does."""

from __future__ import annotations

import signal

import pytest
from launching import pretrain, rows, start_and_signal

SHORT = [
    "train.batch_size=8", "train.log_every=2", "train.checkpoint_every=4", "train.prometheus_port=0",
    "train.evaluate_clips=8", "phases.1.steps=8", "phases.2.steps=8", "phases.3.steps=4", "data.workers=0",
    "phases.1.warmup_steps=2", "phases.2.warmup_steps=2", "phases.3.warmup_steps=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "video"])
def test_a_killed_run_goes_on_to_the_last_digit_and_ranks_change_nothing(modality, tmp_path):
    arguments = ["--recipe", f"{modality}-mini", *SHORT]
    pretrain(tmp_path / "whole", *arguments)
    killed = tmp_path / "killed"
    code, output = start_and_signal(killed, 7, signal.SIGKILL, *arguments)
    assert code == -signal.SIGKILL, output
    pretrain(killed, *arguments)
    assert rows(killed) == rows(tmp_path / "whole")

    shared = tmp_path / "4-ranks"
    pretrain(shared, *arguments, ranks=4)
    for one, more in zip(rows(tmp_path / "whole"), rows(shared), strict=True):
        assert more["loss"] == pytest.approx(one["loss"], rel=5e-3), (one, more)
