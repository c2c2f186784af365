"""What the ops at the end of the autoencoder's decoder mean, and their registration, as sana_ref/conv_ops.py does for its others.

Dimensions: B pictures, h x w pixels, C channels in, N out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_ref.conv_ops import NORM_EPS
from sana_ref.gated_conv_ops import HALF

__all__ = ["normed_taps", "normed_taps_truth", "tap_sum", "tap_sum_truth"]


def normed_taps_truth(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float = NORM_EPS) -> Tensor:
    """taps = relu(RMSNorm(x)) weight: what each pixel gives to the nine around it, if a convolution follows.

    x (B, h, w, C); norm_weight, norm_bias (C,), of sana_ref.layers.RMSNorm; weight (C, 9 N): a Conv2d's, permuted (1, 0, 2, 3) and
    flattened. taps (B, 9 N, h, w), computed in fp32 or wider, and not rounded.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    first = x.to(wide)
    scale = torch.rsqrt(first.square().mean(-1, keepdim=True) + eps)
    normed = F.relu(first * scale * norm_weight.to(wide) + norm_bias.to(wide))
    with torch.autocast(x.device.type, enabled=False):
        return (normed @ weight.to(wide)).permute(0, 3, 1, 2).contiguous()


def tap_sum_truth(taps: Tensor, bias: Tensor) -> Tensor:
    """y[r, c, n] = the sum over taps (i, j) of taps[9 n + 3 i + j, r + i - 1, c + j - 1], zero outside, + bias[n].

    Behind `normed_taps_truth` that is conv3x3(relu(RMSNorm(x))) + bias. taps (B, 9 N, h, w) fp32 or wider, bias (N,); y
    (B, h, w, N) in bias' dtype, computed in taps'.
    """
    own = torch.eye(9, dtype=taps.dtype, device=taps.device).view(1, 9, 3, 3).expand(len(bias), -1, -1, -1)
    y = F.conv2d(taps, own, bias.to(taps.dtype), padding=1, groups=len(bias))
    return y.permute(0, 2, 3, 1).to(bias.dtype).contiguous()


def _check_taps(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> None:
    given = (x, norm_weight, norm_bias, weight)
    fits = x.ndim == 4 and norm_weight.shape == norm_bias.shape == x.shape[3:] and weight.ndim == 2
    if not fits or weight.shape[0] != x.shape[3] or weight.shape[1] % 9:
        raise ValueError(
            f"normed_taps: got x, norm_weight, norm_bias, weight of shapes {', '.join(str(tuple(t.shape)) for t in given)}; "
            "expected (B, h, w, C), twice (C,), (C, 9 N)"
        )
    if len({t.dtype for t in given}) > 1 or not x.dtype.is_floating_point:
        raise ValueError(f"normed_taps: got dtypes {', '.join(str(t.dtype) for t in given)}; expected one floating dtype for all")


@torch.library.custom_op("sana::normed_taps", mutates_args=())
def _normed_taps(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float = NORM_EPS) -> Tensor:
    _check_taps(x, norm_weight, norm_bias, weight)
    return normed_taps_truth(x, norm_weight, norm_bias, weight, eps)


@_normed_taps.register_kernel("cuda")
def _normed_taps_cuda(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float = NORM_EPS) -> Tensor:
    _check_taps(x, norm_weight, norm_bias, weight)
    if x.dtype not in HALF:
        return normed_taps_truth(x, norm_weight, norm_bias, weight, eps)
    from plugins import conv_taps as kernel

    taps = _normed_taps_fake(x, norm_weight, norm_bias, weight, eps)
    kernel.launch(x.contiguous(), norm_weight.contiguous(), norm_bias.contiguous(), weight.contiguous(), taps, eps)
    return taps


@_normed_taps.register_fake
def _normed_taps_fake(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float = NORM_EPS) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[0], weight.shape[1], *x.shape[1:3]), dtype=wide)


def normed_taps(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float = NORM_EPS) -> Tensor:
    """`normed_taps_truth` as the op `sana::normed_taps`, for engines: it is not differentiable.

    x (B, h, w, C), norm_weight and norm_bias (C,), weight (C, 9 N): one dtype of fp16, bf16, fp32, fp64, any strides; on CUDA in
    half precision C and N as in plugins.conv_taps.check_sizes. Returns (B, 9 N, h, w), contiguous, fp32 or wider. Raises ValueError
    for other shapes or dtypes.
    """
    taps: Tensor = torch.ops.sana.normed_taps(x, norm_weight, norm_bias, weight, eps)
    return taps


def _check_sum(taps: Tensor, bias: Tensor) -> None:
    if taps.ndim != 4 or bias.ndim != 1 or taps.shape[1] != 9 * len(bias):
        raise ValueError(
            f"tap_sum: got taps, bias of shapes {tuple(taps.shape)}, {tuple(bias.shape)}; expected (B, 9 N, h, w), (N,)"
        )
    if taps.dtype != torch.promote_types(bias.dtype, torch.float32):
        raise ValueError(f"tap_sum: got taps, bias of dtypes {taps.dtype}, {bias.dtype}; expected fp32, or fp64 beside fp64")


@torch.library.custom_op("sana::tap_sum", mutates_args=())
def _tap_sum(taps: Tensor, bias: Tensor) -> Tensor:
    _check_sum(taps, bias)
    return tap_sum_truth(taps, bias)


@_tap_sum.register_kernel("cuda")
def _tap_sum_cuda(taps: Tensor, bias: Tensor) -> Tensor:
    _check_sum(taps, bias)
    if bias.dtype not in HALF:
        return tap_sum_truth(taps, bias)
    from plugins import conv_taps as kernel

    y = _tap_sum_fake(taps, bias)
    kernel.launch_sum(taps.contiguous(), bias.contiguous(), y)
    return y


@_tap_sum.register_fake
def _tap_sum_fake(taps: Tensor, bias: Tensor) -> Tensor:
    return bias.new_empty((taps.shape[0], *taps.shape[2:], len(bias)))


def tap_sum(taps: Tensor, bias: Tensor) -> Tensor:
    """`tap_sum_truth` as the op `sana::tap_sum`, for engines: it is not differentiable.

    taps (B, 9 N, h, w) in fp32 and bias (N,) in half precision or fp32, or both in fp64; any strides. Returns (B, h, w, N),
    contiguous, in bias' dtype. Raises ValueError for other shapes or dtypes.
    """
    y: Tensor = torch.ops.sana.tap_sum(taps, bias)
    return y
