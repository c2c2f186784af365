"""What the stages of sana-tiny's training share: arguments, device, sprites, helper processes, results so far."""

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

from sana_ref import ops
from sana_ref.layers import RMSNorm
from train import dit, fast
from train.loop import Budget, Log, Stop
from train.models import (
    BUCKETS,
    compute_dtype,
    make_vae,
)
from train.sampling import EXPORT_DTYPES, Painter
from train.sprites import Sprites, load_sprites
from train.tokenizer import num_instruction_tokens

SECONDS_TO_WRITE = 12.0  # kept free at the end of an invocation
PROBE_PATIENCE = 60.0  # how long to wait for the timing of options, once it is needed
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

        self.args, self.sizes, self.configs, self.device, self.log, self.stop, self.end = (
            args,
            sizes,
            configs,
            device,
            log,
            stop,
            end,
        )
        self.dtype = compute_dtype(device)
        self.graphs = not args.no_graphs
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
        self.helpers: dict[str, subprocess.Popen[bytes]] = {}
        self._kernels: bool | None = None
        torch.manual_seed(0)

    @property
    def norm_kernel(self) -> bool:
        """Whether the norm's kernel may be used here; looked at once."""
        if self._kernels is None:
            self._kernels = check_kernels(self)
        return self._kernels

    @property
    def names(self) -> list[dict[str, list[str]]]:
        return self.sprites.names[: self.sprites.num_classes]

    def plan(self) -> dict[str, tuple[int, int, float]]:
        """Number of scenes, seed and aspect of each bucket of the latent cache."""
        return {
            name: (self.sizes.scenes if index == 0 else self.sizes.scenes // 8, SEEDS["latents"] + index, width / height)
            for index, (name, (width, height)) in enumerate(BUCKETS.items())
        }

    def start_helpers(self, wanted: list[str]) -> None:
        """Captions are written, and options timed, by processes beside the first stages."""
        caption_file = self.work / "captions.npz"
        if "latents" in wanted and not (self.work / "latents.pt").is_file() and not caption_file.is_file():
            command = [
                "train.caption_cache",
                "--sprites",
                str(self.args.sprites),
                "--out",
                str(caption_file),
                "--plan",
                json.dumps(self.plan()),
                "--captions",
                str(self.sizes.captions),
                "--length",
                str(self.sizes.length),
            ]
            self._start("captions", command)
        if "dit" in wanted and not self.args.option and self.device.type == "cuda" and not self._probed():
            command = ["train.probe", "--out", str(self.work / "probe.json"), "--batch", str(self.sizes.batch)]
            command += ["--prefix", str(self.prefix), "--length", str(self.sizes.length)]
            self._start("probe", command + (["--minuscule"] if self.args.smoke else []))

    def _probed(self) -> bool:
        path = self.work / "probe.json"
        return path.is_file() and "finished" in json.loads(path.read_text())

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.work / f"{name}.log", "wb") as log:
            self.helpers[name] = subprocess.Popen([sys.executable, "-m", *command], stdout=log, stderr=subprocess.STDOUT)

    def stop_helpers(self) -> None:
        for process in self.helpers.values():
            if process.poll() is None:
                process.terminate()
                process.wait()

    def wait_for(self, name: str, seconds: float) -> None:
        """Let a helper finish. Raises RuntimeError with its last words if it failed; one that is too slow is stopped, and the
        log says so.
        """
        process = self.helpers.pop(name, None)
        if process is None:
            return
        began = time.monotonic()
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            self.log(f"{name}: stopped after waiting {seconds:.0f} s")
            return
        words = (self.work / f"{name}.log").read_text(errors="replace")[-1500:]
        if process.returncode:
            raise RuntimeError(f"{name}: got exit code {process.returncode}; expected 0. Its last words:\n{words}")
        self.log(f"{name}: ready, waited {time.monotonic() - began:.1f} s" + (f"\n{words}" if name == "probe" else ""))

    def record(self, name: str, value: Any) -> None:
        self.metrics[name] = value
        temporary = self.work / "metrics.tmp"
        temporary.write_text(json.dumps(self.metrics))
        os.replace(temporary, self.work / "metrics.json")

    def budget(self, seconds: float) -> Budget:
        return Budget(seconds=seconds, steps=self.args.steps)

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
        fast_norm_install(self, model)
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


def fast_norm_install(run: Run, model: nn.Module) -> None:
    """Use the norm's kernel where there is a GPU that runs it."""
    if run.norm_kernel:
        from train.fast_norm import install  # imports Triton

        install(model)


def check_kernels(run: Run) -> bool:
    """On a GPU: whether the Triton kernels (linear attention, norm) agree with plain PyTorch. The attention falls back to the
    latter if not, for the whole process; the result says whether the norm's kernel may be used.
    """
    if run.device.type != "cuda":
        return False
    from train.fast_norm import install

    generator = torch.Generator(run.device).manual_seed(0)

    def agree(make: Callable[[], tuple[Tensor, ...]], other: Callable[[], tuple[Tensor, ...]], name: str) -> bool:
        try:
            got = make()
        except Exception as error:  # whatever Triton raises here: without the kernel training is slower, not wrong
            run.log(f"{name}: kernel not used: {type(error).__name__}: {str(error)[:200]}")
            return False
        worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, other(), strict=True))
        run.log(f"{name}: kernel differs from PyTorch by {worst:.4f}")
        return worst < 0.02

    q, k, v, grad = (
        torch.randn(4, 4, 64, 32, device=run.device, generator=generator).bfloat16().requires_grad_() for _ in range(4)
    )

    def attend(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = f(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    if not agree(lambda: attend(ops.relu_linear_attention), lambda: attend(ops.relu_linear_attention_truth), "linear attention"):
        fast.forbid_op()

    x = torch.randn(4, 64, 32, 32, device=run.device, generator=generator).bfloat16()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm = RMSNorm(64, bias=True, axis=1).to(run.device, torch.bfloat16)

    def normed(kernel: bool) -> tuple[Tensor, ...]:
        install(norm, kernel)
        out = norm(x)
        return (out, *torch.autograd.grad(out, (x, *norm.parameters()), x.detach().roll(1, 0)))

    return agree(lambda: normed(True), lambda: normed(False), "norm")
