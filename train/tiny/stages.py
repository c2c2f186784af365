"""The stages of sana-tiny's training. `train.tiny` runs them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.tiny import dit, fast, recogniser, vae
from train.tiny.caption_cache import training_scenes
from train.tiny.captions import ABOVE_BELOW, COLOUR_NAMES, KIND_NAMES, LEFT_RIGHT, SINGLE, THREE
from train.tiny.evaluate import PLACES, cut, evaluate, grid
from train.tiny.flat import AdamWConfig, FlatParameters
from train.tiny.loop import Schedule
from train.tiny.models import AE_BUCKETS, BUCKET_WEIGHTS, BUCKETS, make_text_encoder, make_transformer, make_vae, num_parameters
from train.tiny.sampling import EXPORT_DTYPES
from train.tiny.scenes import SceneArrays, SceneTensors, draw_scenes, palette
from train.tiny.tiny_run import SECONDS_TO_WRITE, SEEDS, Run


def ae(run: Run) -> None:
    """Train the autoencoder; measure it on scenes of another seed; fix the scaling factor."""
    if run.has("vae"):
        if "scaling_factor" not in run.metrics:
            _measure_vae(run)
        return
    model = make_vae(run.configs["vae"])
    run.log(f"ae: {num_parameters(model) / 1e6:.2f} M parameters")
    flat = FlatParameters({"vae": model}, AdamWConfig(betas=(0.9, 0.98)), device=run.device, dtype=run.dtype, channels_last=True)
    fast.norm_kernel(model, run.device)
    sizes = {bucket: BUCKETS[bucket] for bucket in AE_BUCKETS}
    source = vae.SceneSource.of(run.sprites.rgba, sizes, num=run.sizes.ae_scenes, seed=SEEDS["ae"])
    stats = torch.zeros(5, device=run.device)
    trainer = run.trainer(
        "ae",
        flat,
        seconds=run.args.ae_seconds,
        weights=AE_BUCKETS,
        schedule=Schedule(peak=1e-3, decay=0.4),
        stats=stats,
        batch=run.sizes.ae_batch,
        extra_names=("l1", "penalty"),
    )
    trainer.resume()
    trainer.steps = {
        bucket: run.capture(vae.make_step(model, flat, source, bucket, run.sizes.ae_batch, stats), f"ae {bucket}")
        for bucket in sizes
    }
    if not trainer.run(deadline=run.end - SECONDS_TO_WRITE):
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
    grid(torch.cat([picture, again]), ["scene"] * len(picture) + ["decoded"] * len(picture), run.work / "grid_vae.png")


@torch.no_grad()
def latents(run: Run) -> None:
    """Encode the training scenes once, and put their captions beside them.

    Both stay on the device and are saved for the next invocation.
    """
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
    with np.load(run.wait_for_captions()) as captions:
        for bucket, (out, scenes) in encoded.items():
            first = scenes.objects[:, 0]
            second = np.where(np.isin(scenes.kind, (LEFT_RIGHT, ABOVE_BELOW)), scenes.objects[:, 1], -1)
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
    trainer = run.trainer(
        "text",
        flat,
        seconds=run.args.text_seconds,
        weights={"256x256": 1.0},
        schedule=Schedule(peak=2e-3, decay=0.5),
        stats=stats,
        batch=run.sizes.batch,
        extra_names=("accuracy",),
        log_seconds=5.0,
    )
    step = dit.make_text_step(encoder, heads, flat, run.caches["256x256"], prefix=run.prefix, batch=run.sizes.batch, stats=stats)
    trainer.steps = {"256x256": run.capture(step, "text")}
    if trainer.run(deadline=run.end - SECONDS_TO_WRITE):
        run.save_weights("text_start", flat.state_dict("text_encoder"))


def train_dit(run: Run) -> None:
    """Transformer and text encoder together, on cached latents."""
    if run.metrics.get("dit_finished") or not caches(run) or not run.has("text_start"):
        return
    transformer, encoder = make_transformer(run.configs["transformer"]), make_text_encoder(run.configs["text_encoder"])
    encoder.load_state_dict(run.weights("text_start"))
    if run.has("transformer") and not (run.work / "dit.pt").is_file():  # all that is left of an earlier run
        run.log("dit: going on from exported weights, without the optimizer's state")
        transformer.load_state_dict(run.weights("transformer"))
        encoder.load_state_dict(run.weights("text_encoder"))
    run.log(f"dit: {num_parameters(transformer) / 1e6:.2f} M + {num_parameters(encoder) / 1e6:.2f} M parameters")
    models = {"transformer": transformer, "text_encoder": encoder}
    flat = FlatParameters(models, AdamWConfig(ema_decay=0.9995), device=run.device, dtype=run.dtype)
    stats = torch.zeros(3, device=run.device)
    fast.one_hot_embedding(encoder)
    trainer = run.trainer(
        "dit",
        flat,
        seconds=run.args.dit_seconds,
        weights=BUCKET_WEIGHTS,
        schedule=Schedule(peak=1.5e-3, warm_up_steps=500),
        stats=stats,
        batch=run.sizes.batch,
    )
    trainer.resume()
    trainer.losses = [tuple(row) for row in run.metrics.get("dit_losses", [])]

    def export() -> None:
        for name in models:
            run.save_weights(name, flat.state_dict(name, dtype=EXPORT_DTYPES[name]))
        run.record("dit_losses", trainer.losses)
        run.record("dit_steps", trainer.step)

    trainer.on_checkpoint = export
    with fast.plain_attention():
        trainer.steps = {
            bucket: run.capture(
                dit.make_step(transformer, encoder, flat, cache, prefix=run.prefix, batch=run.sizes.batch, stats=stats),
                f"dit {bucket}",
            )
            for bucket, cache in run.caches.items()
        }
        reserve = SECONDS_TO_WRITE
        if run.args.finish:
            reserve = run.args.eval_seconds + (0 if run.has("recogniser") else run.args.recogniser_seconds * 1.5)
            if run.args.steps is None:  # what is left now: capturing took some of it
                left = max(1.0, run.end - reserve - time.monotonic())
                trainer.budget.seconds = trainer.budget.used + left * 0.97  # checkpoints take the rest
        finished = trainer.run(deadline=run.end - reserve)
    export()
    run.record("dit_seconds", round(trainer.budget.used, 1))
    run.record("dit_skipped", int(flat.snapshot()["skipped"].item()))
    run.record("dit_finished", finished)


def train_recogniser(run: Run) -> None:
    """Train the judge on composed and decoded scenes; measure it on scenes of another seed, as they are and decoded."""
    if run.has("recogniser") or not run.has("vae"):
        return
    num_classes, colours, config = len(run.names), palette(run.device), recogniser.RECOGNISER
    model = recogniser.Recogniser(num_classes, len(COLOUR_NAMES), **config)
    run.log(f"recogniser: {num_parameters(model) / 1e6:.2f} M parameters")
    decoded, labels = decoded_objects(run, run.sizes.decoded, SEEDS["recogniser"])
    scenes = recogniser.close_ups(max(1000, run.sizes.ae_scenes), seed=SEEDS["recogniser"] + 50, num_classes=num_classes)
    flat = FlatParameters(
        {"recogniser": model}, AdamWConfig(weight_decay=0.05), device=run.device, dtype=run.dtype, channels_last=True
    )
    stats, batch = torch.zeros(4, device=run.device), max(16, run.sizes.batch)
    step = recogniser.make_step(
        model, flat, SceneTensors.of(scenes, run.device), decoded, labels, run.sprites.rgba, colours, batch=batch, stats=stats
    )
    trainer = run.trainer(
        "recogniser",
        flat,
        seconds=run.args.recogniser_seconds,
        weights={"all": 1.0},
        schedule=Schedule(peak=2e-3, decay=0.6),
        stats=stats,
        batch=batch,
        extra_names=("accuracy",),
    )
    trainer.steps = {"all": run.capture(step, "recogniser")}
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
    """Objects as the autoencoder shows them: (m, 3, 96, 96) uint8 and (m, 2) emoji and colour.

    Whole pictures of one object, and parts of pictures of several.
    """
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
        run.painter(),
        trained_recogniser(run),
        run.names,
        num_single=run.sizes.single_questions,
        num_other=run.sizes.other_questions,
    )
    run.record("eval", report)
    run.log(f"eval in {time.monotonic() - began:.1f} s: " + json.dumps(report)[:1800])


STAGES: dict[str, Callable[[Run], None]] = {
    "ae": ae,
    "latents": latents,
    "text": text,
    "dit": train_dit,
    "recogniser": train_recogniser,
    "eval": evaluation,
}
