"""Judges patches of pictures. Source: pix2pix, arXiv:1611.07004, section 3.2.2 and appendix 6.1.2; hinge loss: arXiv:1705.02894."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PatchDiscriminator", "discriminator_loss", "generator_loss"]

MOST_WIDER = 8  # channels of a layer, in those of the first
CHANNELS_PER_GROUP = 8


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, H, W), -1 to 1, to scores (B, 1, h, w), one a patch: high for real ones. h, w: about H, W / 2^num_layers.

    GroupNorm in place of the paper's BatchNorm: a picture's score is then not a function of its neighbours in the batch, nor of how
    many processes share it.
    """

    def __init__(self, *, width: int, num_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        now = width
        for index in range(1, num_layers + 1):
            before, now = now, width * min(2**index, MOST_WIDER)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(before, now, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(now // CHANNELS_PER_GROUP, now),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(now, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for part in self.modules():  # of the paper
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        scores: Tensor = self.layers(pictures)
        return scores


def generator_loss(scores_of_made: Tensor) -> Tensor:
    """Low where the discriminator takes what was made for real; fp32."""
    return -scores_of_made.float().mean()


def discriminator_loss(scores_of_real: Tensor, scores_of_made: Tensor) -> Tensor:
    """The hinge loss: zero once real pictures score above 1 and made ones below -1; fp32."""
    return (F.relu(1 - scores_of_real.float()).mean() + F.relu(1 + scores_of_made.float()).mean()) / 2
