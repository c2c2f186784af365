"""What softmax attention means as custom ops, and their registration; as sana_ref/ops.py does for the other ops.

Dimensions of attention to a text: k texts of B pictures, kB together; H heads, N tokens, L keys, D channels per head. Of a text's
own: B texts, S tokens, H heads of queries, K of keys and values, D channels per head.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_attention", "causal_attention_truth", "cross_attention", "cross_attention_truth", "rotate"]


def cross_attention_truth(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, block: int) -> Tensor:
    """out = softmax(q k^T D**-0.5 + bias) v, with k = keys[block] and v = values[block], in fp32 or wider.

    q (kB, N, H D) as its projection leaves it, not scaled; keys, values (blocks, k, B, H, L, D), all that sana_ref.text_projection
    returns; bias (kB, L). Returns (kB, N, H D), heads joined, in q's dtype.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would reach into the op and run the products in half precision
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (text[block].flatten(0, 1).to(wide) for text in (keys, values))  # (kB, H, L, D)
        heads, dim = k.shape[1], k.shape[3]
        scores = q.to(wide).unflatten(2, (heads, dim)).transpose(1, 2) @ k.mT * dim**-0.5
        out = (scores + bias.to(wide)[:, None, None]).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2).to(q.dtype)


def _check(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, block: int) -> None:
    tensors = (q, keys, values, bias)
    fits = q.ndim == 3 and keys.ndim == 6 and keys.shape == values.shape and 0 <= block < keys.shape[0]
    if fits:
        _, texts, batch, heads, length, dim = keys.shape
        fits = (q.shape[0], q.shape[2]) == (texts * batch, heads * dim) and bias.shape == (texts * batch, length)
    if not fits or len({t.dtype for t in tensors}) != 1 or not q.dtype.is_floating_point:
        seen = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
        raise ValueError(
            f"cross_attention: got q, keys, values, bias {seen}, block {block}; expected (kB, N, H D), twice "
            "(blocks, k, B, H, L, D), (kB, L) of one floating dtype, and a block that there is"
        )


@torch.library.custom_op("sana::cross_attention", mutates_args=())
def _cross_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, block: int) -> Tensor:
    _check(q, keys, values, bias, block)
    return cross_attention_truth(q, keys, values, bias, block).contiguous()


@_cross_attention.register_kernel("cuda")
def _cross_attention_cuda(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, block: int) -> Tensor:
    _check(q, keys, values, bias, block)
    if q.dtype == torch.float64:
        return cross_attention_truth(q, keys, values, bias, block).contiguous()
    from plugins import cross_attention as kernel  # Triton loads when a GPU first needs it

    q = q.contiguous()
    out = torch.empty_like(q)
    kernel.launch(q, keys.contiguous(), values.contiguous(), bias.contiguous(), out, block)
    return out


@_cross_attention.register_fake
def _cross_attention_fake(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, block: int) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, block: int) -> Tensor:
    """`cross_attention_truth` as the op `sana::cross_attention`, for engines: it is not differentiable.

    All tensors of one dtype of fp16, bf16, fp32 or fp64, any strides; on CUDA (except fp64) D is at most 128. Returns (kB, N, H D),
    contiguous. Raises ValueError for other shapes.
    """
    out: Tensor = torch.ops.sana.cross_attention(q, keys, values, bias, block)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of (..., S, D) by their token's angle; in fp32 or wider, returned in x's type.

    cos, sin: (S, D / 2). Source: RoFormer, arXiv:2104.09864, with the pairs as Llama and Gemma have them.
    """
    low, high = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def causal_attention_truth(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    live: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cap: float,
    window: int | None = None,
) -> Tensor:
    """out = softmax(cap tanh(q k^T scale / cap)) v over the keys that a query sees, in fp32 or wider, with q and k turned.

    qkv (B, S, (H + 2 K) D) as projections leave it, q first; cos, sin (S, D / 2) of each token's angles, fp32 or wider; live
    (B, S), 0 for padding. A query sees itself and what lies before it, `window` tokens at most, and no padding; one that sees
    nothing gives 0. H / K heads of queries share one of keys. Returns (B, S, H D), heads joined, in qkv's dtype.
    Source: Gemma 2, arXiv:2408.00118, section 2.
    """
    with torch.autocast(qkv.device.type, enabled=False):  # it would reach into the op and run the products in half precision
        wide = torch.promote_types(qkv.dtype, torch.float32)
        heads = qkv.unflatten(2, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)  # (B, H + 2 K, S, D)
        turned, v = rotate(heads[:, :-num_kv_heads], cos, sin).to(wide), heads[:, -num_kv_heads:].to(wide)
        q, k = turned[:, :num_heads].unflatten(1, (num_kv_heads, -1)), turned[:, num_heads:]  # (B, K, G, S, D), (B, K, S, D)
        scores = cap * (q @ k.mT[:, :, None] * (scale / cap)).tanh()
        position = torch.arange(qkv.shape[1], device=qkv.device)
        back = position[:, None] - position[None]  # (S, S) how far the key lies behind the query
        seen = (back >= 0) & (live != 0)[:, None, None, None]
        if window is not None:
            seen = seen & (back < window)
        weights = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
        return (weights @ v[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2).to(qkv.dtype)


def _check_causal(qkv: Tensor, cos: Tensor, sin: Tensor, live: Tensor, num_heads: int, num_kv_heads: int) -> None:
    dim = 2 * cos.shape[-1]
    fits = num_kv_heads >= 1 and num_heads % num_kv_heads == 0 and qkv.ndim == 3
    fits = fits and qkv.shape[2] == (num_heads + 2 * num_kv_heads) * dim and live.shape == qkv.shape[:2]
    fits = fits and cos.shape == sin.shape == (qkv.shape[1], dim // 2)
    if not fits or qkv.dtype != live.dtype or not qkv.dtype.is_floating_point:
        seen = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (qkv, cos, sin, live))
        raise ValueError(
            f"causal_attention: got qkv, cos, sin, live {seen}, {num_heads} heads, {num_kv_heads} of keys; expected "
            "(B, S, (H + 2 K) D), twice (S, D / 2), (B, S), qkv and live of one floating dtype, H a multiple of K"
        )


@torch.library.custom_op("sana::causal_attention", mutates_args=())
def _causal_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    live: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cap: float,
    window: int | None,
) -> Tensor:
    _check_causal(qkv, cos, sin, live, num_heads, num_kv_heads)
    return causal_attention_truth(qkv, cos, sin, live, num_heads, num_kv_heads, scale, cap, window).contiguous()


@_causal_attention.register_kernel("cuda")
def _causal_attention_cuda(qkv: Tensor, cos: Tensor, sin: Tensor, live: Tensor, *numbers: Any) -> Tensor:
    num_heads, num_kv_heads, scale, cap, window = numbers
    _check_causal(qkv, cos, sin, live, num_heads, num_kv_heads)
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return causal_attention_truth(qkv, cos, sin, live, *numbers).contiguous()
    from plugins import causal_attention as kernels  # Triton loads when a GPU first needs it

    out = _causal_attention_fake(qkv, cos, sin, live, num_heads)
    tables = (cos.float().contiguous(), sin.float().contiguous())
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    kernels.launch(qkv.contiguous(), *tables, live.contiguous(), out, **sizes, scale=scale, cap=cap, window=window)
    return out


@_causal_attention.register_fake
def _causal_attention_fake(qkv: Tensor, cos: Tensor, sin: Tensor, live: Tensor, num_heads: int, *numbers: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], num_heads * 2 * cos.shape[-1]))


def causal_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    live: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    cap: float,
    window: int | None = None,
) -> Tensor:
    """`causal_attention_truth` as the op `sana::causal_attention`, for engines: it is not differentiable.

    qkv and live of one dtype of fp16, bf16, fp32 or fp64, any strides; on CUDA in half precision D is at most 256. Returns
    (B, S, H D), contiguous. Raises ValueError for other shapes.
    """
    out: Tensor = torch.ops.sana.causal_attention(qkv, cos, sin, live, num_heads, num_kv_heads, scale, cap, window)
    return out
