"""Checkpoints of a run: one folder a checkpoint, which is whole or not there.

    step_00001000/
        model.safetensors   weights under the model's own names
        ema.safetensors     their average, if there is one
        optimizer.pt        the optimizer's state; loaded with weights_only=True, so that it cannot run code
        state.json          schema, step, counts, the data's position, the run's config, the model's digest

A sharded model's has the same state.json, and in place of the other files a distributed checkpoint (train.parallel.checkpoint) of
model.NAME, ema.NAME and optimizer.INDEX.KEY. A run goes on from either, however many processes it has then and whatever wraps the
model: optimizers number their parameters alike.

A checkpoint is written to `.step_00001000.writing`, brought to the disk and renamed; older ones are removed after that. So a
kill or a full disk leaves the last good one. Whether a checkpoint is of this model is decided by names and shapes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.parallel import checkpoint as distributed
from train.parallel.processes import Processes
from train.parallel.wrap import placed
from train.trainer.errors import TrainingCheckpointError

__all__ = ["Snapshot", "differences", "latest", "load", "save", "save_async"]

SCHEMA = 1
NAME = re.compile(r"step_(\d{8})")
ABSENT = "(none)"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a resumed run needs. step: how many are done. data: the source's state_dict, of JSON's types. config: likewise."""

    step: int
    updates: int
    non_finite: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any]
    optimizer_kind: str
    data: Mapping[str, Any]
    config: Mapping[str, Any]


def _folders(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name) and path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next(reversed(_folders(folder)), None)


def _digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    text = json.dumps({name: list(shape) for name, shape in sorted(shapes.items())})
    return hashlib.sha256(text.encode()).hexdigest()


def _shapes(model: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.items()}


def _num_bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0


def _state(snapshot: Snapshot) -> str:
    state = {
        "schema": SCHEMA,
        "step": snapshot.step,
        "updates": snapshot.updates,
        "non_finite": snapshot.non_finite,
        "model": _digest(_shapes(snapshot.model)),
        "optimizer": snapshot.optimizer_kind,
        "data": snapshot.data,
        "config": snapshot.config,
    }
    return json.dumps(state, indent=1) + "\n"


def _write(folder: Path, snapshot: Snapshot) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.model.items()}, folder / "model.safetensors")
    if snapshot.ema is not None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in snapshot.ema.items()}, folder / "ema.safetensors")
    torch.save(snapshot.optimizer, folder / "optimizer.pt")
    (folder / "state.json").write_text(_state(snapshot), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        distributed.sync(path)


def _need(folder: Path, num_bytes: int) -> None:
    """Make the folder. Raises OSError if there is no room in it."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, and {free:,} were free")


def _not_written(final: Path, error: Exception, needed: int) -> TrainingCheckpointError:
    last = latest(final.parent)
    return TrainingCheckpointError(
        f"{final}: the checkpoint could not be written: {str(error).splitlines()[0]}. It takes about {needed:,} bytes beside "
        f"the older ones. {f'The last good one stays: {last}' if last else 'There is no older one'}. Make room and resume."
    )


def _remove_older(folder: Path, keep: int) -> None:
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def save(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint of whole tensors, from one process, and remove all but the newest `keep`.

    If this step's is already there, nothing is written: a step has one state. Raises TrainingCheckpointError if it cannot be
    written; what was there before then stays.
    """
    final = folder / f"step_{snapshot.step:08}"
    if final.exists():
        return final
    writing = folder / f".{final.name}.writing"
    needed = sum(map(_num_bytes, (snapshot.model, snapshot.ema, snapshot.optimizer)))
    try:
        shutil.rmtree(writing, ignore_errors=True)
        _need(folder, needed)
        writing.mkdir()
        _write(writing, snapshot)
        os.replace(writing, final)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(writing, ignore_errors=True)
        raise _not_written(final, error, needed) from error
    _remove_older(folder, keep)
    return final


def _flat(snapshot: Snapshot) -> dict[str, Tensor]:
    """The tensors by the names that a distributed checkpoint has for them."""
    flat = {f"model.{name}": tensor for name, tensor in snapshot.model.items()}
    flat |= {f"ema.{name}": tensor for name, tensor in (snapshot.ema or {}).items()}
    for index, values in snapshot.optimizer["state"].items():
        flat |= {f"optimizer.{index}.{key}": tensor for key, tensor in values.items()}
    return flat


def save_async(folder: Path, snapshot: Snapshot, *, keep: int, processes: Processes) -> Callable[[], Path]:
    """As save(), of shares and from all processes: they are copied before this returns, and written while training goes on. All
    processes call the function that is returned, which waits for that. Both raise on all of them."""
    final = folder / f"step_{snapshot.step:08}"
    if processes.first(final.exists):
        return lambda: final
    needed = sum(map(_num_bytes, (snapshot.model, snapshot.ema, snapshot.optimizer)))  # of all shares: a DTensor counts so

    def make_room() -> None:
        try:
            _need(folder, needed)
        except OSError as error:
            raise _not_written(final, error, needed) from error

    processes.first(make_room)
    texts = {"state.json": _state(snapshot)}
    try:
        wait = distributed.save_async(final, _flat(snapshot), texts, processes.writing)
    except OSError as error:
        raise _not_written(final, error, needed) from error

    def finish() -> Path:
        try:
            wait()
        except OSError as error:
            raise _not_written(final, error, needed) from error
        if processes.rank == 0:
            _remove_older(folder, keep)
        return final

    return finish


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name: before -> now` for every value that differs, by dotted name."""
    lines: list[str] = []
    for key in sorted({*before, *now}):
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the model in a checkpoint."""
    if distributed.is_sharded(path):
        there = distributed.shapes(path)
        return {name.removeprefix("model."): shape for name, shape in there.items() if name.startswith("model.")}
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _refuse_another_model(path: Path, model: Mapping[str, Tensor], digest: str) -> None:
    expected = _shapes(model)
    if digest == _digest(expected):
        return
    there = _shapes_in(path)
    for name in sorted({*there, *expected}):
        if there.get(name) != expected.get(name):
            raise TrainingCheckpointError(
                f"{path}: another model's: {name} has shape {there.get(name, ABSENT)}; this model's is "
                f"{expected.get(name, ABSENT)}. Use the model that the run began with, or another folder."
            )
    raise TrainingCheckpointError(f"{path}: damaged: state.json does not belong to the weights. Delete this checkpoint.")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
    """Model, average and optimizer of a checkpoint of whole tensors."""
    average = path / "ema.safetensors"
    return (
        load_file(path / "model.safetensors"),
        load_file(average) if average.exists() else None,
        torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
    )


def _read_shares(
    path: Path, model: Mapping[str, Tensor], numbered: Mapping[int, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
    """The same of a distributed checkpoint: of each tensor what this process holds of the parameter that it belongs to."""
    flat: dict[str, Tensor] = {}
    for name, shape in distributed.shapes(path).items():
        kind, rest = name.split(".", 1)
        like = model[rest] if kind != "optimizer" else numbered[int(rest.split(".")[0])]
        if kind == "model":
            flat[name] = like  # in place: there may be no room for two
        else:
            flat[name] = torch.zeros_like(like, dtype=torch.float32) if shape == tuple(like.shape) else torch.zeros(shape)
    distributed.load(path, flat)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        kind, rest = name.split(".", 1)
        if kind == "optimizer":
            index, key = rest.split(".")
            state.setdefault(int(index), {})[key] = tensor
        else:
            parts[kind][rest] = tensor
    return parts["model"], parts["ema"] or None, {"state": state}


def load(
    path: Path,
    *,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    optimizer_kind: str,
    with_ema: bool,
    allow_changes: bool = False,
    numbered: Mapping[int, Tensor] | None = None,
) -> Snapshot:
    """Read a checkpoint: whole tensors on the CPU, or shares where the model's are. model: the tensors that it will be loaded into.
    numbered: the parameters, as the optimizer counts them; without its groups.

    Raises TrainingCheckpointError if it is damaged, of another model, of another config (unless allow_changes), or of another
    optimizer. Where an average is asked for that the run did not have, it begins with the weights.
    """
    numbered = numbered or {}
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["schema"] != SCHEMA:
            raise TrainingCheckpointError(f"{path}: got schema {state['schema']!r}; expected {SCHEMA}. Resume with its version.")
        _refuse_another_model(path, model, state["model"])
        changed = differences(state["config"], json.loads(json.dumps(config)))
        if changed and not allow_changes:
            raise TrainingCheckpointError(
                f"{path}: the run began with another config:\n  " + "\n  ".join(changed) + "\nUse that one, or allow changes."
            )
        if state["optimizer"] != optimizer_kind:
            raise TrainingCheckpointError(
                f"{path}: has the state of {state['optimizer']}; expected {optimizer_kind}. Begin another run from its weights."
            )
        sharded = distributed.is_sharded(path)
        weights, average, optimizer = _read_shares(path, model, numbered) if sharded else _read(path)
        ema = {name: weights[name] for name in weights} | (average or {}) if with_ema else None
        of_optimizer = {
            index: {key: placed(value, numbered[index]) if index in numbered else value for key, value in values.items()}
            for index, values in optimizer["state"].items()
        }
        return Snapshot(
            step=state["step"],
            updates=state["updates"],
            non_finite=state["non_finite"],
            model={name: placed(tensor, model[name]) for name, tensor in weights.items()},
            ema=None if ema is None else {name: placed(tensor, model[name]) for name, tensor in ema.items()},
            optimizer=optimizer | {"state": of_optimizer},
            optimizer_kind=optimizer_kind,
            data=state["data"],
            config=state["config"],
        )
    except TrainingCheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes JSON, safetensors or torch raise
        raise TrainingCheckpointError(f"{path}: damaged ({error!r}). Delete it, and resume from the one before it.") from error
