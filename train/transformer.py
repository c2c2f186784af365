"""Training a transformer on cached latents: its data, its objective, and how it is spread over the processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from sana_ref import checkpoint as checkpoints
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.data.encoders import expected_identity
from train.data.reading import Cache
from train.data.stream import CachedSource
from train.initial import initialise
from train.objective.flow import FlowObjective
from train.parallel.processes import Processes
from train.parallel.reckoning import reckon
from train.parallel.wrap import Strategy
from train.schema import ExperimentSettings, transformer_config
from train.trainer.errors import TrainingError
from train.trainer.loop import Trainer
from train.trainer.settings import accumulation
from train.validation import make_validation

__all__ = ["SETTINGS", "make_trainer"]

SETTINGS = ExperimentSettings
TEXT_TOKENS = 300  # of published models; a checkpoint says its own
PX_PER_LATENT = 32
# Where things lie, how they are spread and who is told may change when a run goes on; what is computed, and for how long, may not.
MAY_CHANGE = {
    "env": True,
    "parallel": True,
    "validation": True,
    "trainer": {"folder", "tensorboard", "wandb_project"},
    "data": {"path", "cache"},
}


def make_trainer(settings: ExperimentSettings, *, processes: Processes, log: Callable[[str], None] = print) -> Trainer:
    """The run that `settings` describes, at its beginning. Raises DataError, TrainingError and the errors of a checkpoint."""
    if settings.data.cache is None:
        raise TrainingError("data.cache: got null; expected the folder that `sana data prepare` named. Set data.cache=FOLDER")
    config, length, expected = transformer_config(settings.model), TEXT_TOKENS, {}
    torch.manual_seed(settings.trainer.seed)
    model = initialise(SanaTransformer2DModel(config))
    if settings.model.checkpoint is not None:
        start = checkpoints.load(settings.model.checkpoint)
        there = start.transformer_config
        if replace(there, sample_size=config.sample_size, interpolation_scale=config.interpolation_scale) != config:
            raise TrainingError(f"model.checkpoint: got {settings.model.checkpoint}, a transformer with {there}; expected {config}")
        if there != config and processes.rank == 0:  # those two have no weights: so 2K and 4K begin with the weights of 1024 px
            log(
                f"model.checkpoint: sample_size {there.sample_size} -> {config.sample_size}, interpolation_scale "
                f"{there.interpolation_scale} -> {config.interpolation_scale}: the same weights, other positions"
            )
        model.load_state_dict(start.transformer(torch.float32, "cpu").state_dict())
        length, expected = start.prompt.max_sequence_length, expected_identity(start)
    elif settings.validation.model is not None:  # new weights have no encoders; those that will draw must have made the cache
        expected = expected_identity(checkpoints.load(settings.validation.model, components=("vae", "text_encoder")))
    length = settings.data.max_sequence_length or length
    cache = Cache(settings.data.cache, expected)
    if cache.identity.resolution != settings.data.resolution and processes.rank == 0:
        log(
            f"warning: data.cache has pictures of {cache.identity.resolution} px, and data.resolution is "
            f"{settings.data.resolution}. The cache's are trained on; set data.resolution to theirs, or use another cache."
        )
    strategy = _strategy(settings, config, cache, length, processes, log)
    source = CachedSource(
        cache,
        micro_batch=settings.trainer.micro_batch,
        length=length,
        seed=settings.data.seed,
        temperature=settings.data.caption_temperature,
        rank=processes.rank,
        world=processes.world_size,
        num_workers=settings.env.num_workers,
    )
    validation = make_validation(settings, config, settings.trainer.folder, processes.device, log, rank=processes.rank)
    return Trainer(
        model.to(processes.device).requires_grad_(True).train(),
        source,
        settings.trainer,
        FlowObjective(settings.objective),
        config=settings.model_dump(mode="json", exclude=MAY_CHANGE),  # type: ignore[arg-type]
        processes=processes,
        strategy=strategy,
        log=log,
        validate=validation,
        validation_steps=settings.validation.every,
    )


def _memory(processes: Processes) -> int:
    """Bytes that this process may use."""
    if processes.device.type == "cuda":
        return torch.cuda.get_device_properties(processes.device).total_memory
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this host, whose memory they share
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here


def _strategy(
    settings: ExperimentSettings,
    config: SanaTransformerConfig,
    cache: Cache,
    length: int,
    processes: Processes,
    log: Callable[[str], None],
) -> Strategy:
    """As told, or as the first process reckons, which says how; the others follow. Raises TrainingError."""
    trainer, told = settings.trainer, settings.parallel.strategy
    micro_batches = accumulation(trainer, processes.world_size)
    if told in ("ddp", "fsdp2") and processes.mesh is None:
        raise TrainingError(
            f"parallel.strategy: got {told} and one process; expected several, which torchrun starts: torchrun --nproc-per-node 2 "
            "-m train.run …. For one process set parallel.strategy=single"
        )

    def chosen() -> Strategy:
        largest = max(cache.entries, key=lambda entry: entry.width * entry.height)
        try:
            reckoning = reckon(
                config,
                world_size=processes.world_size,
                memory=_memory(processes),
                batch=trainer.micro_batch,
                accumulation=micro_batches,
                height=largest.height // PX_PER_LATENT,
                width=largest.width // PX_PER_LATENT,
                tokens=length,
                optimizer=trainer.optimizer.kind,
                ema=trainer.ema_decay is not None,
                checkpointing=trainer.activation_checkpointing,
                strategy=told,
            )
        except ValueError as error:
            raise TrainingError(str(error)) from None
        log(str(reckoning))
        if not reckoning.fits:
            log(f"warning: this is more than the memory allows, and it is used as told. Try {', '.join(reckoning.remedies)}.")
        return reckoning.strategy

    return processes.first(chosen)
