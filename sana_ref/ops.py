"""What each custom op means, in plain PyTorch, and its registration as a `torch.library` op.

The `*_truth` functions are the definition: short, slow, and computed in fp32 or wider. Everything faster (the Triton kernel, the
ONNX function body, the TensorRT plugin) is judged against them. The registered ops run the truth on a CPU and the Triton kernel
on a CUDA GPU; float64, which only tests use, runs the truth everywhere.

Dimensions: B images, H heads, N tokens, D channels per head.
"""

import torch
from torch import Tensor

__all__ = ["EPS", "relu_linear_attention", "relu_linear_attention_truth"]

EPS = 1e-15  # as the published diffusers models; must stay representable in fp32, where the division happens


def _without_autocast(device: torch.device) -> torch.autocast:
    """Autocast reaches into custom ops and would run the fp32 state's matrix products in half precision."""
    return torch.autocast(device.type, enabled=False)


def relu_linear_attention_truth(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """out = relu(q) S / (relu(q) z + eps), where S = relu(k)^T v and z = the sum of relu(k) over N.

    q, k, v, out: (B, H, N, D), one dtype. S (B, H, D, D), z (B, H, D) and the division in fp32 or wider.
    Source: Sana, arXiv:2410.10629, section 3.2; eps as in diffusers' SanaLinearAttnProcessor2_0.
    """
    with _without_autocast(q.device):
        wide = torch.promote_types(q.dtype, torch.float32)
        q_ND, k_ND, v_ND = q.relu().to(wide), k.relu().to(wide), v.to(wide)
        top_ND = q_ND @ (k_ND.mT @ v_ND)
        bottom_N1 = q_ND @ k_ND.sum(-2)[..., None]
        return (top_ND / (bottom_N1 + eps)).to(v.dtype)


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The vector-Jacobian product of the truth, in fp32 or wider. S, z and the output are computed again rather than kept."""
    with _without_autocast(q.device):
        wide = torch.promote_types(q.dtype, torch.float32)
        q_ND, k_ND, v_ND, grad_ND = q.relu().to(wide), k.relu().to(wide), v.to(wide), grad.to(wide)
        state_DD, z_D1 = k_ND.mT @ v_ND, k_ND.sum(-2)[..., None]
        bottom_N1 = q_ND @ z_D1 + eps
        d_top_ND = grad_ND / bottom_N1
        d_bottom_N1 = -(d_top_ND * (q_ND @ state_DD)).sum(-1, keepdim=True) / bottom_N1
        d_state_DD, d_z_D1 = q_ND.mT @ d_top_ND, q_ND.mT @ d_bottom_N1
        d_q_ND = d_top_ND @ state_DD.mT + d_bottom_N1 @ z_D1.mT
        d_k_ND = v_ND @ d_state_DD.mT + d_z_D1.mT
        d_v_ND = k_ND @ d_state_DD
        # where, not a product: without any positive q or k the other factor is of the order 1 / eps
        return torch.where(q > 0, d_q_ND, 0).to(q.dtype), torch.where(k > 0, d_k_ND, 0).to(k.dtype), d_v_ND.to(v.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"relu_linear_attention: got q, k, v of shapes {shapes}; expected one shape (B, H, N, D) for all three")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.dtype.is_floating_point:
        raise ValueError(
            f"relu_linear_attention: got q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one floating dtype for all. "
            "Under autocast a norm may return fp32: cast q and k to v's dtype first."
        )


@torch.library.custom_op("sana::relu_linear_attention", mutates_args=())
def _relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    _check(q, k, v)
    return torch.empty_like(v).copy_(relu_linear_attention_truth(q, k, v, eps))


@_relu_linear_attention.register_kernel("cuda")
def _relu_linear_attention_cuda(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    _check(q, k, v)
    if q.dtype == torch.float64:
        return torch.empty_like(v).copy_(relu_linear_attention_truth(q, k, v, eps))
    from plugins import relu_linear_attention as kernel  # Triton loads when a GPU first needs it

    out = torch.empty_like(v)
    kernel.launch(q, k, v, out, eps)
    return out


@_relu_linear_attention.register_fake
def _relu_linear_attention_fake(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    return torch.empty_like(v)


def _keep_inputs(ctx, inputs, output) -> None:
    q, k, v, ctx.eps = inputs
    ctx.save_for_backward(q, k, v)


def _gradients_as_inputs(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_gradients`, each laid out in memory as its input: an op's results must not depend on the device in that."""
    d_q, d_k, d_v = _gradients(grad, q, k, v, eps)
    return torch.empty_like(q).copy_(d_q), torch.empty_like(k).copy_(d_k), torch.empty_like(v).copy_(d_v)


@torch.library.custom_op("sana::relu_linear_attention_backward", mutates_args=())
def _relu_linear_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for q, k, v: an op of its own, so that a compiled step has one node each way."""
    return _gradients_as_inputs(grad, q, k, v, eps)


@_relu_linear_attention_backward.register_kernel("cuda")
def _relu_linear_attention_backward_cuda(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    from plugins import relu_linear_attention_backward as kernels  # Triton loads when a GPU first needs it

    if q.dtype == torch.float64 or q.shape[-1] not in kernels.HEAD_DIMS:
        return _gradients_as_inputs(grad, q, k, v, eps)
    outputs = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    kernels.launch(grad, (q, k, v), outputs, eps)
    return outputs


@_relu_linear_attention_backward.register_fake
def _relu_linear_attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.sana.relu_linear_attention_backward(grad, *ctx.saved_tensors, ctx.eps), None


_relu_linear_attention.register_autograd(_backward, setup_context=_keep_inputs)


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """`relu_linear_attention_truth` as the op `sana::relu_linear_attention`: exports as one node, trains, and is fast on a GPU.

    q, k, v: (B, H, N, D), one dtype of fp16, bf16, fp32, fp64, any strides; returns (B, H, N, D), same dtype, laid out as v. On
    CUDA (except fp64) D is 16, 32, 64 or 128. Differentiable once; gradients come in the inputs' dtype, computed in fp32 or wider.
    Raises ValueError if shapes or dtypes differ.
    """
    return torch.ops.sana.relu_linear_attention(q, k, v, eps)
