"""The joint phase (Eq. 8): what learns when, that it resumes and splits over ranks, and what it leaves."""

from __future__ import annotations

import math
import signal

import pytest
import torch
import yaml
from launching import TINY, pretrain, rows, start_and_signal

from bridle.cli import main
from bridle.config import JointPhase, load_recipe
from bridle.model_folder import load
from bridle.modeling.bridle import Components
from bridle.modeling.patches import PatchShape
from bridle.modeling.target import TargetScale
from bridle.training.engine import RATE, RESTS, SlowStep, set_learning_rate
from bridle.training.joint import JointPhaseJob
from bridle.training.phases import EncoderModule, Metrics, TokenizerModule

CPU = torch.device("cpu")


def job_of(**settings) -> JointPhaseJob:
    model = load_recipe(str(TINY)).model
    make = Components(model, PatchShape(1, (16, 16)))
    tokenizer, cold = make.tokenizer(0), make.cold_start_tokenizer(1)
    for found in (tokenizer, cold):
        found.quantizer.initialize(torch.randn(300, 16), torch.Generator().manual_seed(0))
    phase = JointPhase(kind="joint", lr=1e-3, steps=10, **settings)
    scale = TargetScale(32, follows=True) if phase.target == "standardized" else None
    tokenizers = TokenizerModule(tokenizer, make.estimator(2), 1.0, scale)
    students = EncoderModule(make.encoder(3), make.decoder(4))
    return JointPhaseJob(students, tokenizers, phase, model.quantizer, CPU, False, cold)


def batch() -> dict[str, torch.Tensor]:
    order = torch.stack([torch.randperm(32) for _ in range(4)])
    return {"values": torch.randn(4, 1, 64, 128), "masked": order[:, :26], "visible": order[:, 26:]}


def state(job: JointPhaseJob) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in job.module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The components that moved."""
    return {".".join(name.split(".")[:2]) for name, value in before.items() if not torch.equal(value, after[name])}


def step(job: JointPhaseJob, optimizer: torch.optim.Optimizer, number: int) -> Metrics:
    job.begin_step(number)
    job.module.train()
    set_learning_rate(_Engine(optimizer), 1e-3, job.slow_step)
    loss, metrics, codes, *_ = job.module(*job.inputs(batch()))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    job.after_step(None)
    job.count(codes)
    return metrics


class _Engine:
    """What `set_learning_rate` sees of DeepSpeed's engine."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def optimizer_of(job: JointPhaseJob) -> torch.optim.AdamW:
    slow = [p for name, p in job.module.named_parameters() if name.startswith("tokenizers.")]
    fast = [p for name, p in job.module.named_parameters() if name.startswith("students.")]
    return torch.optim.AdamW(
        [{"params": fast, RESTS: False, RATE: 1.0}, {"params": slow, RESTS: True, RATE: 1.0}], lr=1e-3
    )


@pytest.mark.parametrize("teacher", ["slow", "current"])
def test_the_tokenizer_learns_in_every_third_step_and_rests_in_between(teacher: str) -> None:
    job = job_of(teacher=teacher, tokenizer_every=3)
    optimizer = optimizer_of(job)
    students, tokenizers = {"students.encoder", "students.decoder"}, {"tokenizers.tokenizer", "tokenizers.estimator"}
    follows = {"tokenizers.target"} | ({"teacher.encoder"} if teacher == "slow" else set())
    for number in range(7):
        before = state(job)
        metrics = step(job, optimizer, number)
        learns = number % 3 == 0
        assert changed(before, state(job)) == (students | tokenizers | follows if learns else students), number
        assert metrics["tokenizer_share"] == float(learns)
    counts = {float(optimizer.state[p]["step"]) for p in optimizer.param_groups[1]["params"]}
    assert counts == {3.0}


def test_the_loss_is_the_encoders_plus_alpha_times_the_tokenizers() -> None:
    job, clips = job_of(alpha=0.25, tokenizer_every=1), batch()
    job.begin_step(0)
    torch.manual_seed(0)
    loss, metrics, *_ = job.module(*job.inputs(clips))
    encoder = metrics["loss_per_codebook"].sum().item()
    tokenizer = metrics["commitment"].item() + 1 - metrics["cosine"].item()
    assert loss.item() == pytest.approx(encoder + 0.25 * tokenizer, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(loss.item())


def test_neither_half_gets_a_gradient_through_what_it_is_given() -> None:
    """The encoder's gradient is the same whatever the tokenizer's loss weighs, and the tokenizer's is alpha times."""
    found = []
    clips = batch()
    for alpha in (0.5, 5.0):
        torch.manual_seed(0)
        job = job_of(teacher="current", tokenizer_every=1, alpha=alpha)
        job.begin_step(0)
        job.module(*job.inputs(clips))[0].backward()
        found.append([torch.cat([p.grad.flatten() for p in half.parameters()]) for half in job.module.children()])
    (students, tokenizers), (other_students, other_tokenizers) = found
    torch.testing.assert_close(other_students, students)
    torch.testing.assert_close(other_tokenizers, 10 * tokenizers, rtol=1e-4, atol=1e-7)
    assert tokenizers.abs().sum() > 0


def test_a_slow_teacher_keeps_its_share_of_itself() -> None:
    job = job_of(teacher="slow", teacher_decay=0.9, tokenizer_every=1)
    start = {name: value.clone() for name, value in job.module.teacher.encoder.named_buffers()}
    step(job, optimizer_of(job), 0)
    now = dict(job.module.students.encoder.named_parameters())
    for name, value in job.module.teacher.encoder.named_buffers():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * now[name].detach())
    assert not list(job.module.teacher.parameters())


def test_resting_leaves_weights_and_moments_to_the_last_bit() -> None:
    weight = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([{"params": [weight], RESTS: True, RATE: 1.0}], lr=1e-2, weight_decay=0.1)
    for number, rests in enumerate((False, True, True, False)):
        weight.grad = torch.zeros(5) if rests else torch.randn(5)
        before, moments = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state.get(weight, {}).items()}
        set_learning_rate(_Engine(optimizer), 1e-2, SlowStep(rests, 0 if number == 0 else 1))
        optimizer.step()
        assert torch.equal(weight, before) is rests
        for name in ("exp_avg", "exp_avg_sq") if rests else ():
            assert torch.equal(optimizer.state[weight][name], moments[name])


def recipe_file(folder, quantizer: dict) -> str:
    recipe = yaml.safe_load(TINY.read_text())
    recipe["phases"] = [
        {"kind": "cold_start"},
        {"kind": "encoder", "steps": 4, "lr": 1e-3},
        {"kind": "joint", "steps": 14, "warmup_steps": 2, "lr": 1e-3, "tokenizer_every": 3},
    ]
    recipe["model"]["quantizer"] |= quantizer
    file = folder / "joint.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [{"codebooks": 1}, {"codebooks": 2}], ids=["vq", "rq"])
def test_a_joint_run_resumes_to_the_last_digit_and_leaves_a_model(quantizer, tmp_path):
    recipe = recipe_file(tmp_path, quantizer)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrain(whole, "--recipe", recipe)
    for config in ("zero1",) if quantizer["codebooks"] == 1 else ():
        pretrain(tmp_path / config, "--recipe", recipe, config=config, ranks=2)
        for one, two in zip(rows(whole), rows(tmp_path / config), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=5e-3), (one, two)
    code, output = start_and_signal(killed, 6, signal.SIGKILL, "--recipe", recipe)
    assert code == -signal.SIGKILL, output
    pretrain(killed, "--recipe", recipe)
    assert rows(killed) == rows(whole)
    last = rows(whole)[-1]
    assert last["phase"] == "joint" and last["split"] == "heldout" and "verdict" in last
    assert {"accuracy", "position_accuracy", "r2", "r2_cold_start", "cosine"} <= last.keys()
    assert all(math.isfinite(row["loss"]) for row in rows(whole))
    model = load(whole / "models/final")
    assert model.info["tokenizer"] == "learned" and model.info["codebooks"] == quantizer["codebooks"]
    assert (whole / "models/iteration-2").is_dir()
    assert main(["export", str(whole), str(tmp_path / "exported")]) == 0
    assert main(["export", str(whole), str(tmp_path / "second"), "--iteration", "2"]) == 0
    for folder in ("exported", "second"):
        assert load(tmp_path / folder).info["sha256"] == model.info["sha256"]


def test_joint_training_with_zero_3_is_refused(tmp_path):
    done = pretrain(tmp_path / "run", "--recipe", recipe_file(tmp_path, {}), config="zero3", check=False)
    assert done.returncode == 2
    assert "phases.2: kind joint does not work with ZeRO stage 3" in done.stderr
