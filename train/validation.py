"""Validation: the same pictures at every visit, drawn with the averaged weights, and scores that say what became of them.

    validation = make_validation(settings, config, folder, device, log)      # None, and a line that says why, if it is off
    validation(1000, ema_weights)      # -> {"pictures_mean": …, "scene_single": …}

    FOLDER/validation/step_00001000.png     the prompts' pictures
                      scores.json           of every step
                      index.html            both, newest first

Prompts are encoded once, before training fills the device; the text encoder then leaves it. Transformer and decoder come for a
visit, one after the other. Noise is runtime.noise's, of the settings' seed: nothing here touches the generators of training.
A visit that fails (no memory, pixels that are not finite, a full disk) is said in a line, and training goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from engines.errors import SanaError
from runtime.noise import normal_batch
from runtime.prompt import PromptTokenizer
from runtime.schedule import Schedule, make_schedule
from runtime.schedule_file import ScheduleFile
from sana_ref import checkpoint as checkpoints
from sana_ref.build import empty
from sana_ref.components import DecoderForExport, TextEncoderForExport
from sana_ref.step import DenoiserStep, guidance_weights
from sana_ref.text_projection import TextProjection
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from train.grid import grid
from train.schema import ExperimentSettings, ValidationSettings
from train.trainer.errors import TrainingError
from train.validation_page import picture_name, read_scores, write_page, write_scores

if TYPE_CHECKING:
    from train.validation_judge import Judge

__all__ = ["Validation", "make_validation"]

Log = Callable[[str], None]
DENOISED_AT_ONCE, DECODED_AT_ONCE = 4 * 1024**2, 1024**2  # px; the decoder's first layers are as wide as its picture
TEXTS_AT_ONCE = 16
SHOWN = 16  # captions of the judge in the grid, where there are no prompts
CELL = 320  # px at most, of a picture in the grid


class _Texts(NamedTuple):
    """The empty prompt, then the others. On the CPU."""

    embeds: Tensor  # (1 + n, L, C)
    mask: Tensor  # (1 + n, L) fp32


def make_validation(
    settings: ExperimentSettings, config: SanaTransformerConfig, folder: Path, device: torch.device, log: Log, *, rank: int = 0
) -> Validation | None:
    """None if there is nothing to draw, or nothing to draw it with. Raises CheckpointError, TrainingError.

    folder: the run's. rank: of this process; only the first one draws and says so, and the others encode no prompts.
    """
    if rank != 0:
        log = _unsaid
    wanted = settings.validation
    model = wanted.model or settings.model.checkpoint
    if not wanted.prompts and wanted.judge is None:
        log("validation: off, for there are neither validation.prompts nor a validation.judge")
        return None
    if model is None:
        log("validation: off, for neither validation.model nor model.checkpoint says whose autoencoder and text encoder draw")
        return None
    validation = Validation(settings, checkpoints.load(model, components=("vae", "text_encoder")), config, folder, device, log)
    if rank == 0:
        validation.prepare()
    return validation


class Validation:
    """settings: validation, schedule and the data's resolution are read. checkpoint: with vae and text_encoder.

    Computes in bf16 on a GPU, in fp32 on a CPU.
    """

    def __init__(
        self,
        settings: ExperimentSettings,
        checkpoint: checkpoints.Checkpoint,
        config: SanaTransformerConfig,
        folder: Path,
        device: torch.device,
        log: Log,
    ) -> None:
        self.settings, self.every = settings.validation, settings.validation.every
        self.side = settings.data.resolution if self.settings.side is None else self.settings.side
        self.schedule = _schedule(settings.schedule, config)
        self.judge = _judge(self.settings)
        self._title, self._folder, self._device, self._log = settings.name, folder / "validation", device, log
        self._checkpoint, self._config = checkpoint, config
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._texts: _Texts | None = None
        vae, channels = checkpoint.vae_config, checkpoint.text_encoder_config.hidden_size
        if self.side % vae.px_per_latent:
            raise TrainingError(f"validation.side: got {self.side} px; expected a multiple of {vae.px_per_latent}.")
        if (vae.latent_channels, channels) != (config.in_channels, config.caption_channels):
            raise TrainingError(
                f"validation.model: got {checkpoint.name}, with {vae.latent_channels} channels of latents, {channels} of text; "
                f"expected {config.in_channels} and {config.caption_channels}, as the transformer has. Use the model whose "
                "encoders made the cache."
            )

    @property
    def captions(self) -> list[str]:
        """What a visit draws: the prompts, then the judge's captions."""
        return [*self.settings.prompts, *(() if self.judge is None else self.judge.captions)]

    def prepare(self) -> None:
        """Encode the prompts, if there is room on the device; else the first visit tries again. Raises SanaError."""
        try:
            self._encoded()
        except torch.cuda.OutOfMemoryError as error:
            self._log(f"validation: the prompts are not encoded yet: {_first_line(error)}")

    def __call__(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Draw, write and score. weights: all of the transformer's parameters, in any type, on any device; they stay as they are.

        Returns scores by name; none if it failed, which the log says.
        """
        began = time.monotonic()
        try:
            found = self._visit(step, weights)
        except (torch.cuda.OutOfMemoryError, SanaError) as error:
            self._log(f"validation at step {step} failed, training goes on: {_first_line(error)}")
            return {}
        finally:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # training's blocks have other sizes
        where = self._folder / picture_name(step)
        self._log(f"validation at step {step}: {len(self.captions)} pictures in {time.monotonic() - began:.1f} s, {where}")
        return found

    def _visit(self, step: int, weights: Mapping[str, Tensor]) -> dict[str, float]:
        pictures = self._draw(weights)
        if bad := int(pictures.numel() - pictures.isfinite().sum()):
            raise TrainingError(f"pictures: got {bad} of {pictures.numel()} values that are not finite; expected none.")
        found = _statistics(pictures)
        num_prompts = len(self.settings.prompts)
        if self.judge is not None:
            found |= self.judge.scores(pictures[num_prompts:].clamp(-1, 1))
        shown = range(num_prompts) if num_prompts else range(0, len(pictures), -(-len(pictures) // SHOWN))
        texts, part = [self.captions[i] for i in shown], pictures[list(shown)]
        try:
            grid(part, texts, self._folder / picture_name(step), columns=4, side=min(self.side, CELL))
            scores = read_scores(self._folder) | {step: found}
            write_scores(self._folder, scores)
            write_page(self._folder, self._title, scores)
        except OSError as error:
            raise TrainingError(f"{self._folder}: cannot be written ({error}). Make room on its disk.") from None
        return found

    @torch.inference_mode()
    def _draw(self, weights: Mapping[str, Tensor]) -> Tensor:
        """(n, 3, side, side) fp32 on the CPU, not clamped."""
        latents = self._sample(self._encoded(), weights)  # its transformer is gone before the decoder comes
        decoder = DecoderForExport(self._checkpoint.vae(self._dtype, self._device)).eval()
        at_once = max(1, DECODED_AT_ONCE // self.side**2)
        return torch.cat([decoder(part.to(self._device)).cpu() for part in latents.split(at_once)])

    def _sample(self, texts: _Texts, weights: Mapping[str, Tensor]) -> Tensor:
        """Clean latents (n, C, h, w) fp32 on the CPU. Picture k has the noise of seed + k, whatever is drawn beside it."""
        transformer = empty(lambda: SanaTransformer2DModel(self._config))
        own = {name: tensor.detach().to(self._device, self._dtype) for name, tensor in weights.items()}
        transformer.load_state_dict(own, assign=True)  # detached: a weight of training must not become one of this model
        project, step = TextProjection(transformer).eval(), DenoiserStep(transformer).eval()
        guidance = self.settings.guidance_scale
        scales = guidance_weights(guidance, embedded=self._config.guidance_embeds).to(self._device)
        cells = self.side // self._checkpoint.vae_config.px_per_latent
        shape = (self._config.in_channels, cells, cells)
        at_once, found = max(1, DENOISED_AT_ONCE // self.side**2), []
        for rows in torch.arange(len(self.captions)).split(at_once):
            kinds = [rows + 1] if len(scales) == 1 else [torch.zeros_like(rows), rows + 1]
            embeds, mask = (torch.stack([part[kind] for kind in kinds]).to(self._device) for part in texts)
            keys, values = project(embeds.float())
            latents = torch.from_numpy(normal_batch([self.settings.seed + int(row) for row in rows], shape)).to(self._device)
            latents, previous = latents * self.schedule.initial_scale, torch.zeros_like(latents)
            for row in torch.from_numpy(self.schedule.table.copy()).to(self._device):
                latents, previous = step(latents, previous, row, scales, keys, values, mask)
            found.append(latents.cpu())
        return torch.cat(found)

    @torch.inference_mode()
    def _encoded(self) -> _Texts:
        if self._texts is None:
            checkpoint = self._checkpoint
            tokenizer = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt)
            network = checkpoint.text_encoder(self._dtype, self._device)
            encoder = TextEncoderForExport(network, checkpoint.prompt.max_sequence_length).eval()
            embeds, masks = [], []
            texts = self.captions
            parts = [texts[begin : begin + TEXTS_AT_ONCE] for begin in range(0, len(texts), TEXTS_AT_ONCE)]
            for part, negative in [([""], True), *((part, False) for part in parts)]:
                tokens = tokenizer.encode(part, negative=negative)
                ids, mask = (torch.from_numpy(array).to(self._device) for array in (tokens.ids, tokens.mask))
                embeds.append(encoder(ids, mask).to("cpu", self._dtype))
                masks.append(torch.from_numpy(tokens.selected_mask))
            self._texts = _Texts(torch.cat(embeds), torch.cat(masks))
        return self._texts


def _statistics(pictures: Tensor) -> dict[str, float]:
    """What shows a collapse at a glance: grey pictures have no spread, burnt ones are saturated. In the decoder's -1 to 1."""
    clamped = pictures.clamp(-1, 1)
    return {
        "pictures_mean": float(clamped.mean()),
        "pictures_std": float(clamped.flatten(1).std(dim=1).mean()),  # within a picture
        "pictures_saturated": float((clamped.abs() == 1).float().mean()),  # share of values
    }


def _judge(settings: ValidationSettings) -> Judge | None:
    if settings.judge is None:
        return None
    from train.validation_judge import Judge  # what draws and judges scenes is not needed by other runs

    return Judge.load(settings.judge, settings.judged)


def _schedule(file: ScheduleFile, config: SanaTransformerConfig) -> Schedule:
    if file.scheduler == "scm" or config.guidance_embeds:
        raise TrainingError(
            f"schedule: got {file.scheduler!r}, guidance_embeds {config.guidance_embeds}; expected a flow sampler and a model "
            "without embedded guidance: a distilled model is not trained here. Set schedule=sana."
        )
    shift: dict[str, Any] = {} if file.flow_shift is None else {"flow_shift": file.flow_shift}
    return make_schedule(file.scheduler, file.num_steps, spacing=file.spacing, timestep_scale=config.timestep_scale, **shift)


def _unsaid(line: str) -> None:
    """Other processes' log."""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
