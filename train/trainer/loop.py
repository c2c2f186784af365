"""The steps of a training run: forward and backward passes of micro-batches, one update, a checkpoint now and then.

A step is a function of the weights, the optimizer's state, the step's number and the source's position, and a checkpoint holds
these four: a resumed run has the uninterrupted run's losses to the last bit, on a CPU. On a GPU some kernels add in an order of
their own, which the setting `deterministic` forbids.

The trainer calls `model` as it is given; it may be wrapped. It asks for parameters by name, never for the class.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sana_ref.autoencoder import EfficientViTBlock, ResBlock
from sana_ref.text_encoder import Gemma2Layer
from sana_ref.transformer import SanaTransformerBlock
from train.objective.place import Place
from train.trainer import checkpoint
from train.trainer.ema import Ema
from train.trainer.errors import NonFiniteError, TrainingError
from train.trainer.optimizer import learning_rate, make_optimizer
from train.trainer.settings import TrainerSettings, accumulation
from train.trainer.stop import Stop

__all__ = ["Objective", "Source", "Trainer"]

Batch = Mapping[str, Tensor]
BLOCKS = (SanaTransformerBlock, Gemma2Layer, ResBlock, EfficientViTBlock)  # what repeats within a model


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

    Called under autocast if the run's precision asks for it, with the batch on the model's device. Everything random in it must be
    a function of `place`, so that a resumed run draws the same.
    """

    def __call__(self, model: nn.Module, batch: Batch, place: Place) -> Mapping[str, Tensor]: ...


class Scalars:
    """TensorBoard, if it is asked for. Raises TrainingError if it is not installed."""

    def __init__(self, settings: TrainerSettings, first_step: int) -> None:
        self.writer: Any = None
        if settings.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise TrainingError(
                    f"tensorboard: got true, and it cannot be imported ({error}). Run pip install tensorboard, or set it to false."
                ) from None
            self.writer = SummaryWriter(str(settings.folder / "tensorboard"), purge_step=first_step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _checkpoint_activations(model: nn.Module) -> None:
    """Let the transformer's blocks be computed again in the backward pass. The names of the parameters stay."""
    blocks = getattr(model, "transformer_blocks", None)
    if blocks is None:
        raise TrainingError(f"activation_checkpointing: {type(model).__name__} has no transformer_blocks. Set it to false.")
    for block in blocks:
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)


def _compile_blocks(model: nn.Module) -> None:
    """Compile the blocks that repeat, in place: each kind is compiled once, in seconds where a whole model takes minutes, and the
    names of the parameters stay."""
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    # The compiler asks a block's input for its gradient, and PyTorch warns whoever does: nobody is helped by that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for module in blocks or [model]:
        module.compile(dynamic=False)


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
    """One run. model: on its device, in fp32, in training mode. config: the whole run's, of JSON's types, kept in its checkpoints.

    on_step(step, loss) is called after each step, with a loss that may not be finite. rank and world_size: of this process; the
    gradients' average over processes is the business of what wraps the model.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        settings: TrainerSettings,
        objective: Objective,
        *,
        config: Mapping[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        log: Callable[[str], None] = print,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        self.num_micro_batches = accumulation(settings, world_size)
        self.model, self.source, self.settings, self.objective = model, source, settings, objective
        own: dict[str, Any] = {
            "trainer": settings.model_dump(mode="json", exclude={"folder"}),  # a run may be moved
            "world_size": world_size,
        }
        self.config = own if config is None else dict(config)
        self.rank, self.log, self.on_step = rank, log, on_step
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(settings.optimizer, model)
        self.ema = None if settings.ema_decay is None else Ema(self.parameters.items(), settings.ema_decay)
        if settings.activation_checkpointing:
            _checkpoint_activations(model)
        if settings.compile:
            _compile_blocks(model)
        self.step = self.updates = self.non_finite = 0
        self.resumed = False

    def resume(self, *, allow_changes: bool = False) -> bool:
        """Go on from the newest checkpoint, if there is one. Raises TrainingCheckpointError if it is not this run's."""
        path = checkpoint.latest(self.settings.folder)
        if path is None:
            return False
        there = checkpoint.load(
            path,
            model=self.model.state_dict(),
            config=self.config,
            optimizer_kind=self.settings.optimizer.kind,
            with_ema=self.ema is not None,
            allow_changes=allow_changes,
        )
        self.model.load_state_dict(there.model)
        self.optimizer.load_state_dict(dict(there.optimizer))
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
        """Raises TrainingCheckpointError if there is no room; the last good one then stays."""
        snapshot = checkpoint.Snapshot(
            step=self.step,
            updates=self.updates,
            non_finite=self.non_finite,
            model=self.model.state_dict(),
            ema=None if self.ema is None else self.ema.average,
            optimizer=self.optimizer.state_dict(),
            optimizer_kind=self.settings.optimizer.kind,
            data=self.source.state_dict(),
            config=self.config,
        )
        self.log(f"saved {checkpoint.save(self.settings.folder, snapshot, keep=self.settings.keep)}")

    def run(self, stop: Stop | None = None) -> bool:
        """Train until all steps are done or a stop is asked for; both leave a checkpoint. Returns whether all steps are done.

        Raises NonFiniteError past the limit, without a checkpoint of its own, TrainingError if the folder holds a run that was not
        resumed, if the data ends or if its batches have another size.
        """
        there = checkpoint.latest(self.settings.folder)
        if there is not None and not self.resumed and self.step == 0:
            raise TrainingError(f"{self.settings.folder}: holds {there.name} of an earlier run. Resume it, or use another folder.")
        scalars = Scalars(self.settings, self.step)
        batches = iter(self.source)
        last, since = time.monotonic(), self.step
        try:
            while self.step < self.settings.steps and not (stop is not None and stop.requested):
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
            self.save()
        finally:
            scalars.close()
        return self.step >= self.settings.steps

    def _step(self, batches: Iterator[Batch]) -> tuple[dict[str, float], float, float]:
        """Returns the objective's scalars, the gradient's norm and the learning rate. Nothing is updated if loss or norm is not
        finite."""
        settings = self.settings
        totals: dict[str, Tensor] = {}
        for micro_batch in range(self.num_micro_batches):
            found = self._micro_batch(self._next(batches), micro_batch)
            (found["loss"] / self.num_micro_batches).backward()  # type: ignore[no-untyped-call]
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value.detach().float() / self.num_micro_batches
        limit = float("inf") if settings.clip is None else settings.clip
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        scalars = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))  # one wait for the device
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
        place = Place(seed=self.settings.seed, step=self.step, micro_batch=micro_batch, rank=self.rank)
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
            there = checkpoint.latest(self.settings.folder)
            raise NonFiniteError(
                f"step {self.step}: {self.non_finite} losses or gradients were not finite; max_non_finite is {limit}. "
                f"{f'The last good checkpoint is {there}' if there else 'There is no checkpoint yet'}. Lower optimizer.lr, or look "
                "at the data."
            )

    def _report(self, scalars: Scalars, found: Mapping[str, float], *, norm: float, lr: float, pace: float) -> None:
        done = 100 * self.step / self.settings.steps
        losses = " ".join(f"{name} {value:.4f}" for name, value in found.items())
        self.log(
            f"step {self.step}/{self.settings.steps} {done:.0f}% {losses} norm {norm:.3f} lr {lr:.2e} "
            f"skipped {self.non_finite} | {pace:.1f} pictures/s"
        )
        scalars.add(self.step, {**found, "gradient_norm": norm, "lr": lr, "pictures_per_second": pace})
