"""The steps of a training run: forward and backward passes of micro-batches, one update, a checkpoint now and then.

A step is a function of the weights, the optimizer's state, the step's number and the source's position, and a checkpoint holds
these four: a resumed run has the uninterrupted run's losses to the last bit, on a CPU. On a GPU some kernels add in an order of
their own, which the setting `deterministic` forbids.

On several processes each takes its micro-batches in turn, and everything random is drawn by the micro-batch's number among all of
the step's: a run on another number of processes sees the same pictures with the same noise. What a process alone may notice, a
loss that is not finite, a signal, a full disk, all of them agree on before they act.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.objective.place import Place
from train.parallel.processes import Processes
from train.parallel.wrap import Strategy, clip_grad_norm, no_sync, unwrapped, whole, wrap
from train.trainer import checkpoint
from train.trainer.blocks import checkpoint_activations, compile_blocks, fast_feed_forward
from train.trainer.ema import Ema
from train.trainer.errors import NonFiniteError, TrainingError
from train.trainer.optimizer import learning_rate, make_optimizer
from train.trainer.scalars import Scalars
from train.trainer.settings import TrainerSettings, accumulation
from train.trainer.stop import Stop

__all__ = ["Objective", "Source", "Trainer"]

Batch = Mapping[str, Tensor]
Validate = Callable[[int, Mapping[str, Tensor]], Mapping[str, float]]


class Source(Protocol):
    """Micro-batches without end, of the rank that it was made for: tensors whose first axis is the micro-batch.

    state_dict, of JSON's types, is the position after the batch that was yielded last; an iterator begun after load_state_dict
    goes on from there. An iterator may read ahead, but the position must not.
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Objective(Protocol):
    """What is learned: `loss` of a micro-batch, a scalar in fp32, and other scalars by name, which are logged beside it.

    `model` is called as a whole, for it may be wrapped; under autocast if the run's precision asks for it, with the batch on the
    model's device. Everything random in it must be
    a function of `place`, so that a resumed run draws the same.
    """

    def __call__(self, model: nn.Module, batch: Batch, place: Place) -> Mapping[str, Tensor]: ...


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch's own switch, put back afterwards. cuBLAS asks for the variable too, read when its first product is computed."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Trainer:
    """One run. model: on its device, in fp32, in training mode; not wrapped, or by train.parallel.wrap.replicate.

    config: the whole run's, of JSON's types, kept in its checkpoints: what may not change when it goes on. strategy: None is DDP on
    several processes. on_step(step, loss) is called after each step, with a loss that may not be finite. validate(step, weights) is
    called by the first process after every validation_steps steps and at the end, with all weights by the model's own names, the
    average of those that have one; its scalars are logged.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        settings: TrainerSettings,
        objective: Objective,
        *,
        config: Mapping[str, Any] | None = None,
        processes: Processes | None = None,
        strategy: Strategy | None = None,
        log: Callable[[str], None] = print,
        on_step: Callable[[int, float], None] | None = None,
        validate: Validate | None = None,
        validation_steps: int | None = None,
    ) -> None:
        self.device = next(p for p in model.parameters() if p.requires_grad).device
        self.processes = processes or Processes(device=self.device)
        self.num_micro_batches = accumulation(settings, self.processes.world_size)
        self.source, self.settings, self.objective = source, settings, objective
        own = {"trainer": settings.model_dump(mode="json", exclude={"folder", "tensorboard", "wandb_project"})}
        self.config: dict[str, Any] = own if config is None else dict(config)
        self.log = log if self.processes.rank == 0 else lambda line: None
        self.on_step, self.validate, self.validation_steps = on_step, validate, validation_steps
        self.strategy: Strategy = strategy or ("ddp" if self.processes.world_size > 1 else "single")
        faster = self.device.type == "cuda" and settings.precision == "bf16"
        if settings.fast_feed_forward or (settings.fast_feed_forward is None and faster):
            fast_feed_forward(unwrapped(model), required=settings.fast_feed_forward is True)
        if settings.activation_checkpointing:
            checkpoint_activations(unwrapped(model))
        if settings.compile:
            compile_blocks(unwrapped(model))
        self.model = wrap(model, self.strategy, self.processes, bf16=settings.precision == "bf16")
        self.bare = unwrapped(self.model)
        self.parameters = {name: p for name, p in self.bare.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(settings.optimizer, self.bare)
        self.ema = None if settings.ema_decay is None else Ema(self.parameters.items(), settings.ema_decay)
        self.step = self.updates = self.non_finite = 0
        self.resumed = False
        self._finish_save: Callable[[], Path] | None = None

    def resume(self, *, allow_changes: bool = False) -> bool:
        """Go on from the newest checkpoint, if there is one. Raises TrainingCheckpointError if it is not this run's."""
        path = self.processes.first(lambda: checkpoint.latest(self.settings.folder))
        if path is None:
            return False
        numbered = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        there = checkpoint.load(
            path,
            model=self.bare.state_dict(),
            config=self.config,
            optimizer_kind=self.settings.optimizer.kind,
            with_ema=self.ema is not None,
            allow_changes=allow_changes,
            numbered=numbered,
        )
        self.bare.load_state_dict(there.model)
        self.optimizer.load_state_dict({"param_groups": self.optimizer.state_dict()["param_groups"]} | dict(there.optimizer))
        if self.ema is not None and there.ema is not None:
            self.ema.load(there.ema)
        self.source.load_state_dict(there.data)
        self.step, self.updates, self.non_finite = there.step, there.updates, there.non_finite
        self.resumed = True
        self.log(f"resumed at step {self.step} from {path}")
        for line in checkpoint.differences(there.config, json.loads(json.dumps(self.config))):
            self.log(f"changed: {line}")
        return True

    def save(self) -> None:
        """Raises TrainingCheckpointError if there is no room; the last good one then stays. Shares are written while training goes
        on, until the next save."""
        self._wait_for_save()
        folder, keep = self.settings.folder, self.settings.keep
        snapshot = checkpoint.Snapshot(
            step=self.step,
            updates=self.updates,
            non_finite=self.non_finite,
            model=self.bare.state_dict(),
            ema=None if self.ema is None else self.ema.average,
            optimizer=self.optimizer.state_dict(),
            optimizer_kind=self.settings.optimizer.kind,
            data=self.source.state_dict(),
            config=self.config,
        )
        if self.strategy == "fsdp2":
            self._finish_save = checkpoint.save_async(folder, snapshot, keep=keep, processes=self.processes)
        else:
            self.log(f"saved {self.processes.first(lambda: checkpoint.save(folder, snapshot, keep=keep))}")

    def _wait_for_save(self) -> None:
        if self._finish_save is not None:
            finish, self._finish_save = self._finish_save, None
            self.log(f"saved {finish()}")

    def run(self, stop: Stop | None = None) -> bool:
        """Train until all steps are done or a stop is asked for; both leave a checkpoint. Returns whether all steps are done.

        Raises NonFiniteError past the limit, without a checkpoint of its own, TrainingError if the folder holds a run that was not
        resumed, if the data ends or if its batches have another size.
        """
        there = self.processes.first(lambda: checkpoint.latest(self.settings.folder))
        if there is not None and not self.resumed and self.step == 0:
            raise TrainingError(f"{self.settings.folder}: holds {there.name} of an earlier run. Resume it, or use another folder.")
        scalars = Scalars(self.settings, self.step, self.config, self.processes)
        batches = iter(self.source)
        last, since = time.monotonic(), self.step
        try:
            while self.step < self.settings.steps and not self.processes.any(stop is not None and stop.requested):
                with _deterministic(self.settings.deterministic):
                    found, norm, lr = self._step(batches)
                self.step += 1
                if self.on_step is not None:
                    self.on_step(self.step, found["loss"])
                if self.step % self.settings.log_steps == 0 or self.step == self.settings.steps:
                    now = time.monotonic()
                    pace = (self.step - since) * self.settings.batch / max(now - last, 1e-9)
                    self._report(scalars, found, norm=norm, lr=lr, pace=pace)
                    last, since = now, self.step
                if self.step % self.settings.checkpoint_steps == 0:
                    self.save()
                if self._is_validated():
                    self._validate(scalars)
            self.save()
            self._wait_for_save()
        finally:
            scalars.close()
        return self.step >= self.settings.steps

    def _step(self, batches: Iterator[Batch]) -> tuple[dict[str, float], float, float]:
        """Returns the objective's scalars, the gradient's norm and the learning rate. Nothing is updated if loss or norm is not
        finite."""
        settings = self.settings
        totals: dict[str, Tensor] = {}
        for micro_batch in range(self.num_micro_batches):
            with no_sync(self.model, last=micro_batch == self.num_micro_batches - 1):
                found = self._micro_batch(self._next(batches), micro_batch)
                (found["loss"] / self.num_micro_batches).backward()  # type: ignore[no-untyped-call]
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float() / self.num_micro_batches
        norm = float(clip_grad_norm(self.bare, float("inf") if settings.clip is None else settings.clip))
        means = self.processes.mean(torch.stack(list(totals.values())))
        scalars = dict(zip(totals, means.tolist(), strict=True))  # one wait for the device
        value, lr = scalars["loss"], learning_rate(settings.schedule, settings.optimizer.lr, self.step, settings.steps)
        if math.isfinite(value) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.updates)
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._count_non_finite(value, norm)
        return scalars, norm, lr

    def _next(self, batches: Iterator[Batch]) -> Batch:
        try:
            batch = next(batches)
        except StopIteration:
            raise TrainingError(f"step {self.step}: the data ended; expected batches without end.") from None
        if (size := len(next(iter(batch.values())))) != self.settings.micro_batch:
            raise TrainingError(
                f"step {self.step}: got a batch of {size}; expected micro_batch, {self.settings.micro_batch}. "
                "Let the source drop or fill the last batch of an epoch."
            )
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _micro_batch(self, batch: Batch, micro_batch: int) -> Mapping[str, Tensor]:
        number = micro_batch * self.processes.world_size + self.processes.rank  # as the source deals them out
        place = Place(seed=self.settings.seed, step=self.step, micro_batch=number)
        torch.manual_seed(place.hashed("model"))  # for a dropout within the model
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.settings.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            return self.objective(self.model, batch, place)

    def _count_non_finite(self, loss: float, norm: float) -> None:
        self.non_finite += 1
        limit = self.settings.max_non_finite
        self.log(f"step {self.step}: loss {loss}, gradient's norm {norm}: skipped, {self.non_finite} of at most {limit}")
        if self.non_finite > limit:
            self._wait_for_save()
            there = checkpoint.latest(self.settings.folder)
            raise NonFiniteError(
                f"step {self.step}: {self.non_finite} losses or gradients were not finite; max_non_finite is {limit}. "
                f"{f'The last good checkpoint is {there}' if there else 'There is no checkpoint yet'}. Lower optimizer.lr, or look "
                "at the data."
            )

    def _is_validated(self) -> bool:
        """After this step."""
        if self.validate is None:
            return False
        at_the_end = self.step == self.settings.steps
        return at_the_end or (self.validation_steps is not None and self.step % self.validation_steps == 0)

    def _validate(self, scalars: Scalars) -> None:
        assert self.validate is not None
        validate = self.validate
        average: Mapping[str, Tensor] = {} if self.ema is None else self.ema.average
        weights = whole({**self.bare.state_dict(), **average}, self.processes)
        found = self.processes.first(lambda: dict(validate(self.step, weights)))
        if found:
            self.log(f"step {self.step}: validation " + " ".join(f"{name} {value:.4f}" for name, value in found.items()))
        scalars.add(self.step, found, "validation")

    def _report(self, scalars: Scalars, found: Mapping[str, float], *, norm: float, lr: float, pace: float) -> None:
        done = 100 * self.step / self.settings.steps
        losses = " ".join(f"{name} {value:.4f}" for name, value in found.items())
        self.log(
            f"step {self.step}/{self.settings.steps} {done:.0f}% {losses} norm {norm:.3f} lr {lr:.2e} "
            f"skipped {self.non_finite} | {pace:.1f} pictures/s"
        )
        scalars.add(self.step, {**found, "gradient_norm": norm, "lr": lr, "pictures_per_second": pace})
