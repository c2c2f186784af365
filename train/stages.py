"""The stages of sana-tiny's training, and what is handed over at the end. `train.tiny` runs them."""

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

import numpy as np
import torch
from torch import Tensor, nn

from sana_ref import ops
from sana_ref.layers import RMSNorm
from train import dit, fast, recogniser, vae
from train.caption_cache import training_scenes
from train.captions import ABOVE_BELOW, COLOUR_NAMES, KIND_NAMES, LEFT_RIGHT, SINGLE, THREE
from train.evaluate import PLACES, cut, evaluate, grid, grid_captions
from train.flat import AdamWConfig, FlatParameters
from train.loop import Budget, Log, Schedule, Stop, Trainer, capture
from train.models import (
    BUCKET_WEIGHTS,
    BUCKETS,
    FLOW_SHIFT,
    compute_dtype,
    make_text_encoder,
    make_transformer,
    make_vae,
    num_parameters,
)
from train.probe import choose
from train.sampling import EXPORT_DTYPES, Painter
from train.scenes import SceneArrays, SceneTensors, draw_scenes, palette
from train.sprites import Sprites, load_sprites
from train.tokenizer import num_instruction_tokens

SECONDS_TO_WRITE = 12.0  # kept free at the end of an invocation
PROBE_PATIENCE = 60.0  # how long to wait for the timing of options, once it is needed
SEEDS = {"ae": 10, "latents": 100, "measure": 900, "recogniser": 500, "recogniser_test": 950}


class Run:
    """What the stages share: arguments, device, sprites, and the results so far (work/metrics.json)."""

    def __init__(
        self, *, args: argparse.Namespace, sizes: Any, configs: dict[str, dict[str, Any]], device: torch.device, log: Log, stop: Stop, end: float
    ) -> None:
        from tokenizers import Tokenizer

        self.args, self.sizes, self.configs, self.device, self.log, self.stop, self.end = args, sizes, configs, device, log, stop, end
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
        self.helpers: dict[str, subprocess.Popen[bytes]] = {}
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

    def start_helpers(self, wanted: list[str]) -> None:
        """Captions are written, and options timed, by processes beside the first stages."""
        caption_file = self.work / "captions.npz"
        if "latents" in wanted and not (self.work / "latents.pt").is_file() and not caption_file.is_file():
            command = [
                "train.caption_cache", "--sprites", str(self.args.sprites), "--out", str(caption_file), "--plan", json.dumps(self.plan()),
                "--captions", str(self.sizes.captions), "--length", str(self.sizes.length),
            ]  # fmt: skip
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
        """Let a helper finish. Raises RuntimeError with its last words if it failed; one that is too slow is stopped, and the log says so."""
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


def check_kernels(run: Run) -> bool:
    """On a GPU: whether the Triton kernels (linear attention, norm) agree with plain PyTorch. The attention falls back to the latter if not,
    for the whole process; the result says whether the norm's kernel may be used."""
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

    q, k, v, grad = (torch.randn(4, 4, 64, 32, device=run.device, generator=generator).bfloat16().requires_grad_() for _ in range(4))

    def attend(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = f(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    if not agree(lambda: attend(ops.relu_linear_attention), lambda: attend(ops.relu_linear_attention_truth), "linear attention"):
        fast.use_attention(truth=True)

    x = torch.randn(4, 64, 32, 32, device=run.device, generator=generator).bfloat16()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm = RMSNorm(64, bias=True, axis=1).to(run.device, torch.bfloat16)

    def normed(kernel: bool) -> tuple[Tensor, ...]:
        install(norm, kernel)
        out = norm(x)
        return (out, *torch.autograd.grad(out, (x, *norm.parameters()), x.detach().roll(1, 0)))

    return agree(lambda: normed(True), lambda: normed(False), "norm")


def ae(run: Run) -> None:
    """Train the autoencoder; measure it on scenes of another seed; fix the scaling factor."""
    if run.has("vae"):
        return
    from train.fast_norm import install

    model = make_vae(run.configs["vae"])
    run.log(f"ae: {num_parameters(model) / 1e6:.2f} M parameters")
    flat = FlatParameters(
        {"vae": model}, AdamWConfig(betas=(0.9, 0.98)), device=run.device, dtype=run.dtype, channels_last=True
    )  # fmt: skip
    kernel = check_kernels(run)
    install(model, kernel)
    source = vae.SceneSource.of(run.sprites.rgba, BUCKETS, num=run.sizes.ae_scenes, seed=SEEDS["ae"])
    stats = torch.zeros(5, device=run.device)
    trainer = Trainer(
        name="ae", flat=flat, steps={}, weights=BUCKET_WEIGHTS, schedule=Schedule(peak=1e-3, decay=0.4), budget=run.budget(run.args.ae_seconds),
        log=run.log, stop=run.stop, stats=stats, batch=run.sizes.ae_batch, checkpoint=run.work / "ae.pt", extra_names=("l1", "penalty"),
        checkpoint_seconds=run.args.checkpoint_seconds,
    )  # fmt: skip
    trainer.resume()
    trainer.steps = {
        bucket: capture(vae.make_step(model, flat, source, bucket, run.sizes.ae_batch, stats), run.log, f"ae {bucket}") for bucket in BUCKETS
    }
    finished = trainer.run(deadline=run.end - SECONDS_TO_WRITE)
    if not finished:
        return
    run.save_weights("vae", flat.state_dict("vae", dtype=EXPORT_DTYPES["vae"]))
    del trainer, flat, model, source
    _measure_vae(run)


def _measure_vae(run: Run) -> None:
    model = run.trained_vae()
    held = vae.SceneSource.of(run.sprites.rgba, BUCKETS, num=min(512, run.sizes.ae_scenes), seed=SEEDS["measure"])
    report: dict[str, Any] = {}
    for bucket in BUCKETS:
        found = vae.measure(model, held, bucket, num=min(512, run.sizes.ae_scenes), batch=64, dtype=run.dtype)
        report[bucket] = found
        run.log(f"ae {bucket}: {found['psnr_db']:.2f} dB, with noise 0.1 {found['psnr_noise_0.1_db']:.2f} dB")
    base = report["256x256"]
    run.log(f"ae latent std {base['latent_std']:.3f}, channels {min(base['channel_std']):.2f} to {max(base['channel_std']):.2f}")
    run.record("vae", report)
    run.record("scaling_factor", round(1 / base["latent_std"], 5))
    picture = held.pictures("256x256", slice(0, 8))
    with torch.no_grad():
        again = model.decode(model.encode(picture.to(run.dtype))).float()
    grid(torch.cat([picture, again]), ["scene"] * 8 + ["decoded"] * 8, run.work / "grid_vae.png")


@torch.no_grad()
def latents(run: Run) -> None:
    """Encode the training scenes once, and put their captions beside them. Both stay on the device and are saved for the next invocation."""
    path = run.work / "latents.pt"
    if path.is_file():
        return
    if not run.has("vae"):
        run.log("latents: the autoencoder is not finished; nothing to do yet")
        return
    model, colours = run.trained_vae(), palette(run.device)
    began = time.monotonic()
    encoded: dict[str, tuple[Tensor, SceneArrays]] = {}
    for bucket, (num, seed, aspect) in run.plan().items():
        scenes = training_scenes(num, seed, aspect, run.sprites.class_names)
        tensors, (width, height) = SceneTensors.of(scenes, run.device), BUCKETS[bucket]
        out = torch.empty(num, 32, height // 32, width // 32, dtype=torch.float16, device=run.device)
        for start in range(0, num, 256):
            part = slice(start, start + 256)
            picture = compose_part(run, tensors[part], width, height, colours)
            out[part] = (model.encode(picture).float() * run.metrics["scaling_factor"]).half()
        encoded[bucket] = (out, scenes)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    total = sum(len(out) for out, _ in encoded.values())
    run.log(f"latents: {total} scenes in {time.monotonic() - began:.1f} s")
    run.wait_for("captions", 120)
    with np.load(run.work / "captions.npz") as captions:
        for bucket, (out, scenes) in encoded.items():
            first, second = scenes.objects[:, 0], np.where(np.isin(scenes.kind, (LEFT_RIGHT, ABOVE_BELOW)), scenes.objects[:, 1], -1)
            facts = torch.from_numpy(np.stack([scenes.kind, first, second, scenes.colour], axis=1)).long().to(run.device)
            run.caches[bucket] = dit.LatentCache(latents=out, ids=torch.from_numpy(captions[bucket]).to(run.device), facts=facts)
    temporary = path.with_suffix(".tmp")
    torch.save({name: (c.latents.cpu(), c.ids.cpu(), c.facts.cpu()) for name, c in run.caches.items()}, temporary)
    os.replace(temporary, path)
    run.log("latents: saved")


def compose_part(run: Run, part: SceneTensors, width: int, height: int, colours: Tensor) -> Tensor:
    picture = vae.compose(part, run.sprites.rgba, width=width, height=height, colours=colours)
    return picture.to(run.dtype, memory_format=torch.channels_last)


def caches(run: Run) -> dict[str, dit.LatentCache]:
    if not run.caches and (run.work / "latents.pt").is_file():
        loaded = torch.load(run.work / "latents.pt", map_location=run.device, weights_only=True)
        run.caches = {name: dit.LatentCache(latents=a, ids=b, facts=c) for name, (a, b, c) in loaded.items()}
    return run.caches


def text(run: Run) -> None:
    """Teach the text encoder alone what captions say, so that the transformer begins with words that differ."""
    if run.has("text_start") or not caches(run):
        return
    encoder = make_text_encoder(run.configs["text_encoder"])
    heads = dit.FactHeads(run.configs["text_encoder"]["hidden_size"], len(run.names), len(COLOUR_NAMES), len(KIND_NAMES))
    flat = FlatParameters({"text_encoder": encoder, "heads": heads}, AdamWConfig(), device=run.device, dtype=run.dtype)
    fast.one_hot_embedding(encoder)
    stats = torch.zeros(4, device=run.device)
    trainer = Trainer(
        name="text", flat=flat, steps={}, weights={"256x256": 1.0}, schedule=Schedule(peak=2e-3, decay=0.5), budget=run.budget(run.args.text_seconds),
        log=run.log, stop=run.stop, stats=stats, batch=run.sizes.batch, checkpoint=run.work / "text.pt", extra_names=("accuracy",),
        log_seconds=5.0,
    )  # fmt: skip
    step = dit.make_text_step(encoder, heads, flat, run.caches["256x256"], prefix=run.prefix, batch=run.sizes.batch, stats=stats)
    trainer.steps = {"256x256": capture(step, run.log, "text")}
    if trainer.run(deadline=run.end - SECONDS_TO_WRITE):
        run.save_weights("text_start", flat.state_dict("text_encoder"))


def train_dit(run: Run) -> None:
    """Transformer and text encoder together, on cached latents."""
    if run.metrics.get("dit_finished") or not caches(run) or not run.has("text_start"):
        return
    option = run.args.option
    if not option and run.device.type == "cuda":
        try:
            run.wait_for("probe", PROBE_PATIENCE)
        except RuntimeError as error:
            run.log(str(error))
        probe = run.work / "probe.json"
        found = json.loads(probe.read_text()) if probe.is_file() else {}
        option = choose(found)
        run.record("probe", found)
    option = option or "eager"
    transformer, encoder = make_transformer(run.configs["transformer"]), make_text_encoder(run.configs["text_encoder"])
    encoder.load_state_dict(run.weights("text_start"))
    run.log(f"dit: {num_parameters(transformer) / 1e6:.2f} M + {num_parameters(encoder) / 1e6:.2f} M parameters, option {option}")
    models = {"transformer": transformer, "text_encoder": encoder}
    flat = FlatParameters(models, AdamWConfig(ema_decay=0.9995), device=run.device, dtype=run.dtype)
    stats = torch.zeros(3, device=run.device)
    trainer = Trainer(
        name="dit", flat=flat, steps={}, weights=BUCKET_WEIGHTS, schedule=Schedule(peak=run.args.lr, warm_up_steps=500),
        budget=run.budget(run.args.dit_seconds), log=run.log, stop=run.stop, stats=stats, batch=run.sizes.batch, checkpoint=run.work / "dit.pt",
        checkpoint_seconds=run.args.checkpoint_seconds,
    )  # fmt: skip
    trainer.resume()
    trainer.losses = [tuple(row) for row in run.metrics.get("dit_losses", [])]

    def captured(option: str) -> dict[str, Callable[[], None]]:
        fast.restore(transformer, encoder)
        fast.prepare(transformer, encoder, option)
        return {
            bucket: capture(
                dit.make_step(transformer, encoder, flat, cache, prefix=run.prefix, batch=run.sizes.batch, stats=stats),
                run.log,
                f"dit {bucket}",
            )
            for bucket, cache in run.caches.items()
        }

    try:
        trainer.steps = captured(option)
    except Exception as error:  # whatever a compiler raises: training goes on without it
        if option in ("eager", "truth"):
            raise
        run.log(f"dit: option {option} failed here ({type(error).__name__}: {str(error)[:200]}); going on with truth")
        trainer.steps = captured("truth")

    def export() -> None:
        for name in models:
            run.save_weights(name, flat.state_dict(name, dtype=EXPORT_DTYPES[name]))
        run.record("dit_losses", trainer.losses)
        run.record("dit_steps", trainer.step)

    trainer.on_checkpoint = export
    reserve = SECONDS_TO_WRITE
    if run.args.finish:
        reserve = run.args.eval_seconds + (0 if run.has("recogniser") else run.args.recogniser_seconds * 1.5)
        if run.args.steps is None:
            left = max(1.0, run.end - reserve - time.monotonic())
            trainer.budget.seconds = trainer.budget.used + left * 0.97  # checkpoints take the rest
    finished = trainer.run(deadline=run.end - reserve)
    export()
    run.record("dit_seconds", round(trainer.budget.used, 1))
    run.record("dit_skipped", int(flat.snapshot()["skipped"].item()))
    run.record("dit_finished", finished)
    fast.use_attention(truth=False)


def train_recogniser(run: Run) -> None:
    """Train the judge on composed and decoded scenes; measure it on scenes of another seed, as they are and decoded."""
    if run.has("recogniser") or not run.has("vae"):
        return
    num_classes, colours, config = len(run.names), palette(run.device), recogniser.RECOGNISER
    model = recogniser.Recogniser(num_classes, len(COLOUR_NAMES), **config)
    run.log(f"recogniser: {num_parameters(model) / 1e6:.2f} M parameters")
    decoded, labels = decoded_objects(run, run.sizes.decoded, SEEDS["recogniser"])
    scenes = recogniser.close_ups(max(1000, run.sizes.ae_scenes), seed=SEEDS["recogniser"] + 50, num_classes=num_classes)
    flat = FlatParameters({"recogniser": model}, AdamWConfig(weight_decay=0.05), device=run.device, dtype=run.dtype, channels_last=True)
    stats, batch = torch.zeros(4, device=run.device), max(16, run.sizes.batch)
    step = recogniser.make_step(
        model, flat, SceneTensors.of(scenes, run.device), decoded, labels, run.sprites.rgba, colours, batch=batch, stats=stats
    )
    trainer = Trainer(
        name="recogniser", flat=flat, steps={"all": capture(step, run.log, "recogniser")}, weights={"all": 1.0},
        schedule=Schedule(peak=2e-3, decay=0.6), budget=run.budget(run.args.recogniser_seconds), log=run.log, stop=run.stop, stats=stats,
        batch=batch, checkpoint=run.work / "recogniser.pt", extra_names=("accuracy",),
    )  # fmt: skip
    if not trainer.run(deadline=run.end - SECONDS_TO_WRITE):
        return
    run.save_weights("recogniser", flat.state_dict("recogniser", dtype=torch.float16))
    judge = trained_recogniser(run)
    single = draw_scenes(min(2000, run.sizes.ae_scenes), seed=SEEDS["recogniser_test"], num_objects=num_classes, kind=SINGLE)
    tensors = SceneTensors.of(single, run.device)
    emoji, colour = tensors.objects[:, 0], tensors.colour
    autoencoder = run.trained_vae()
    results = {"composed": [], "decoded": []}
    with torch.no_grad():
        for start in range(0, len(single), 128):
            picture = vae.compose(tensors[start : start + 128], run.sprites.rgba, width=256, height=256, colours=colours)
            results["composed"].append(picture)
            results["decoded"].append(autoencoder.decode(autoencoder.encode(picture.to(run.dtype))).float().clamp(-1, 1))
    report = {name: recogniser.accuracy(judge, torch.cat(pictures), emoji, colour) for name, pictures in results.items()}
    run.record("recogniser", report)
    run.log(f"recogniser: {report}")


def trained_recogniser(run: Run) -> recogniser.Recogniser:
    model = recogniser.Recogniser(len(run.names), len(COLOUR_NAMES), **recogniser.RECOGNISER)
    model.load_state_dict(run.weights("recogniser"))
    return model.float().to(run.device).eval().requires_grad_(False)


@torch.no_grad()
def decoded_objects(run: Run, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Objects as the autoencoder shows them: (m, 3, 96, 96) uint8 and (m, 2) emoji and colour. Whole pictures of one object, and parts of
    pictures of several."""
    model, colours, side = run.trained_vae(), palette(run.device), recogniser.INPUT_SIDE
    pictures, labels = [], []
    for kind, share in ((SINGLE, 1.0), (LEFT_RIGHT, 0.15), (ABOVE_BELOW, 0.15), (THREE, 0.1)):
        scenes = draw_scenes(max(4, int(num * share)), seed=seed + kind, num_objects=len(run.names), kind=kind)
        tensors = SceneTensors.of(scenes, run.device)
        for start in range(0, len(scenes), 128):
            part = tensors[start : start + 128]
            decoded = model.decode(model.encode(compose_part(run, part, 256, 256, colours))).float().clamp(-1, 1)
            places = [None] if kind == SINGLE else list(PLACES[kind])
            for index, place in enumerate(places):
                seen = decoded if place is None else cut(decoded, place)
                small = nn.functional.interpolate(seen, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
                pictures.append(((small + 1) * 127.5).round().clamp(0, 255).byte())
                labels.append(torch.stack([part.objects[:, index], part.colour], dim=1))
    return torch.cat(pictures), torch.cat(labels)


def evaluation(run: Run) -> None:
    """Draw held-out captions with the exported weights and let the recogniser judge."""
    if not (run.has("recogniser") and run.has("transformer")):
        run.log("eval: recogniser or transformer is missing; nothing to do yet")
        return
    began = time.monotonic()
    report = evaluate(
        run.painter(), trained_recogniser(run), run.names, num_single=run.sizes.single_questions, num_other=run.sizes.other_questions
    )
    run.record("eval", report)
    run.log(f"eval in {time.monotonic() - began:.1f} s: " + json.dumps(report)[:1800])


def deliver(run: Run) -> None:
    """Write what there is to the output folder: weights as exported, one JSON, picture grids."""
    out: Path = run.args.out
    for name in ("vae", "transformer", "text_encoder", "recogniser"):
        if run.has(name):
            (out / f"{name}.safetensors").write_bytes((run.work / f"{name}.safetensors").read_bytes())
    if (run.work / "grid_vae.png").is_file():
        (out / "grid_vae.png").write_bytes((run.work / "grid_vae.png").read_bytes())
    if run.has("transformer") and run.has("vae"):
        texts = grid_captions(run.names, 8 if run.args.smoke else 64)
        painter = run.painter()
        grid(painter.draw(texts, seed=11), texts, out / "grid_256.png")
        wide = texts[: len(texts) // 4]
        grid(painter.draw(wide, seed=12, width=320, height=192), wide, out / "grid_320x192.png", columns=4)
    record = {
        "metrics": run.metrics,
        "configs": {**run.configs, "recogniser": recogniser.RECOGNISER},
        "flow_shift": FLOW_SHIFT,
        "names": run.names,
        "characters": run.sprites.characters,
        "colours": list(COLOUR_NAMES),
        "tokenizer": json.loads(run.sprites.tokenizer_json),
        "log": run.log.lines,
        "arguments": {name: str(value) for name, value in vars(run.args).items()},
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
    }
    (out / "tiny.json").write_text(json.dumps(record, ensure_ascii=False))
    run.log(f"delivered: {', '.join(f'{p.name} {p.stat().st_size / 1e6:.2f} MB' for p in sorted(out.iterdir()))}")


STAGES: dict[str, Callable[[Run], None]] = {
    "ae": ae,
    "latents": latents,
    "text": text,
    "dit": train_dit,
    "recogniser": train_recogniser,
    "eval": evaluation,
}
