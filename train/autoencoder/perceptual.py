"""Distances of pictures as a network sees them, with gradients for the first picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from train.autoencoder.settings import PerceptualSettings
from train.trainer.errors import TrainingError

__all__ = ["make_perceptual"]

EPS = 1e-6


def make_perceptual(settings: PerceptualSettings, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """distance(got, wanted): a scalar in fp32, of pictures (B, 3, H, W), -1 to 1. Raises TrainingError if it cannot be had."""
    return _lpips(device) if settings.kind == "lpips" else _recogniser(settings, device)


def _lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (arXiv:1801.03924) with VGG-16, as torchmetrics has it; torch hub's cache holds VGG's weights, or they are loaded."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        net = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.to(device).eval().requires_grad_(False)
    except (ImportError, OSError) as error:  # URLError is an OSError
        raise TrainingError(
            f"perceptual_network: got lpips, and VGG cannot be had ({(str(error).splitlines() or [type(error).__name__])[0]}). "
            f"Run pip install torchvision, and put vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints or allow the network; "
            "or set perceptual_network.kind=recogniser, or objective.perceptual=0."
        ) from None

    def distance(got: Tensor, wanted: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            found: Tensor = net(got.float(), wanted.float()).mean()
        return found

    return distance


def _recogniser(settings: PerceptualSettings, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared difference of the features of every stage, in units of each channel's deviation in the wanted pictures."""
    from train.tiny.recogniser import load

    assert settings.path is not None
    try:
        network = load(settings.path)[0].to(device)
    except (OSError, KeyError, ValueError) as error:
        raise TrainingError(
            f"perceptual_network.path: got {settings.path}, which cannot be loaded ({error}); expected the folder of a trained "
            "recogniser, with config.json and model.safetensors."
        ) from None

    def features(pictures: Tensor) -> list[Tensor]:
        x = network.stem(pictures)  # at the pictures' own size: detail is what the distance is for
        found = []
        for stage in network.stages:
            x = stage(x)
            found.append(x)
        return found

    def distance(got: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            aims = features(wanted)
        total = torch.zeros((), device=wanted.device)
        for feature, aim in zip(features(got), aims, strict=True):
            deviation = aim.float().std(dim=(0, 2, 3), keepdim=True) + EPS
            total = total + F.mse_loss(feature.float() / deviation, aim.float() / deviation)
        return total / len(aims)

    return distance
