"""RMSNorm over the last axis as one kernel each way, for training on a GPU.

The reference norm is a chain of elementwise operators, each of which reads and writes the whole tensor, some in fp32. On the
autoencoder's finest maps that chain takes longer than the convolutions between it. Forward and backward here read their inputs
once. Same mathematics as `sana_ref.layers.RMSNorm`, all of it in fp32; judged against it in tests/train/test_fast_norm.py.

Dimensions: R rows (pixels or tokens), C channels, P programs.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sana_ref.layers import RMSNorm

MAX_PROGRAMS = 528  # 4 for each of an H100's 132 multiprocessors; bounds the partial sums of the weight's gradient


@triton.jit
def _forward(
    x,
    weight,
    bias,
    y,
    inverse,
    num_rows,
    EPS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    live_C = columns < C
    live = (rows < num_rows)[:, None] & live_C[None, :]
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    x_RC = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    inverse_R = 1.0 / tl.sqrt(tl.sum(x_RC * x_RC, axis=1) / C + EPS)
    y_RC = x_RC * inverse_R[:, None] * tl.load(weight + columns, mask=live_C, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y_RC += tl.load(bias + columns, mask=live_C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, y_RC.to(y.dtype.element_ty), mask=live)
    tl.store(inverse + rows, inverse_R, mask=rows < num_rows)


@triton.jit
def _backward(dy, x, weight, inverse, dx, dweight, dbias, num_rows, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    columns = tl.arange(0, BLOCK_C)
    live_C = columns < C
    weight_C = tl.load(weight + columns, mask=live_C, other=0.0).to(tl.float32)
    dweight_C = tl.zeros((BLOCK_C,), tl.float32)
    dbias_C = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        live = (rows < num_rows)[:, None] & live_C[None, :]
        at = rows.to(tl.int64)[:, None] * C + columns[None, :]
        dy_RC = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        inverse_R = tl.load(inverse + rows, mask=rows < num_rows, other=0.0)
        unit_RC = tl.load(x + at, mask=live, other=0.0).to(tl.float32) * inverse_R[:, None]
        g_RC = dy_RC * weight_C[None, :]
        along_R = tl.sum(g_RC * unit_RC, axis=1) / C
        dx_RC = (g_RC - unit_RC * along_R[:, None]) * inverse_R[:, None]
        tl.store(dx + at, dx_RC.to(dx.dtype.element_ty), mask=live)
        dweight_C += tl.sum(dy_RC * unit_RC, axis=0)
        dbias_C += tl.sum(dy_RC, axis=0)
    tl.store(dweight + tl.program_id(0) * C + columns, dweight_C, mask=live_C)
    tl.store(dbias + tl.program_id(0) * C + columns, dbias_C, mask=live_C)


def _blocks(num_channels: int) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_R): a program holds about 4096 numbers."""
    block_c = triton.next_power_of_2(num_channels)
    return block_c, max(1, 4096 // block_c)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        channels = x.shape[-1]
        x = x.contiguous()
        num_rows = x.numel() // channels
        y = torch.empty_like(x)
        inverse = torch.empty(num_rows, device=x.device, dtype=torch.float32)
        block_c, block_r = _blocks(channels)
        _forward[(triton.cdiv(num_rows, block_r),)](
            x, weight, weight if bias is None else bias, y, inverse, num_rows, eps, channels, block_c, block_r, bias is not None
        )
        ctx.save_for_backward(x, weight, inverse)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        channels = x.shape[-1]
        num_rows = x.numel() // channels
        block_c, block_r = _blocks(channels)
        programs = min(MAX_PROGRAMS, triton.cdiv(num_rows, block_r))
        dx = torch.empty_like(x)
        partial = torch.empty(2, programs, channels, device=x.device, dtype=torch.float32)
        _backward[(programs,)](
            dy.contiguous(), x, weight, inverse, dx, partial[0], partial[1], num_rows, channels, block_c, block_r
        )
        dweight, dbias = partial.sum(1).to(weight.dtype).unbind(0)
        return dx, dweight, dbias if ctx.has_bias else None, None


def _fast(self: RMSNorm, x: Tensor) -> Tensor:
    if self.axis == -1:
        return _RMSNorm.apply(x, self.weight, self.bias, self.eps)
    return _RMSNorm.apply(x.movedim(self.axis, -1), self.weight, self.bias, self.eps).movedim(-1, self.axis)


def install(module: nn.Module) -> None:
    """Let every RMSNorm of `module` run the kernels."""
    for part in module.modules():
        if isinstance(part, RMSNorm):
            part.forward = types.MethodType(_fast, part)  # type: ignore[method-assign]
