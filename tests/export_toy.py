"""A module of a few thousand weights with everything that makes an export hard: the custom op, free sizes, attention, a table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.onnx_export import Axis, ExportSpec, TensorSpec
from sana_ref import ops

CHANNELS, WIDTH, LENGTH, TEXT = 4, 64, 20, 16
LATENTS = ("batch", CHANNELS, "height", "width")
SPEC = ExportSpec(
    axes=(Axis(name="batch", example=3), Axis(name="height", example=4), Axis(name="width", example=6)),
    inputs=(
        TensorSpec(name="x", dims=LATENTS),
        TensorSpec(name="ids", dims=("batch", LENGTH), dtype="int64"),
        TensorSpec(name="mask", dims=("batch", LENGTH)),
    ),
    outputs=(TensorSpec(name="y", dims=LATENTS),),
    plugins={"ReluLinearAttention": 1},
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(CHANNELS, WIDTH, 1)
        self.words = nn.Embedding(50, TEXT)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.text = nn.Linear(TEXT, WIDTH)
        self.depth = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.table = nn.Parameter(torch.randn(2, WIDTH))
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, 32)).transpose(1, 2)

        dtype = self.out.weight.dtype
        height, width = x.shape[-2:]
        h = self.into(x.to(dtype)).flatten(2).transpose(1, 2)
        h = F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + self.table[0]) + self.table[1]
        a = ops.relu_linear_attention(heads(self.q(h)), heads(self.k(h)), heads(self.v(h)))
        h = h + a.transpose(1, 2).flatten(2)
        text = self.text(self.words(ids))
        bias = ((1 - mask) * -10000.0).to(dtype)[:, None, None]
        a = F.scaled_dot_product_attention(heads(h), heads(text), heads(text), attn_mask=bias)
        picture = (h + a.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (height, width))
        picture = picture + F.silu(self.depth(picture))
        return self.out(picture.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (height, width)).float()


def inputs(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, LENGTH)
    mask[:, LENGTH // 2 :] = 0
    x = torch.randn(batch, CHANNELS, height, width, generator=generator)
    return x, torch.randint(0, 50, (batch, LENGTH), generator=generator), mask
