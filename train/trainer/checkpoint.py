"""Checkpoints of a run: one folder a checkpoint, which is whole or not there.

    step_00001000/
        model.safetensors   weights under the model's own names
        ema.safetensors     their average, if there is one
        optimizer.pt        the optimizer's state; loaded with weights_only=True, so that it cannot run code
        state.json          schema, step, counts, the data's position, the run's config, the model's digest

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.trainer.errors import TrainingCheckpointError

__all__ = ["Snapshot", "differences", "latest", "load", "save"]

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


def _write(folder: Path, snapshot: Snapshot) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.model.items()}, folder / "model.safetensors")
    if snapshot.ema is not None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in snapshot.ema.items()}, folder / "ema.safetensors")
    torch.save(snapshot.optimizer, folder / "optimizer.pt")
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
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    If this step's is already there, nothing is written: a step has one state. Raises TrainingCheckpointError if it cannot be
    written; what was there before then stays.
    """
    final = folder / f"step_{snapshot.step:08}"
    if final.exists():
        return final
    writing = folder / f".{final.name}.writing"
    needed = sum(map(_num_bytes, (snapshot.model, snapshot.ema, snapshot.optimizer)))
    free: int | None = None
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write(writing, snapshot)
        os.replace(writing, final)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(writing, ignore_errors=True)
        last = latest(folder)
        room = "" if free is None else f", and {free:,} were free"
        raise TrainingCheckpointError(
            f"{final}: the checkpoint could not be written: {str(error).splitlines()[0]}. It takes about {needed:,} bytes beside "
            f"the older ones{room}. {f'The last good one stays: {last}' if last else 'There is no older one'}. "
            "Make room and resume."
        ) from error
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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


def _refuse_another_model(path: Path, model: Mapping[str, Tensor], digest: str) -> None:
    expected = _shapes(model)
    if digest == _digest(expected):
        return
    with safe_open(path / "model.safetensors", framework="pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    for name in sorted({*there, *expected}):
        if there.get(name) != expected.get(name):
            raise TrainingCheckpointError(
                f"{path}: another model's: {name} has shape {there.get(name, ABSENT)}; this model's is "
                f"{expected.get(name, ABSENT)}. Use the model that the run began with, or another folder."
            )
    raise TrainingCheckpointError(f"{path}: damaged: state.json does not belong to model.safetensors. Delete this checkpoint.")


def load(
    path: Path,
    *,
    model: Mapping[str, Tensor],
    config: Mapping[str, Any],
    optimizer_kind: str,
    with_ema: bool,
    allow_changes: bool = False,
) -> Snapshot:
    """Read a checkpoint, on the CPU. model: the tensors that it will be loaded into.

    Raises TrainingCheckpointError if it is damaged, of another model, of another config (unless allow_changes), or of another
    optimizer. Where an average is asked for that the run did not have, it begins with the weights.
    """
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
        weights = load_file(path / "model.safetensors")
        average = path / "ema.safetensors"
        return Snapshot(
            step=state["step"],
            updates=state["updates"],
            non_finite=state["non_finite"],
            model=weights,
            ema=(load_file(average) if average.exists() else weights) if with_ema else None,
            optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            optimizer_kind=optimizer_kind,
            data=state["data"],
            config=state["config"],
        )
    except TrainingCheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes JSON, safetensors or torch raise
        raise TrainingCheckpointError(f"{path}: damaged ({error!r}). Delete it, and resume from the one before it.") from error
