"""What the stages of sana-tiny's training share."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.tiny import dit
from train.tiny.fast import norm_kernel
from train.tiny.flat import FlatParameters
from train.tiny.loop import Budget, Log, Trainer, capture
from train.tiny.models import BUCKETS, compute_dtype, make_vae
from train.tiny.sampling import EXPORT_DTYPES, Painter
from train.tiny.sprites import Sprites, load_sprites
from train.tiny.tokenizer import num_instruction_tokens
from train.trainer.stop import Stop

SECONDS_TO_WRITE = 12.0  # kept free at the end of an invocation
CAPTION_PATIENCE = 120.0  # seconds
SEEDS = {"ae": 10, "latents": 100, "measure": 900, "recogniser": 500, "recogniser_test": 950}


class Run:
    """What the stages share: arguments, device, sprites, and the results so far (work/metrics.json)."""

    def __init__(
        self,
        *,
        args: argparse.Namespace,
        sizes: Any,
        configs: dict[str, dict[str, Any]],
        device: torch.device,
        log: Log,
        stop: Stop,
        end: float,
    ) -> None:
        from tokenizers import Tokenizer

        self.args, self.sizes, self.configs = args, sizes, configs
        self.device, self.log, self.stop, self.end = device, log, stop, end
        self.dtype = compute_dtype(device)
        self.work: Path = args.work
        self.work.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        self.sprites: Sprites = load_sprites(args.sprites, device)
        self.tokenizer = Tokenizer.from_str(self.sprites.tokenizer_json)
        self.prefix = num_instruction_tokens(self.tokenizer)
        self.metrics: dict[str, Any] = {}
        if (self.work / "metrics.json").is_file():
            self.metrics = json.loads((self.work / "metrics.json").read_text())
        self.caches: dict[str, dit.LatentCache] = {}
        self.captions: subprocess.Popen[bytes] | None = None  # the process that writes them
        torch.manual_seed(0)

    @property
    def names(self) -> list[dict[str, list[str]]]:
        return self.sprites.names[: self.sprites.num_classes]

    def plan(self) -> dict[str, tuple[int, int, float]]:
        """Number of scenes, seed and aspect of each bucket of the latent cache."""
        return {
            name: (self.sizes.scenes if index == 0 else self.sizes.scenes // 8, SEEDS["latents"] + index, width / height)
            for index, (name, (width, height)) in enumerate(BUCKETS.items())
        }

    def start_captions(self) -> None:
        """Let a process beside the first stages write the captions, unless they or the latents are there already."""
        path = self.work / "captions.npz"
        if path.is_file() or (self.work / "latents.pt").is_file():
            return
        command = ["train.tiny.caption_cache", "--sprites", str(self.args.sprites), "--out", str(path)]
        command += ["--plan", json.dumps(self.plan())]
        command += ["--captions", str(self.sizes.captions), "--length", str(self.sizes.length)]
        with open(self.work / "captions.log", "wb") as log:
            self.captions = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT)

    def stop_captions(self) -> None:
        if self.captions is not None and self.captions.poll() is None:
            self.captions.terminate()
            self.captions.wait()

    def wait_for_captions(self) -> Path:
        """The file of captions. Raises RuntimeError with the process's last words if it failed or is too slow."""
        if self.captions is not None:
            began = time.monotonic()
            try:
                code: int | str = self.captions.wait(timeout=CAPTION_PATIENCE)
            except subprocess.TimeoutExpired:
                code = f"nothing after {CAPTION_PATIENCE:.0f} s of waiting"
            if code != 0:
                words = (self.work / "captions.log").read_text(errors="replace")[-1500:]
                raise RuntimeError(f"captions: got {code}; expected exit code 0. Last words:\n{words}")
            self.log(f"captions: ready, waited {time.monotonic() - began:.1f} s")
        return self.work / "captions.npz"

    def record(self, name: str, value: Any) -> None:
        self.metrics[name] = value
        temporary = self.work / "metrics.tmp"
        temporary.write_text(json.dumps(self.metrics))
        os.replace(temporary, self.work / "metrics.json")

    def capture(self, step: Callable[[], None], name: str) -> Callable[[], None]:
        """The step as a CUDA graph where there is a GPU, unless --no-graphs was given."""
        return step if self.args.no_graphs else capture(step, self.log, name)

    def trainer(self, name: str, flat: FlatParameters, *, seconds: float, **more: Any) -> Trainer:
        """With this run's log, limits and work folder, and no steps yet; `more` as Trainer takes it."""
        return Trainer(
            name=name,
            flat=flat,
            steps={},
            budget=Budget(seconds=seconds, steps=self.args.steps),
            log=self.log,
            stop=self.stop,
            checkpoint=self.work / f"{name}.pt",
            **more,
        )

    def save_weights(self, name: str, weights: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        temporary = self.work / f"{name}.safetensors.tmp"
        save_file(weights, temporary)
        os.replace(temporary, self.work / f"{name}.safetensors")

    def weights(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.work / f"{name}.safetensors")

    def has(self, name: str) -> bool:
        return (self.work / f"{name}.safetensors").is_file()

    def trained_vae(self) -> nn.Module:
        """With the exported weights, in the type that training computes in."""
        model = make_vae(self.configs["vae"])
        model.load_state_dict(self.weights("vae"))
        norm_kernel(model, self.device)
        return model.to(self.device, self.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)

    def painter(self) -> Painter:
        return Painter.of(
            self.configs,
            {name: self.weights(name) for name in EXPORT_DTYPES},
            tokenizer=self.tokenizer,
            length=self.sizes.length,
            scaling_factor=self.metrics["scaling_factor"],
            device=self.device,
        )
