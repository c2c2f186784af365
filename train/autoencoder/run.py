"""The run that an autoencoder's experiment describes: `python -m train.run experiment=sana_tiny_dcae`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from train.autoencoder.losses import AutoencoderObjective
from train.autoencoder.measure import held_out, psnr
from train.autoencoder.perceptual import make_perceptual
from train.autoencoder.pictures import make_source
from train.autoencoder.settings import AutoencoderExperiment
from train.autoencoder.task import AutoencoderTask, architecture
from train.autoencoder.weights import load_vae, refuse_another
from train.parallel.processes import Processes
from train.trainer.loop import Trainer

__all__ = ["SETTINGS", "make_task", "make_trainer"]

SETTINGS = AutoencoderExperiment
# Where a run is, how it is spread and who is told may change when it goes on; what is computed, and for how long, may not.
MAY_CHANGE = {"env": True, "parallel": True, "validation": True, "trainer": {"folder", "tensorboard", "wandb_project"}}


def make_task(settings: AutoencoderExperiment, *, start: bool = True) -> AutoencoderTask:
    """What is trained, on the CPU in fp32, from the folders that the settings name, or with `start` False from new weights alone.

    Raises TrainingError for a folder of another architecture, and the errors of a checkpoint.
    """
    chosen = settings.autoencoder
    torch.manual_seed(settings.trainer.seed)
    task = AutoencoderTask(
        architecture(chosen), train=chosen.train, head_stages=chosen.head_stages, adversarial=settings.objective.adversarial
    )
    if start:
        for key, folder, part in (
            ("checkpoint", chosen.checkpoint, ""),
            ("encoder_from", chosen.encoder_from, "encoder."),
        ):
            if folder is not None:
                there = load_vae(folder).state_dict()
                weights = {name: tensor for name, tensor in there.items() if name.startswith(part)}
                own = {name: tensor for name, tensor in task.autoencoder.state_dict().items() if name.startswith(part)}
                refuse_another(key, folder, weights, own)
                task.autoencoder.load_state_dict(weights, strict=not part)
    return task


def make_trainer(settings: AutoencoderExperiment, *, processes: Processes, log: Callable[[str], None] = print) -> Trainer:
    """The run at its beginning. Raises DataError, TrainingError, SpecError and the errors of a checkpoint."""
    device = processes.device
    task = make_task(settings).to(device).train()
    config = task.autoencoder.config
    if device.type == "cuda":
        task = task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not settings.trainer.compile:  # the compiler makes one kernel of a norm by itself
            from train.autoencoder.fast_norm import install  # imports Triton

            install(task)
    network = settings.objective.perceptual_network
    objective = AutoencoderObjective(
        settings.objective,
        latent_channels=config.latent_channels,
        px_per_latent=config.px_per_latent,
        perceptual=make_perceptual(network, device) if network is not None and settings.objective.perceptual > 0 else None,
    )
    source = make_source(
        settings.pictures,
        micro_batch=settings.trainer.micro_batch,
        processes=processes,
        num_workers=settings.env.num_workers,
        log=log,
    )
    return Trainer(
        task,
        source,
        settings.trainer,
        objective,
        config=settings.model_dump(mode="json", exclude=MAY_CHANGE),  # type: ignore[arg-type]
        processes=processes,
        log=log,
        validate=_Validation(settings, device),
        validation_steps=settings.validation.every,
    )


class _Validation:
    """The PSNR of pictures that are not trained on, with the averaged weights. What it needs is made when it is first called."""

    def __init__(self, settings: AutoencoderExperiment, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.task: AutoencoderTask | None = None
        self.pictures: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        settings = self.settings
        if self.task is None:
            self.task = make_task(settings, start=False).to(self.device).eval()
            self.pictures = held_out(
                settings.pictures,
                settings.validation.num_pictures,
                micro_batch=settings.trainer.micro_batch,
                device=self.device,
            )
        self.task.load_state_dict(weights)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.trainer.precision == "bf16"):
            return {"psnr_db": torch.cat([psnr(self.task.autoencoder(each), each) for each in self.pictures]).mean().item()}
