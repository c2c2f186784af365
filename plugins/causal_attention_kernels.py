"""The two kernels of plugins/causal_attention.py, which has their meaning and the dimensions."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e38)  # where the running maximum starts: a number, so that a step in which nothing is seen is no NaN


@triton.jit
def rotate_kernel(
    qkv,
    cos,
    sin,
    turned,
    n_tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """HEADS = H + K, WIDTH = (H + 2 K) D, HALF = D / 2."""
    text = tl.program_id(1).to(tl.int64)
    row_R, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    token_R, head_R = row_R // HEADS, row_R % HEADS
    live = (token_R < n_tokens)[:, None] & (d < HALF)[None, :]
    source = qkv + text * n_tokens * WIDTH + token_R[:, None] * WIDTH + head_R[:, None] * (2 * HALF) + d[None, :]
    low, high = tl.load(source, mask=live, other=0.0), tl.load(source + HALF, mask=live, other=0.0)
    at = token_R[:, None] * HALF + d[None, :]
    c, s = tl.load(cos + at, mask=live, other=0.0), tl.load(sin + at, mask=live, other=0.0)
    low, high = low.to(tl.float32), high.to(tl.float32)
    out = turned + text * n_tokens * (HEADS * 2 * HALF) + row_R[:, None] * (2 * HALF) + d[None, :]
    tl.store(out, (low * c - high * s).to(turned.dtype.element_ty), mask=live)
    tl.store(out + HALF, (high * c + low * s).to(turned.dtype.element_ty), mask=live)


@triton.jit
def attention_kernel(
    turned,
    qkv,
    live,
    out,
    n_tokens,
    window,
    scale,
    cap,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group: tl.constexpr = H // K
    TURNED: tl.constexpr = (H + K) * D
    WIDTH: tl.constexpr = (H + 2 * K) * D
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, before = tl.program_id(1), tl.program_id(2).to(tl.int64) * n_tokens
    row_M, d = first + tl.arange(0, BLOCK_M), tl.arange(0, PADDED)
    token_M = row_M // group
    real_MD = (token_M < n_tokens)[:, None] & (d < D)[None, :]
    head_M = head * group + row_M % group
    q_MD = tl.load(turned + before * TURNED + (token_M * TURNED + head_M * D)[:, None] + d[None, :], mask=real_MD, other=0.0)
    keys = turned + before * TURNED + (H + head) * D
    values = qkv + before * WIDTH + (H + K + head) * D
    live += before

    start = tl.maximum(first // group - window + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum((first + BLOCK_M - 1) // group + 1, n_tokens)
    top_M = tl.full((BLOCK_M,), LOWEST, tl.float32)
    sum_M, out_MD = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, PADDED), tl.float32)
    for at in range(start, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        real_ND = (n < n_tokens)[:, None] & (d < D)[None, :]
        k_ND = tl.load(keys + n[:, None] * TURNED + d[None, :], mask=real_ND, other=0.0)
        v_ND = tl.load(values + n[:, None] * WIDTH + d[None, :], mask=real_ND, other=0.0)
        text_N = tl.load(live + n, mask=n < n_tokens, other=0.0).to(tl.float32) != 0.0
        products_MN = tl.dot(q_MD, tl.trans(k_ND))
        # tanh y = 2 / (1 + exp(-2 y)) - 1: no larger argument than the other way round would be a NaN
        scores_MN = cap * (2.0 / (1.0 + tl.exp2(products_MN * (scale / cap * -2.0 * LOG2E))) - 1.0)
        back_MN = token_M[:, None] - n[None, :]
        seen_MN = (back_MN >= 0) & (back_MN < window) & text_N[None, :]
        scores_MN = tl.where(seen_MN, scores_MN * LOG2E, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(scores_MN, axis=1))
        p_MN, shrink_M = tl.exp2(scores_MN - new_top_M[:, None]), tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, axis=1)
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD * shrink_M[:, None])
        top_M = new_top_M
    factor_M = 1.0 / tl.where(sum_M > 0.0, sum_M, 1.0)  # a query of padding may see nothing: 0
    places = out + before * (H * D) + (token_M * (H * D) + head_M * D)[:, None] + d[None, :]
    tl.store(places, (out_MD * factor_M[:, None]).to(out.dtype.element_ty), mask=real_MD)
