"""What the activations of each group of linear layers are: observed in the runs of calibration_data, one entry of the store a run.

    statistics = observe(reference, runs, rows=256, store=store, progress=progress)
    statistics.channels("transformer_blocks.0.attn1.to_qkv")     # (depth,) largest absolute value of each channel

Ranges are of all tokens of all steps and both texts. Rows, which methods other than the absolute maximum look at, are a part of the
tokens, evenly spaced over all of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.errors import CheckpointError
from engines.store import Store, digest_of
from export.calibration_data import SOURCES, Run, start_noise
from export.fingerprint import code
from export.progress import Pace, Progress
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import groups_of

__all__ = ["OBSERVERS", "Observer", "Statistics", "observe", "watching"]

OBSERVERS = (*SOURCES, "export/calibration.py")
_FILE = "statistics.safetensors"
_NAMES = ("steps", "channels", "rows")  # <group>.<name>


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the inputs of every group, over some runs. Read group by group: the rows of all of a large model are gigabytes."""

    groups: tuple[str, ...]
    files: tuple[Path, ...]  # one a run
    keep: str = "keep"  # the key of a recipe that leaves groups out

    def steps(self, group: str) -> Tensor:
        """(runs, steps, texts) fp32: the largest absolute value. Texts: without and with the prompt, or with it alone."""
        return torch.stack(list(self._read(f"{group}.steps")))

    def channels(self, group: str, *, needed: bool = True) -> Tensor:
        """(depth,) fp32: the largest absolute value of each channel. Raises CheckpointError where all are zero and needed."""
        found = torch.stack(list(self._read(f"{group}.channels"))).amax(0)
        if needed and not float(found.amax()) > 0:
            raise CheckpointError(
                f"{group}: activations have a range of 0 in all {len(self.files)} runs; expected a number above 0, as a scale "
                f"needs. Keep this group precise ({self.keep} in the recipe), or mend the checkpoint."
            )
        return found

    def rows(self, group: str) -> Tensor:
        """(n, depth) fp32: tokens."""
        return torch.cat(list(self._read(f"{group}.rows")))

    def _read(self, name: str) -> Iterator[Tensor]:
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                yield file.get_tensor(name)


def observe(reference: SanaReference, runs: Sequence[Run], *, rows: int, store: Store, progress: Progress) -> Statistics:
    """Run the network on the latents of every run, or read what was seen before.

    rows: tokens of a run that are kept of each group. Raises CheckpointError naming the layer whose activations are not finite.
    """
    transformer = reference.denoiser.transformer
    groups = groups_of(name for name, _ in transformer.named_parameters())
    files, seen = [], 0
    with progress.stage("calibration: activations") as stage:
        pace = Pace(progress, "activations of a run")
        for number, run in enumerate(runs, 1):

            def make(folder: Path, run: Run = run, left: int = len(runs) - number) -> None:
                nonlocal seen
                seen += 1
                with pace.piece(left):
                    save_file(_observe_run(reference, run, groups, rows), folder / _FILE)

            key = digest_of({"stage": "calibration statistics", "run": run.key, "rows": rows, "code": code(OBSERVERS)})
            files.append(store.get_or_make(key, make) / _FILE)
        stage.cached = not seen
        stage.note(f"{len(groups)} groups of layers, {len(runs)} runs, {len(runs) - seen} of them from the cache")
    return Statistics(groups=tuple(groups), files=tuple(files))


def _observe_run(reference: SanaReference, run: Run, groups: Mapping[str, Sequence[str]], rows: int) -> dict[str, Tensor]:
    spec = run.spec
    schedule = reference.schedule(None, spec.steps)
    text = reference.encode_text([spec.prompt], "", spec.guidance)
    transformer = reference.denoiser.transformer
    num_tokens = spec.steps * len(text.weights) * run.latents[0, 0].numel() // transformer.config.patch_size**2
    observers = {group: Observer(group, num_tokens, rows) for group in groups}
    with watching(transformer, groups, observers):
        for step, table_row in enumerate(schedule.table):
            latents = run.latents[step : step + 1].to(reference.device)
            for observer in observers.values():
                observer.where = f"step {step + 1} of {spec.steps}, prompt {spec.prompt[:60]!r}"
            fresh = start_noise(reference, spec, step + 1).to(reference.device) if schedule.needs_noise(step) else None
            reference.step(latents, torch.zeros_like(latents), table_row, text, guidance=spec.guidance, noise=fresh)
    return {name: tensor for observer in observers.values() for name, tensor in observer.found().items()}


class Observer:
    """Of one group in one run: sees (texts, tokens, depth) at every step."""

    def __init__(self, group: str, num_tokens: int, rows: int, *, where: str = "") -> None:
        """num_tokens: that the group sees in the run; rows: how many to keep."""
        self.group, self.where = group, where
        self.steps: list[Tensor] = []  # (texts,) each
        self.rows: list[Tensor] = []
        self.channels = torch.zeros(())
        self._done = 0  # tokens seen
        kept = min(rows, num_tokens)
        self._places = [number * num_tokens // kept for number in range(kept)]  # evenly spaced over all of the run

    def see(self, x: Tensor) -> None:
        x = x.detach().float()
        size = x.abs()
        channels, largest = size.amax((0, 1)), size.amax((1, 2))
        if not bool(largest.isfinite().all()):
            at = int(torch.nonzero(~channels.isfinite())[0])
            raise CheckpointError(
                f"{self.group}: activations reach {float(channels[at])} in channel {at} at {self.where}; expected finite numbers. "
                "Mend the checkpoint: this is in fp32, with nothing quantized."
            )
        self.steps.append(largest)
        self.channels = torch.maximum(self.channels.to(x.device), channels)
        tokens = x.flatten(0, 1)
        begin, self._done = self._done, self._done + tokens.shape[0]
        self.rows.append(tokens[[place - begin for place in self._places if begin <= place < self._done]])

    def found(self) -> dict[str, Tensor]:
        """What is kept of the run, as Statistics reads it."""
        parts = (torch.stack(self.steps), self.channels, torch.cat(self.rows))
        return {f"{self.group}.{name}": part.cpu().contiguous() for name, part in zip(_NAMES, parts, strict=True)}


@contextmanager
def watching(
    transformer: nn.Module, groups: Mapping[str, Sequence[str]], observers: Mapping[str, Observer], mask: Tensor | None = None
) -> Iterator[None]:
    """Each group's observer sees what goes into its first layer: layers of a group share their input.

    mask: (texts, tokens) bool; tokens that are to be seen, one text after the other. None: all of them.
    """

    def watch(observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            x = x.permute(0, 2, 3, 1).flatten(1, 2) if x.ndim == 4 else x  # a picture (B, C, h, w) as tokens
            observer.see(x if mask is None else x[mask][None])

        return see

    handles = [
        transformer.get_submodule(names[0].removesuffix(".weight")).register_forward_pre_hook(watch(observers[group]))
        for group, names in groups.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
