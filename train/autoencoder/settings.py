"""The schema of an autoencoder's experiment: what configs/train_autoencoder.yaml, its groups and an experiment on top may say.

A phase of DC-AE's training (arXiv:2410.10733, section 3.3) is a run of its own, which starts from the folder that the former one
exported: all of it at low resolution with reconstruction and perceptual losses; `middle` at high resolution; `head` at low
resolution with the adversarial loss. Nothing here imports PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.data.settings import MAX_PIXELS
from train.schema import EnvironmentSettings, ParallelSettings
from train.trainer.settings import TrainerSettings

__all__ = [
    "AdversarialSettings",
    "ArchitectureSettings",
    "AutoencoderExperiment",
    "AutoencoderSettings",
    "FileSettings",
    "LossSettings",
    "SceneSettings",
    "ValidationSettings",
]

PX_PER_LATENT = 32
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Block = Literal["ResBlock", "EfficientViTBlock"]
Activation = Literal["silu", "relu"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArchitectureSettings(_Section):
    """An autoencoder of one's own: the fields and defaults of sana_ref.autoencoder.AutoencoderDCConfig, which checks them; without
    scaling_factor, which is measured at the end."""

    in_channels: Count = 3
    latent_channels: Count = 32
    attention_head_dim: Count = 32
    encoder_block_types: Block | tuple[Block, ...] = "ResBlock"
    decoder_block_types: Block | tuple[Block, ...] = "ResBlock"
    encoder_block_out_channels: tuple[Count, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[Count, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    downsample_block_type: Literal["pixel_unshuffle", "conv"] = "pixel_unshuffle"
    decoder_norm_types: Literal["rms_norm"] | tuple[Literal["rms_norm"], ...] = "rms_norm"
    decoder_act_fns: Activation | tuple[Activation, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: Activation = "relu"


class AutoencoderSettings(_Section):
    """What is trained: a published architecture by its name, or one's own; and which part of it.

    train: `all`; `decoder`, on the latents of a frozen encoder; `middle`, the encoder's last stage and the decoder's first; `head`,
    the decoder's finest stages. Folders are vae folders in diffusers' layout.
    """

    variant: Literal["dc_ae", "dc_ae_lite"] | None = None
    architecture: ArchitectureSettings | None = None
    checkpoint: Path | None = None  # to start from, encoder and decoder; None: new weights
    encoder_from: Path | None = None  # the encoder alone, of another autoencoder; for train: decoder
    train: Literal["all", "decoder", "middle", "head"] = "all"
    head_stages: Count = 1  # how many of the decoder's stages that have layers are its head

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.variant is None) == (self.architecture is None):
            what = "neither" if self.variant is None else "both"
            raise ValueError(f"got {what} of variant and architecture; expected one of them. Set the other to null")
        if self.encoder_from is not None and self.train != "decoder":
            raise ValueError(f"got encoder_from with train: {self.train}; expected train: decoder, which freezes that encoder")
        if self.train in ("middle", "head") and self.checkpoint is None:
            raise ValueError(f"got train: {self.train} without a checkpoint; expected the folder that the phase before exported")
        if self.train == "decoder" and self.checkpoint is None and self.encoder_from is None:
            raise ValueError("got train: decoder without checkpoint and encoder_from; expected a trained encoder by one of them")
        return self


class FileSettings(_Section):
    """Random square crops of pictures in files."""

    kind: Literal["files"]
    path: Path  # a folder of pictures at any depth; or shards with pictures and captions, as train.data reads them
    side: int = Field(256, ge=PX_PER_LATENT, multiple_of=PX_PER_LATENT)  # px
    max_shrink: float = Field(1.0, ge=1, allow_inf_nan=False)  # a crop has 1 to so many times `side` px, and is then resized
    max_broken_share: float = Field(0.01, ge=0, le=1)  # of the samples; more of them broken stops the run
    max_pixels: int = Field(8192 * 8192, ge=1024, le=MAX_PIXELS)  # of a picture as stored
    seed: int = Field(0, ge=0, lt=2**62)


class SceneSettings(_Section):
    """Scenes composed of sprites, on the device."""

    kind: Literal["scenes"]
    path: Path  # sprites.safetensors, of train.tiny.prepare_sprites
    sizes: Annotated[tuple[tuple[int, int], ...], Field(min_length=1)]  # width, height in px
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]  # how often each size
    num_scenes: Count = 65_536  # of each size; drawn once
    seed: int = Field(0, ge=0, lt=2**62)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.sizes) != len(self.weights):
            raise ValueError(f"got {len(self.sizes)} sizes and {len(self.weights)} weights; expected one weight for each size")
        if wrong := [size for size in self.sizes if min(size) < PX_PER_LATENT or any(side % PX_PER_LATENT for side in size)]:
            raise ValueError(f"got the size {list(wrong[0])}; expected multiples of {PX_PER_LATENT} px, width and height")
        return self


class PerceptualSettings(_Section):
    """lpips: VGG's features as torchmetrics weights them; recogniser: those of a folder of train.tiny.recogniser."""

    kind: Literal["lpips", "recogniser"]
    path: Path | None = None  # the recogniser's folder

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.kind == "recogniser") != (self.path is not None):
            expected = "its folder as path" if self.kind == "recogniser" else "no path"
            raise ValueError(f"got kind: {self.kind} and path: {self.path}; expected {expected}")
        return self


class AdversarialSettings(_Section):
    """A discriminator of patches (arXiv:1611.07004) with the hinge loss."""

    weight: Weight = 0.0  # of the generator's part; 0: there is no discriminator
    start: int = Field(0, ge=0)  # the first step at which both losses count
    width: int = Field(64, ge=8, multiple_of=8)  # channels of its first layer
    num_layers: Count = 3  # that halve the sides


class LossSettings(_Section):
    """Weights of the losses; those of `edges` to `decorrelate` are what sana-tiny's autoencoder was trained with."""

    l1: Weight = 1.0
    edges: Weight = 0.5  # L1 of differences of neighbouring pixels
    coarse: Weight = 0.25  # L1 of halved and quartered pictures, each
    perceptual: Weight = 0.0
    perceptual_network: PerceptualSettings | None = None
    adversarial: AdversarialSettings = AdversarialSettings()
    spread: Weight = 0.02  # of latents that have not mean 0 and deviation 1, by channel
    decorrelate: Weight = 0.02  # of channels that say the same
    noise: Weight = 0.15  # largest standard deviation of noise on latents of unit variance; half of the pictures get some

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.perceptual > 0 and self.perceptual_network is None:
            raise ValueError(f"got perceptual: {self.perceptual} without a perceptual_network; expected lpips or recogniser")
        return self


class ValidationSettings(_Section):
    """The pictures' PSNR, logged while training, with the averaged weights if there is an average."""

    every: Count = 1000  # steps
    num_pictures: Count = 64


class AutoencoderExperiment(_Section):
    """All of it."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")  # also of the run's folder in env.out
    autoencoder: AutoencoderSettings
    pictures: FileSettings | SceneSettings = Field(discriminator="kind")
    objective: LossSettings
    parallel: ParallelSettings
    trainer: TrainerSettings
    validation: ValidationSettings
    env: EnvironmentSettings

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.parallel.strategy == "fsdp2":
            raise ValueError("parallel.strategy: got fsdp2; expected single or ddp: an autoencoder fits on a GPU whole")
        return self
