"""What softmax attention to the text means as a custom op, and its registration; as sana_ref/ops.py does for the other ops.

Dimensions: k texts of B pictures, kB together; H heads, N tokens, L keys, D channels per head.
"""

import torch
from torch import Tensor

__all__ = ["cross_attention", "cross_attention_truth"]


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
