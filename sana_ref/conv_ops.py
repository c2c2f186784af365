"""What the convolution ops of the autoencoder mean, in plain PyTorch, and their registration, as sana_ref/ops.py does for others.

They are for engines, which keep pictures with the channels last: none is differentiable. On CUDA their kernels compute half
precision alone. In fp32, without tensor cores, a kernel adds up a sum's products one by one, and errs more than twice as much as
PyTorch, whose convolutions add parts of a sum: there too the truth runs.

Dimensions: B pictures, h x w pixels, C channels in, N out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_ref.gated_conv_ops import HALF

__all__ = [
    "ACTIVATIONS",
    "NORM_EPS",
    "conv3x3",
    "conv3x3_norm",
    "conv3x3_norm_truth",
    "conv3x3_truth",
    "conv3x3_upsample",
    "conv3x3_upsample_truth",
    "multiscale_projection",
    "multiscale_projection_truth",
]

NORM_EPS = 1e-5  # as sana_ref.layers.RMSNorm
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """(B, h, w, N), computed in `wide`."""
    with torch.autocast(x.device.type, enabled=False):  # it would compute in half precision
        first, weight = x.to(wide).permute(0, 3, 1, 2), weight.to(wide).permute(0, 3, 1, 2)
        return F.conv2d(first, weight, None if bias is None else bias.to(wide), padding=1).permute(0, 2, 3, 1)


def conv3x3_truth(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """y = activation(conv3x3(x) + bias), with zeros around the picture.

    x (B, h, w, C), weight (N, 3, 3, C): a Conv2d's, permuted (0, 2, 3, 1); bias (N,); y (B, h, w, N) in x's dtype, computed in
    fp32 or wider. activation: one of ACTIVATIONS.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return ACTIVATIONS[activation](_convolved(x, weight, bias, wide)).to(x.dtype).contiguous()


def conv3x3_norm_truth(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = NORM_EPS
) -> Tensor:
    """y = residual + RMSNorm(conv3x3(x)): the end of a residual block of the autoencoder.

    x and weight as in conv3x3_truth; residual (B, h, w, N), norm_weight and norm_bias (N,); y (B, h, w, N) in x's dtype. The norm,
    over N, is sana_ref.layers.RMSNorm's, but all is computed in fp32 or wider and rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    conv = _convolved(x, weight, None, wide)
    scale = torch.rsqrt(conv.square().mean(-1, keepdim=True) + eps)
    normed = conv * scale * norm_weight.to(wide) + norm_bias.to(wide)
    return (residual.to(wide) + normed).to(x.dtype).contiguous()


def conv3x3_upsample_truth(x: Tensor, weight: Tensor, bias: Tensor, repeats: int = 0, nearest: bool = False) -> Tensor:
    """y[2r + i, 2c + j, n] = conv3x3(x)[r, c, (i, j, n)] + bias[(i, j, n)] + x[r, c, (4n + 2i + j) // repeats]; i, j: 0 or 1.

    A pixel-shuffled convolution, and the shortcut of the autoencoder's UpBlock, which repeats channels; repeats 0: no shortcut.
    x (B, h, w, C), weight (4N, 3, 3, C) and bias (4N,), whose rows are ordered (i, j, n) where F.pixel_shuffle has (n, i, j);
    repeats otherwise 4N / C. y (B, 2h, 2w, N) in x's dtype, computed in fp32 or wider. nearest changes nothing: it says that of
    corner (i, j) only the taps (i, j) to (i + 1, j + 1) have weights that are not zero, so that the rest may be left out.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = _convolved(x, weight, bias, wide).unflatten(3, (2, 2, -1))  # (B, h, w, i, j, N)
    if repeats:
        y = y + x.to(wide).repeat_interleave(repeats, dim=3).unflatten(3, (-1, 2, 2)).permute(0, 1, 2, 4, 5, 3)
    batch, height, width, channels = *x.shape[:3], weight.shape[0] // 4
    return y.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels).to(x.dtype)


def multiscale_projection_truth(x: Tensor, near: Tensor, mix: Tensor) -> Tensor:
    """out = [x, mix(near(x))]: q, k and v for a multi-scale attention of one scale beside their own.

    x (B, h, w, C); near (25, C): a depth-wise Conv2d's weight (C, 1, 5, 5), flattened and transposed, with zeros around the
    picture; mix (C, D): of each channel out, what it takes of the D channels of its head. out (B, h, w, 2C) in x's dtype, computed
    in fp32 or wider. Source: EfficientViT, arXiv:2205.14756, section 3.1, as DC-AE has it (arXiv:2410.10733).
    """
    wide, channels = torch.promote_types(x.dtype, torch.float32), x.shape[3]
    with torch.autocast(x.device.type, enabled=False):
        first = x.to(wide).permute(0, 3, 1, 2)
        y = F.conv2d(first, near.to(wide).t().reshape(channels, 1, 5, 5), padding=2, groups=channels)
        y = F.conv2d(y, mix.to(wide)[..., None, None], groups=channels // mix.shape[1])
    return torch.cat([x, y.permute(0, 2, 3, 1).to(x.dtype)], dim=-1)


def _check(op: str, x: Tensor, weight: Tensor, **others: Tensor) -> None:
    """others: (N,), but `residual`, which is (B, h, w, N)."""
    named = {"x": x, "weight": weight} | others
    channels = weight.shape[0]
    fits = x.ndim == 4 and weight.shape == (channels, 3, 3, x.shape[-1])
    for name, tensor in others.items():
        fits = fits and tensor.shape == ((*x.shape[:3], channels) if name == "residual" else (channels,))
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in named.values())
        wanted = ", ".join("(B, h, w, N)" if name == "residual" else "(N,)" for name in others)
        raise ValueError(f"{op}: got {', '.join(named)} of shapes {shapes}; expected (B, h, w, C), (N, 3, 3, C), {wanted}")
    if any(t.dtype != x.dtype for t in named.values()) or not x.dtype.is_floating_point:
        dtypes = ", ".join(str(t.dtype) for t in named.values())
        raise ValueError(f"{op}: got {', '.join(named)} of dtypes {dtypes}; expected one floating dtype for all")


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> None:
    _check("conv3x3", x, weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv3x3: got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


@torch.library.custom_op("sana::conv3x3", mutates_args=())
def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    _check_conv(x, weight, bias, activation)
    return conv3x3_truth(x, weight, bias, activation)


@_conv3x3.register_kernel("cuda")
def _conv3x3_cuda(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    _check_conv(x, weight, bias, activation)
    if x.dtype not in HALF:
        return conv3x3_truth(x, weight, bias, activation)
    from plugins import conv3x3 as kernel  # Triton loads when a GPU first needs it

    y = x.new_empty((*x.shape[:3], weight.shape[0]))
    kernel.launch(x.contiguous(), weight.contiguous(), bias.contiguous(), y, activation)
    return y


@_conv3x3.register_fake
def _conv3x3_fake(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    return x.new_empty((*x.shape[:3], weight.shape[0]))


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """`conv3x3_truth` as the op `sana::conv3x3`, for engines: it is not differentiable.

    x (B, h, w, C), weight (N, 3, 3, C), bias (N,): one dtype of fp16, bf16, fp32, fp64, any strides. activation: "none", "relu" or
    "silu". Returns (B, h, w, N), contiguous, same dtype. Raises ValueError for other shapes, dtypes or activations.
    """
    y: Tensor = torch.ops.sana.conv3x3(x, weight, bias, activation)
    return y


@torch.library.custom_op("sana::conv3x3_norm", mutates_args=())
def _conv3x3_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = NORM_EPS
) -> Tensor:
    _check("conv3x3_norm", x, weight, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    return conv3x3_norm_truth(x, weight, residual, norm_weight, norm_bias, eps)


@_conv3x3_norm.register_kernel("cuda")
def _conv3x3_norm_cuda(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = NORM_EPS
) -> Tensor:
    _check("conv3x3_norm", x, weight, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    if x.dtype not in HALF:
        return conv3x3_norm_truth(x, weight, residual, norm_weight, norm_bias, eps)
    from plugins import conv3x3 as kernel

    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    inputs = [tensor.contiguous() for tensor in (x, weight, residual, norm_weight, norm_bias)]
    kernel.launch_norm(*inputs, y, eps)
    return y


@_conv3x3_norm.register_fake
def _conv3x3_norm_fake(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = NORM_EPS
) -> Tensor:
    return torch.empty_like(residual, memory_format=torch.contiguous_format)


def conv3x3_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float = NORM_EPS
) -> Tensor:
    """`conv3x3_norm_truth` as the op `sana::conv3x3_norm`, for engines: it is not differentiable.

    x (B, h, w, C), weight (N, 3, 3, C), residual (B, h, w, N), norm_weight and norm_bias (N,): one dtype of fp16, bf16, fp32, fp64,
    any strides. On CUDA in half precision N is at most plugins.conv3x3.MAX_NORM. Returns (B, h, w, N), contiguous, same dtype.
    Raises ValueError for other shapes or dtypes.
    """
    y: Tensor = torch.ops.sana.conv3x3_norm(x, weight, residual, norm_weight, norm_bias, eps)
    return y


def _check_upsample(x: Tensor, weight: Tensor, bias: Tensor, repeats: int) -> None:
    _check("conv3x3_upsample", x, weight, bias=bias)
    columns, channels = weight.shape[0], weight.shape[3]
    if columns % 4 or repeats < 0 or (repeats and repeats * channels != columns):
        raise ValueError(
            f"conv3x3_upsample: got a weight of {columns} rows for {channels} channels, {repeats} repeats; expected 4N rows, and "
            "0 repeats or 4N / channels"
        )


@torch.library.custom_op("sana::conv3x3_upsample", mutates_args=())
def _conv3x3_upsample(x: Tensor, weight: Tensor, bias: Tensor, repeats: int = 0, nearest: bool = False) -> Tensor:
    _check_upsample(x, weight, bias, repeats)
    return conv3x3_upsample_truth(x, weight, bias, repeats)


@_conv3x3_upsample.register_kernel("cuda")
def _conv3x3_upsample_cuda(x: Tensor, weight: Tensor, bias: Tensor, repeats: int = 0, nearest: bool = False) -> Tensor:
    _check_upsample(x, weight, bias, repeats)
    if x.dtype not in HALF:
        return conv3x3_upsample_truth(x, weight, bias, repeats)
    from plugins import conv3x3_upsample as kernel

    y = _conv3x3_upsample_fake(x, weight, bias, repeats)
    kernel.launch(x.contiguous(), weight.contiguous(), bias.contiguous(), y, repeats, nearest)
    return y


@_conv3x3_upsample.register_fake
def _conv3x3_upsample_fake(x: Tensor, weight: Tensor, bias: Tensor, repeats: int = 0, nearest: bool = False) -> Tensor:
    batch, height, width, _ = x.shape
    return x.new_empty((batch, 2 * height, 2 * width, weight.shape[0] // 4))


def conv3x3_upsample(x: Tensor, weight: Tensor, bias: Tensor, repeats: int = 0, nearest: bool = False) -> Tensor:
    """`conv3x3_upsample_truth` as the op `sana::conv3x3_upsample`, for engines: it is not differentiable.

    x (B, h, w, C), weight (4N, 3, 3, C), bias (4N,): one dtype of fp16, bf16, fp32, fp64, any strides. repeats: 0 or 4N / C.
    Returns (B, 2h, 2w, N), contiguous, same dtype. Raises ValueError for other shapes, dtypes or repeats.
    """
    y: Tensor = torch.ops.sana.conv3x3_upsample(x, weight, bias, repeats, nearest)
    return y


def _check_multiscale(x: Tensor, near: Tensor, mix: Tensor) -> None:
    shapes, dtypes = [tuple(t.shape) for t in (x, near, mix)], [t.dtype for t in (x, near, mix)]
    fits = [len(shape) for shape in shapes] == [4, 2, 2] and near.shape == (25, x.shape[3]) and mix.shape[0] == x.shape[3]
    if not fits or x.shape[3] % mix.shape[1]:
        raise ValueError(
            f"multiscale_projection: got x, near, mix of shapes {', '.join(map(str, shapes))}; expected (B, h, w, C), (25, C), "
            "(C, D) of a D that divides C"
        )
    if len(set(dtypes)) > 1 or not x.dtype.is_floating_point:
        raise ValueError(
            f"multiscale_projection: got x, near, mix of dtypes {', '.join(map(str, dtypes))}; expected one floating dtype for all"
        )


@torch.library.custom_op("sana::multiscale_projection", mutates_args=())
def _multiscale_projection(x: Tensor, near: Tensor, mix: Tensor) -> Tensor:
    _check_multiscale(x, near, mix)
    return multiscale_projection_truth(x, near, mix)


@_multiscale_projection.register_kernel("cuda")
def _multiscale_projection_cuda(x: Tensor, near: Tensor, mix: Tensor) -> Tensor:
    _check_multiscale(x, near, mix)
    if x.dtype not in HALF:
        return multiscale_projection_truth(x, near, mix)
    from plugins import multiscale_projection as kernel

    out = _multiscale_projection_fake(x, near, mix)
    kernel.launch(x.contiguous(), near.contiguous(), mix.contiguous(), out)
    return out


@_multiscale_projection.register_fake
def _multiscale_projection_fake(x: Tensor, near: Tensor, mix: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], 2 * x.shape[3]))


def multiscale_projection(x: Tensor, near: Tensor, mix: Tensor) -> Tensor:
    """`multiscale_projection_truth` as the op `sana::multiscale_projection`, for engines: it is not differentiable.

    x (B, h, w, C), near (25, C), mix (C, D): one dtype of fp16, bf16, fp32, fp64, any strides. On CUDA in half precision D is one
    of plugins.multiscale_projection.HEAD_DIMS. Returns (B, h, w, 2C), contiguous, same dtype. Raises ValueError for other shapes or
    dtypes.
    """
    out: Tensor = torch.ops.sana.multiscale_projection(x, near, mix)
    return out
