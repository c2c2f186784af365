"""What the op between two products of a text encoder's layer means, and its registration.

Dimensions: B texts, S tokens, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["normed_sum", "normed_sum_truth"]


def normed_sum_truth(x: Tensor, branch: Tensor, branch_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(hidden, normed), where hidden = x + norm(branch) (1 + branch_weight) and normed = norm(hidden) (1 + weight).

    norm is RMS norm over D. x, branch, hidden, normed: (B, S, D); branch_weight, weight: (D,). Results are in x's dtype, computed
    in fp32 or wider; the second norm is that of hidden before it is rounded.
    Source: Gemma 2, arXiv:2408.00118, section 2, "Pre-norm and post-norm with RMSNorm".
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dims = x.shape[-1:]
    hidden = x.to(wide) + F.rms_norm(branch.to(wide), dims, eps=eps) * (1 + branch_weight.to(wide))
    normed = F.rms_norm(hidden, dims, eps=eps) * (1 + weight.to(wide))
    return hidden.to(x.dtype).contiguous(), normed.to(x.dtype).contiguous()


def _check(x: Tensor, branch: Tensor, branch_weight: Tensor, weight: Tensor) -> None:
    given = (x, branch, branch_weight, weight)
    fits = x.ndim == 3 and branch.shape == x.shape and branch_weight.shape == weight.shape == x.shape[2:]
    if not fits or not x.dtype.is_floating_point or len({t.dtype for t in given}) > 1:
        seen = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in given)
        raise ValueError(
            f"normed_sum: got x, branch, branch_weight, weight {seen}; expected twice (B, S, D) and twice (D,), of one floating "
            "dtype"
        )


@torch.library.custom_op("sana::normed_sum", mutates_args=())
def _normed_sum(x: Tensor, branch: Tensor, branch_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, branch, branch_weight, weight)
    return normed_sum_truth(x, branch, branch_weight, weight, eps)


@_normed_sum.register_kernel("cuda")
def _normed_sum_cuda(x: Tensor, branch: Tensor, branch_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, branch, branch_weight, weight)
    if x.dtype == torch.float64:
        return normed_sum_truth(x, branch, branch_weight, weight, eps)
    from plugins import normed_sum as kernel  # Triton loads when a GPU first needs it

    outputs = (x.new_empty(x.shape), x.new_empty(x.shape))
    kernel.launch(*(t.contiguous() for t in (x, branch, branch_weight, weight)), outputs, eps)
    return outputs


@_normed_sum.register_fake
def _normed_sum_fake(x: Tensor, branch: Tensor, branch_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def normed_sum(x: Tensor, branch: Tensor, branch_weight: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`normed_sum_truth` as the op `sana::normed_sum`, for engines: it is not differentiable.

    One dtype of fp16, bf16, fp32 or fp64, any strides; results are contiguous. Raises ValueError for other shapes.
    """
    outputs: tuple[Tensor, Tensor] = torch.ops.sana.normed_sum(x, branch, branch_weight, weight, eps)
    return outputs
