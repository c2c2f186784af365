"""A run in one piece against the same run stopped and resumed, bit for bit; and what stops a run.

Run as a program, this file trains the tiny model in a folder: `python tests/train/test_trainer.py FOLDER STEPS WAIT`. After step
WAIT it waits for SIGTERM; 0: it does not wait.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.objective.flow import FlowObjective
from train.objective.settings import LogitNormal, ObjectiveSettings
from train.parallel.processes import Processes
from train.trainer import checkpoint
from train.trainer.blocks import fast_feed_forward
from train.trainer.errors import NonFiniteError, TrainingError
from train.trainer.loop import Trainer
from train.trainer.settings import LrScheduleSettings, OptimizerSettings, TrainerSettings
from train.trainer.stop import Stop

ROOT = Path(__file__).parents[2]
MODEL = SanaTransformerConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=6,
)
OBJECTIVE = FlowObjective(ObjectiveSettings(timesteps=LogitNormal(mean=0.2), caption_dropout=0.3))


class MemorySource:
    """Shuffled anew each epoch; the position is an epoch and a place in it."""

    def __init__(self, *, num=10, batch=2, poison=()):
        generator = torch.Generator().manual_seed(9)
        self.latents = torch.randn(num, 4, 4, 4, generator=generator)
        self.embeds = torch.randn(num, 5, 6, generator=generator)
        self.lengths = torch.randint(1, 6, (num,), generator=generator)
        self.batch, self.poison, self.epoch, self.place, self.num_yielded = batch, poison, 0, 0, 0

    def __iter__(self):
        while True:
            order = torch.randperm(len(self.latents), generator=torch.Generator().manual_seed(self.epoch))
            rows = order[self.place : self.place + self.batch]
            self.place += self.batch
            if self.place + self.batch > len(order):
                self.epoch, self.place = self.epoch + 1, 0
            latents = self.latents[rows]
            if self.num_yielded in self.poison:
                latents = latents * torch.nan
            self.num_yielded += 1
            mask = (torch.arange(5) < self.lengths[rows, None]).long()
            yield {"latents": latents, "prompt_embeds": self.embeds[rows], "prompt_mask": mask}

    def state_dict(self):
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state):
        self.epoch, self.place = state["epoch"], state["place"]


def settings_for(folder, **changes):
    values = {
        "folder": folder,
        "steps": 8,
        "batch": 4,
        "micro_batch": 2,
        "seed": 3,
        "optimizer": OptimizerSettings(lr=3e-3),
        "schedule": LrScheduleSettings(kind="cosine", warm_up_steps=2, floor=0.1),
        "ema_decay": 0.99,
        "precision": "fp32",
        "tensorboard": False,
    }
    return TrainerSettings(**(values | changes))


def make_trainer(folder, *, source=None, model=MODEL, objective=OBJECTIVE, log=lambda line: None, seed=0, on_step=None, **changes):
    torch.manual_seed(seed)
    network = SanaTransformer2DModel(model)
    settings = settings_for(folder, **changes)
    return Trainer(network, source or MemorySource(), settings, objective, log=log, on_step=on_step)


def trained(folder, *, stop_at=(), resume_seed=77, **changes):
    """The losses, and the last trainer, of a run that is stopped after the steps `stop_at` and resumed by new objects."""
    losses = []
    for end in (*stop_at, None):
        stop = Stop()

        def on_step(step, loss, stop=stop, end=end):
            losses.append(loss)
            stop.requested = step == end

        trainer = make_trainer(folder, on_step=on_step, seed=0 if not losses else resume_seed, **changes)
        assert trainer.resume() == bool(losses)
        assert trainer.run(stop) == (end is None)
    return losses, trainer


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"activation_checkpointing": True}, {"ema_decay": None, "clip": None}],
    ids=["fp32", "bf16", "activation_checkpointing", "plain"],
)
def test_resumed_run_is_exact(tmp_path, changes):
    whole, one = trained(tmp_path / "whole", **changes)
    parts, other = trained(tmp_path / "parts", stop_at=(3, 4), **changes)
    assert len(whole) == 8
    assert len(set(whole)) == 8
    assert parts == whole  # floats, to the last bit
    assert_same(one.model.state_dict(), other.model.state_dict())
    if one.ema is not None:
        assert_same(one.ema.average, other.ema.average)
    for index, state in one.optimizer.state_dict()["state"].items():
        assert_same(state, other.optimizer.state_dict()["state"][index])
    assert one.source.state_dict() == other.source.state_dict()


def test_resumed_run_depends_on_each_part_of_the_checkpoint(tmp_path):
    """That the comparison above would notice: without the data's position or the average, the resumed run differs."""
    whole, one = trained(tmp_path / "whole")
    trained(tmp_path / "parts", stop_at=(), steps=3, schedule=LrScheduleSettings(kind="cosine", warm_up_steps=2, floor=0.1))
    path = checkpoint.latest(tmp_path / "parts")
    state = json.loads((path / "state.json").read_text())
    state["data"], state["config"]["trainer"]["steps"] = {"epoch": 0, "place": 0}, 8
    (path / "state.json").write_text(json.dumps(state))
    (path / "ema.safetensors").unlink()
    losses = []
    trainer = make_trainer(tmp_path / "parts", on_step=lambda step, loss: losses.append(loss))
    trainer.resume()
    trainer.run()
    assert losses[0] != whole[3]
    assert not all(torch.equal(a, one.ema.average[name]) for name, a in trainer.ema.average.items())


@pytest.mark.slow
def test_compiled_run_is_exact_too(tmp_path):
    whole, trainer = trained(tmp_path / "whole", compile=True)
    assert trained(tmp_path / "parts", stop_at=(3,), compile=True)[0] == whole
    assert whole == pytest.approx(trained(tmp_path / "eager")[0], rel=1e-5)
    assert trainer.parameters.keys() == dict(SanaTransformer2DModel(MODEL).named_parameters()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["activation_checkpointing", "fast_feed_forward"])
def test_changed_blocks_are_compiled_too(tmp_path, setting):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    changes = {setting: True, "steps": 2, "batch": 2}
    losses, _ = trained(tmp_path / "compiled", compile=True, **changes)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert losses == pytest.approx(trained(tmp_path / "eager", **changes)[0], rel=1e-5)


def test_deterministic_kernels_are_asked_for_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seen = []
    trainer = make_trainer(tmp_path, deterministic=True, steps=1)
    trainer.model.register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    trainer.run()
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_activation_checkpointing_changes_no_loss(tmp_path):
    assert trained(tmp_path / "a")[0] == trained(tmp_path / "b", activation_checkpointing=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fast_feed_forward_changes_no_loss(tmp_path, precision):
    plain, one = trained(tmp_path / "plain", precision=precision)
    changes = {"fast_feed_forward": True, "activation_checkpointing": True}
    fast, other = trained(tmp_path / "fast", precision=precision, **changes)
    assert fast == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 0.01)
    assert other.parameters.keys() == one.parameters.keys()
    with pytest.raises(TrainingError, match="has no mix-FFN without a norm"):
        fast_feed_forward(torch.nn.Linear(1, 1))


def test_accumulation_is_the_batch_as_a_whole(tmp_path):
    """With the same random numbers a batch of 4 and two of 2 have one gradient: here, where there is no noise to draw."""
    trainer = make_trainer(
        tmp_path, objective=FlowObjective(ObjectiveSettings(flow_shift=1e-30, caption_dropout=0))
    )  # t is 0: noise is the target's
    batches = iter(MemorySource())
    first, second = (trainer._micro_batch(batch, n)["loss"] for n, batch in enumerate([next(batches), next(batches)]))
    norm = torch.autograd.grad((first + second) / 2, list(trainer.parameters.values()), allow_unused=True)
    expected = torch.nn.utils.get_total_norm([g for g in norm if g is not None]).item()
    scalars, got, _ = trainer._step(iter(MemorySource()))
    assert got == pytest.approx(expected, rel=1e-5)
    assert scalars["loss"] == pytest.approx((first + second).item() / 2, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "module"), [("came", "came_pytorch"), ("adamw8bit", "bitsandbytes")])
def test_optional_optimizers_resume_exactly(tmp_path, kind, module):
    pytest.importorskip(module)
    optimizer = OptimizerSettings(kind=kind, lr=1e-3)
    model = replace(MODEL, attention_head_dim=64, cross_attention_head_dim=64, cross_attention_dim=128)  # 4096 numbers have 8 bits
    whole, one = trained(tmp_path / "whole", optimizer=optimizer, model=model)
    parts, other = trained(tmp_path / "parts", stop_at=(3,), optimizer=optimizer, model=model)
    assert parts == whole
    assert_same(one.model.state_dict(), other.model.state_dict())


@pytest.mark.slow
def test_it_learns(tmp_path):
    losses = []
    trainer = make_trainer(
        tmp_path,
        steps=80,
        batch=8,
        micro_batch=8,
        source=MemorySource(num=8, batch=8),
        on_step=lambda _, loss: losses.append(loss),
    )
    trainer.run()
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_losses_that_are_not_finite_are_skipped_and_counted(tmp_path):
    lines, losses = [], []
    trainer = make_trainer(
        tmp_path, source=MemorySource(poison={5}), log=lines.append, log_steps=1, on_step=lambda _, loss: losses.append(loss)
    )
    trainer.run()
    assert [loss != loss for loss in losses] == [False, False, True, False, False, False, False, False]  # batch 5 is in step 3
    assert (trainer.non_finite, trainer.updates, trainer.step) == (1, 7, 8)
    assert all(torch.isfinite(p).all() for p in trainer.parameters.values())
    assert "skipped 1 |" in lines[-2]
    assert "pictures/s" in lines[-2]


def test_too_many_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, source=MemorySource(poison={6, 8, 10}), max_non_finite=2, checkpoint_steps=2)
    with pytest.raises(NonFiniteError, match=r"3 losses or gradients were not finite; max_non_finite is 2.*step_00000004"):
        trainer.run()
    again = make_trainer(tmp_path, max_non_finite=2, checkpoint_steps=2)
    assert again.resume()
    assert again.step == 4
    assert all(torch.isfinite(p).all() for p in again.parameters.values())


def test_validation_is_given_the_average_and_changes_no_loss(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses, visits = [], []
    trainer = make_trainer(tmp_path / "run", tensorboard=True, log_steps=1, on_step=lambda _, loss: losses.append(loss))

    def validate(step, weights):
        assert weights.keys() == trainer.model.state_dict().keys()
        assert all(torch.equal(weights[name], average) for name, average in trainer.ema.average.items())
        visits.append(step)
        return {"score": float(torch.rand(()))}

    trainer.validate, trainer.validation_steps = validate, 3
    trainer.run()
    assert visits == [3, 6, 8]
    assert losses == trained(tmp_path / "without")[0]
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in written.Scalars("validation/score")] == visits
    assert [event.value for event in written.Scalars("train/loss")] == pytest.approx(losses)


def test_an_earlier_run_is_not_overwritten(tmp_path):
    make_trainer(tmp_path).run()
    with pytest.raises(TrainingError, match="Resume it"):
        make_trainer(tmp_path).run()


def test_a_run_that_was_stopped_before_its_first_step_resumes(tmp_path):
    stop = Stop()
    stop.requested = True
    assert not make_trainer(tmp_path).run(stop)
    losses, _ = trained(tmp_path / "whole")
    got = []
    trainer = make_trainer(tmp_path, on_step=lambda _, loss: got.append(loss))
    assert trainer.resume()
    assert trainer.run()
    assert got == losses


def test_data_of_another_size_and_data_that_end_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="got a batch of 3; expected micro_batch, 2"):
        make_trainer(tmp_path / "a", source=MemorySource(batch=3)).run()
    source = MemorySource()
    batches = [next(iter(source))]

    class Short(MemorySource):
        def __iter__(self):
            return iter(batches)

    with pytest.raises(TrainingError, match="the data ended"):
        make_trainer(tmp_path / "b", source=Short()).run()


def test_world_size_that_does_not_divide_the_batch(tmp_path):
    settings = settings_for(tmp_path, batch=16, micro_batch=2)
    processes = Processes(device=torch.device("cpu"), world_size=3)
    with pytest.raises(TrainingError, match=r"got 16, which 3 processes.*multiple of 6. Use 12 or 18"):
        Trainer(SanaTransformer2DModel(MODEL), MemorySource(), settings, OBJECTIVE, processes=processes)


def start(folder, steps, wait=0):
    command = [sys.executable, str(Path(__file__)), str(folder), str(steps), str(wait)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_zero(tmp_path):
    whole, resumed = start(tmp_path / "whole", 8), start(tmp_path / "parts", 8, wait=3)
    head = [resumed.stdout.readline() for _ in range(3)]
    resumed.send_signal(signal.SIGTERM)
    out, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    head = [*head, *out.splitlines(keepends=True)]
    assert len(head) == 3
    assert checkpoint.latest(tmp_path / "parts").name == "step_00000003"
    rest = start(tmp_path / "parts", 8)
    tail, err = rest.communicate(timeout=240)
    assert rest.returncode == 0, err
    out, err = whole.communicate(timeout=240)
    assert whole.returncode == 0, err
    assert "".join(head) + tail == out
    assert len(out.splitlines()) == 8
    names = ("model.safetensors", "ema.safetensors")
    one, other = (checkpoint.latest(tmp_path / name) for name in ("whole", "parts"))
    assert [(one / name).read_bytes() for name in names] == [(other / name).read_bytes() for name in names]


def main() -> int:
    """Print each step's loss in full."""
    torch.set_num_threads(1)
    stop = Stop()
    stop.install()

    def on_step(step, loss):
        print(step, loss.hex(), flush=True)
        while step == int(sys.argv[3]) and not stop.requested:  # else a test that has to wait for its turn comes too late
            time.sleep(0.01)

    trainer = make_trainer(Path(sys.argv[1]), steps=int(sys.argv[2]), on_step=on_step)
    trainer.resume()
    trainer.run(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
