"""The middle of the mix-FFN: what it means, in plain PyTorch, and its registration as an op. As sana_ref/ops.py has it for others.

Dimensions: B pictures, H x W pixels, E channels of a half.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_ref.ops import without_autocast

__all__ = ["HALF", "gated_depthwise_conv", "gated_depthwise_conv_truth"]

# What the convolution's kernels are for: their exponentials are not fp32's to the last place.
HALF = (torch.float16, torch.bfloat16)


def gated_depthwise_conv_truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y = a silu(g), where [a, g] = depthwise3x3(silu(x)) + bias, with zeros around the picture.

    x (B, H, W, 2E), weight (3, 3, 2E), bias (2E,); y (B, H, W, E) in x's dtype, computed in fp32 or wider.
    Source: Sana, arXiv:2410.10629, section 2.2: the mix-FFN between its 1x1 convolutions.
    """
    with without_autocast(x.device):
        wide = torch.promote_types(x.dtype, torch.float32)
        _, conv = _convolved(x.to(wide), weight.to(wide), bias.to(wide))
        a, g = conv.chunk(2, dim=1)
        return (a * F.silu(g)).permute(0, 2, 3, 1).to(x.dtype).contiguous()


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(silu(x), its convolution), both (B, 2E, H, W)."""
    activated = F.silu(x).permute(0, 3, 1, 2)
    return activated, F.conv2d(activated, _filters(weight), bias, padding=1, groups=weight.shape[2])


def _filters(weight: Tensor) -> Tensor:
    """As PyTorch's convolutions have them, (2E, 1, 3, 3)."""
    return weight.permute(2, 0, 1)[:, None]


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def _conv_gradients(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vector-Jacobian product of the truth, in fp32 or wider. The convolution is computed again rather than kept."""
    with without_autocast(x.device):
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide, weight_wide, dy_wide = x.to(wide), weight.to(wide), dy.to(wide).permute(0, 3, 1, 2)
        activated, conv = _convolved(x_wide, weight_wide, bias.to(wide))
        a, g = conv.chunk(2, dim=1)
        dconv = torch.cat([dy_wide * F.silu(g), dy_wide * a * _silu_slope(g)], dim=1)
        one, channels = [1, 1], weight.shape[2]
        d_activated, d_weight, d_bias = torch.ops.aten.convolution_backward(
            dconv, activated, _filters(weight_wide), [channels], one, one, one, False, [0, 0], channels, [True, True, True]
        )
        dx = d_activated.permute(0, 2, 3, 1) * _silu_slope(x_wide)
        d_weight = d_weight[:, 0].permute(1, 2, 0)
        return dx.to(x.dtype).contiguous(), d_weight.to(weight.dtype).contiguous(), d_bias.to(bias.dtype)


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    channels = x.shape[-1]
    if x.ndim != 4 or channels % 2 or weight.shape != (3, 3, channels) or bias.shape != (channels,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(f"gated_depthwise_conv: got x, weight, bias of shapes {shapes}; expected (B, H, W, 2E), (3, 3, 2E), (2E,)")
    if not all(t.dtype.is_floating_point for t in (x, weight, bias)):
        raise ValueError(f"gated_depthwise_conv: got dtypes {x.dtype}, {weight.dtype}, {bias.dtype}; expected floating ones")


@torch.library.custom_op("sana::gated_depthwise_conv", mutates_args=())
def _gated_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_conv(x, weight, bias)
    return gated_depthwise_conv_truth(x, weight, bias)


@_gated_depthwise_conv.register_kernel("cuda")
def _gated_depthwise_conv_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_conv(x, weight, bias)
    if x.dtype not in HALF:
        return gated_depthwise_conv_truth(x, weight, bias)
    from plugins import gated_depthwise_conv as kernel  # Triton loads when a GPU first needs it

    y = x.new_empty((*x.shape[:3], x.shape[3] // 2))
    kernel.launch(x.contiguous(), weight, bias, y)
    return y


@_gated_depthwise_conv.register_fake
def _gated_depthwise_conv_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[3] // 2))


@torch.library.custom_op("sana::gated_depthwise_conv_backward", mutates_args=())
def _gated_depthwise_conv_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _conv_gradients(dy, x, weight, bias)


@_gated_depthwise_conv_backward.register_kernel("cuda")
def _gated_depthwise_conv_backward_cuda(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype not in HALF:
        return _conv_gradients(dy, x, weight, bias)
    from plugins import gated_depthwise_conv_backward as kernels

    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *kernels.launch(dy.contiguous(), x.contiguous(), weight, bias, dx)


@_gated_depthwise_conv_backward.register_fake
def _gated_depthwise_conv_backward_fake(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(x, memory_format=contiguous),
        torch.empty_like(weight, memory_format=contiguous),
        torch.empty_like(bias, memory_format=contiguous),
    )


def _keep_conv_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.sana.gated_depthwise_conv_backward(dy, *ctx.saved_tensors)
    return gradients


_gated_depthwise_conv.register_autograd(_conv_backward, setup_context=_keep_conv_inputs)


def gated_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gated_depthwise_conv_truth` as the op `sana::gated_depthwise_conv`, which trains and is fast on a GPU.

    x: (B, H, W, 2E) of fp16, bf16, fp32 or fp64, any strides; weight (3, 3, 2E) and bias (2E,) of any floating dtype: autocast
    leaves them as they are. Returns (B, H, W, E), contiguous, in x's dtype. Differentiable once; gradients come in the inputs'
    dtypes. Raises ValueError for other shapes.
    """
    y: Tensor = torch.ops.sana.gated_depthwise_conv(x, weight, bias)
    return y
