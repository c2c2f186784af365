"""Optimizers, schedules, the average of the weights, and settings."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from train.parallel.processes import Processes
from train.trainer.ema import Ema
from train.trainer.errors import TrainingError
from train.trainer.optimizer import learning_rate, make_optimizer
from train.trainer.scalars import Scalars
from train.trainer.settings import LrScheduleSettings, OptimizerSettings, TrainerSettings, accumulation

ALONE = Processes(device=torch.device("cpu"))


def test_only_matrices_decay():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    groups = make_optimizer(OptimizerSettings(weight_decay=0.1), model).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 2)]


@pytest.mark.parametrize(
    ("kind", "module", "package"), [("adamw8bit", "bitsandbytes", "bitsandbytes"), ("came", "came_pytorch", "came-pytorch")]
)
def test_optional_optimizers_say_how_to_install_them(monkeypatch, kind, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match=f"pip install {package}"):
        make_optimizer(OptimizerSettings(kind=kind), nn.Linear(2, 2))


@pytest.mark.parametrize(("kind", "module"), [("adamw", "torch"), ("came", "came_pytorch")])
def test_a_quadratic_falls(kind, module):
    pytest.importorskip(module)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    target = torch.randn(4, 4)
    optimizer = make_optimizer(OptimizerSettings(kind=kind, lr=1e-2, weight_decay=0), model)
    losses = []
    for _ in range(200):
        loss = (model.weight - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_learning_rates():
    def rates(kind, floor=0.0, steps=13):
        schedule = LrScheduleSettings(kind=kind, warm_up_steps=4, floor=floor)
        return [learning_rate(schedule, 2.0, step, steps) for step in range(steps)]

    for kind in ("constant", "linear", "cosine"):
        assert rates(kind)[:5] == pytest.approx([0.5, 1, 1.5, 2, 2])
    assert rates("constant")[4:] == [2.0] * 9
    assert rates("linear")[4:] == pytest.approx([2 * (1 - i / 8) for i in range(9)])
    assert rates("cosine", floor=0.1)[4:] == pytest.approx([0.2 + 1.8 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)])
    assert learning_rate(LrScheduleSettings(kind="cosine", warm_up_steps=5), 1.0, 5, 6) == 1.0  # the warm-up is nearly all


def test_average_is_reached_gradually():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model.named_parameters(), 0.5)
    nn.init.ones_(model.weight)
    expected = 0.0
    for update in range(12):
        ema.update(update)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + 1 - decay
        assert ema.average["weight"].item() == pytest.approx(expected)
    assert model.weight.item() == 1


def test_tensorboard_that_is_absent_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = TrainerSettings(folder=tmp_path, steps=1, batch=1, micro_batch=1, tensorboard=True)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        Scalars(settings, 0, {}, ALONE)


def test_wandb(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run))
    settings = TrainerSettings(folder=tmp_path / "run", steps=1, batch=1, micro_batch=1, tensorboard=False, wandb_project="sana")
    for first_step in (0, 5):  # a run and its continuation
        scalars = Scalars(settings, first_step, {"a": 1}, ALONE)
        scalars.add(first_step + 1, {"loss": 0.5})
        scalars.close()
    assert [call for call in calls if not isinstance(call, dict)] == [
        (1, {"train/loss": 0.5}),
        "finished",
        (6, {"train/loss": 0.5}),
        "finished",
    ]
    first, second = (call for call in calls if isinstance(call, dict))
    assert first == second  # one identity: one curve
    assert (first["project"], first["name"], first["config"], first["resume"]) == ("sana", "run", {"a": 1}, "allow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match=r"wandb_project: got 'sana'.*pip install wandb, or set it to null"):
        Scalars(settings, 0, {}, ALONE)


def test_settings_load_without_pytorch():
    code = "import sys, train.trainer.settings, train.objective.settings; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.strip() == "False"


def test_accumulation(tmp_path):
    settings = TrainerSettings(folder=tmp_path, steps=1, batch=24, micro_batch=3)
    assert [accumulation(settings, n) for n in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(TrainingError, match=r"got 24, which 5 processes with a micro_batch of 3 do not divide.*Use 15 or 30"):
        accumulation(settings, 5)
    with pytest.raises(TrainingError, match=r"Use 48, or"):
        accumulation(settings, 16)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"micro_batch": 0},
        {"clip": 0},
        {"precision": "fp16"},
        {"ema_decay": 1},
        {"epochs": 3},
        {"optimizer": {"kind": "sgd"}},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainerSettings(**({"folder": "x", "steps": 1, "batch": 1, "micro_batch": 1} | wrong))
