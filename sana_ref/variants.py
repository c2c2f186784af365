"""The published image models, as data. A new size is a new entry here and nowhere else.

`repository` is the diffusers-format folder on the Hugging Face Hub; fine-tunes of the same architecture load with the same entry.
Sources: each repository's config.json; arXiv:2410.10629 (Sana), 2501.18427 (1.5), 2503.09641 (Sprint), 2410.10733 (DC-AE).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sana_ref.autoencoder import AutoencoderDCConfig
from sana_ref.text_encoder import Gemma2Config
from sana_ref.transformer import SanaTransformerConfig

__all__ = ["DC_AE", "DC_AE_LITE", "GEMMA_2_2B", "VARIANTS", "Variant", "variant_of"]

PX_PER_LATENT = 32
_CONV_STAGES = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock")

DC_AE = AutoencoderDCConfig(  # sana-1.0 and sana-1.1
    encoder_block_types=_CONV_STAGES,
    decoder_block_types=_CONV_STAGES,
    downsample_block_type="conv",
    upsample_block_type="interpolate",
    scaling_factor=0.41407,
)
DC_AE_LITE = replace(  # the same encoder; a decoder without attention and without layers at full resolution, 1.8 times as fast
    DC_AE,
    decoder_block_types="ResBlock",
    decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
)
GEMMA_2_2B = Gemma2Config()


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A published model: where it is, its networks, and how it samples unless told otherwise."""

    repository: str
    transformer: SanaTransformerConfig
    num_parameters: int  # of the transformer
    weights: Literal["fp16", "bf16"]  # precision of the published weights
    flow_shift: float | None = 3.0  # None: no flow sampler (Sprint)
    num_steps: int = 20
    guidance_scale: float = 4.5

    @property
    def side(self) -> int:
        """Side in px of the square picture that the model was trained for."""
        return self.transformer.sample_size * PX_PER_LATENT


SANA_600M = SanaTransformerConfig(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
SANA_1600M = SanaTransformerConfig()
SANA_1_5_1600M = replace(SANA_1600M, qk_norm="rms_norm_across_heads")
SANA_1_5_4800M = replace(SANA_1_5_1600M, num_layers=60)
SPRINT_600M = replace(SANA_600M, qk_norm="rms_norm_across_heads", guidance_embeds=True)
SPRINT_1600M = replace(SANA_1_5_1600M, guidance_embeds=True)

_ORGANISATION = "Efficient-Large-Model"

VARIANTS: dict[str, Variant] = {
    "sana_600m_512px": Variant(
        repository=f"{_ORGANISATION}/Sana_600M_512px_diffusers",
        transformer=replace(SANA_600M, sample_size=16),
        num_parameters=591_747_872,
        weights="fp16",
    ),
    "sana_600m_1024px": Variant(
        repository=f"{_ORGANISATION}/Sana_600M_1024px_diffusers",
        transformer=SANA_600M,
        num_parameters=591_747_872,
        weights="fp16",
    ),
    "sana_1600m_512px": Variant(
        repository=f"{_ORGANISATION}/Sana_1600M_512px_diffusers",
        transformer=replace(SANA_1600M, sample_size=16),
        num_parameters=1_604_462_752,
        weights="fp16",
    ),
    "sana_1600m_1024px": Variant(
        repository=f"{_ORGANISATION}/Sana_1600M_1024px_BF16_diffusers",
        transformer=SANA_1600M,
        num_parameters=1_604_462_752,
        weights="bf16",
    ),
    "sana_1600m_2kpx": Variant(
        repository=f"{_ORGANISATION}/Sana_1600M_2Kpx_BF16_diffusers",
        transformer=replace(SANA_1600M, sample_size=64, interpolation_scale=1.0),
        num_parameters=1_604_462_752,
        weights="bf16",
    ),
    "sana_1600m_4kpx": Variant(
        repository=f"{_ORGANISATION}/Sana_1600M_4Kpx_BF16_diffusers",
        transformer=replace(SANA_1600M, sample_size=128, interpolation_scale=2.0),
        num_parameters=1_604_462_752,
        weights="bf16",
        flow_shift=6.0,
    ),
    "sana_1_5_1600m_1024px": Variant(
        repository=f"{_ORGANISATION}/SANA1.5_1.6B_1024px_diffusers",
        transformer=SANA_1_5_1600M,
        num_parameters=1_604_641_952,
        weights="bf16",
    ),
    "sana_1_5_4800m_1024px": Variant(
        repository=f"{_ORGANISATION}/SANA1.5_4.8B_1024px_diffusers",
        transformer=SANA_1_5_4800M,
        num_parameters=4_721_825_952,
        weights="bf16",
    ),
    "sprint_600m_1024px": Variant(
        repository=f"{_ORGANISATION}/Sana_Sprint_0.6B_1024px_diffusers",
        transformer=SPRINT_600M,
        num_parameters=593_501_216,
        weights="bf16",
        flow_shift=None,
        num_steps=2,
    ),
    "sprint_1600m_1024px": Variant(
        repository=f"{_ORGANISATION}/Sana_Sprint_1.6B_1024px_diffusers",
        transformer=SPRINT_1600M,
        num_parameters=1_610_237_472,
        weights="bf16",
        flow_shift=None,
        num_steps=2,
    ),
}


def variant_of(config: SanaTransformerConfig) -> str | None:
    """Name of the published variant with this transformer, or None: a model of one's own."""
    return next((name for name, variant in VARIANTS.items() if variant.transformer == config), None)
