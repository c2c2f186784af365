"""The least that a step, a decode or a text could take on this GPU: matrix products, and memory traffic at the rate of a copy.

Of a denoiser step: the products of all blocks, each with weights of its own, in one CUDA graph through PyTorch, plus what lies
between them, if every tensor between two products were read and written once. Of the text encoder: the same of its layers,
without attention's own products. Of a decode: as many of the fastest GEMM as have
its FLOPs, in one CUDA graph; those of FP8 or INT8 convolutions in such a type; plus what lies between its convolutions and
products, as above. The products take turns with the work and its peers, so that they have the clock that those have. FLOPs are
those of the model as PyTorch computes it: an upsampling convolution behind nearest neighbours has nine taps, where ours has four,
and a decode of 1024 px 8.4 TFLOP, not 7.4. All are measured in the run that compares with them. FP8 products have a scale a row,
as ours; INT8 products give int32, which is all that PyTorch has, and more to write than fp16. NVFP4 has no floor: its products
need a GPU of SM 120, where this was not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.graph_timing import captured, graph_ms
from benchmarks.latency_timing import Task, TorchEvents
from benchmarks.latency_yardstick import gemm_flops
from engines.spec import PX_PER_LATENT, Precision
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig, per_stage
from sana_ref.build import empty

if TYPE_CHECKING:
    from benchmarks.latency_work import Work
    from sana_ref.checkpoint import Checkpoint
    from sana_ref.text_encoder import Gemma2Config
    from sana_ref.transformer import SanaTransformerConfig

__all__ = [
    "PRODUCTS",
    "Floor",
    "Product",
    "decoder_floor",
    "decoder_flops",
    "decoder_traffic_bytes",
    "denoiser_floor",
    "floor_of",
    "narrow_rate",
    "products",
    "residual_flops",
    "text_floor",
    "traffic_bytes",
]

PRODUCTS = "floor, products"  # its name among the references of a work
BIG_GEMM = (8192, 8192, 8192)
HALF = 2  # bytes
NARROW = ("fp8", "int8")
LEAST_INT8_ROWS = 32  # torch._int_mm takes more than 16


@dataclass(frozen=True)
class Product:
    rows: int
    columns: int
    depth: int


@dataclass(frozen=True)
class Floor:
    """products: each with its precision, and how often it is computed with the same operands. traffic_bytes: what lies between."""

    products: tuple[tuple[Product, str, int], ...]
    traffic_bytes: int

    def task(self) -> Task:
        """All products in one CUDA graph. Needs a GPU."""
        calls = [call for product, precision, times in self.products for call in [_call(product, precision)] * times]
        return Task(PRODUCTS, captured(calls), TorchEvents())


def floor_of(checkpoint: Checkpoint, work: Work, precision: str, *, tokens: int = 0) -> Floor | None:
    """None: there is none of NVFP4, nor of pictures. tokens: of a text."""
    size = {"width": work.width, "height": work.height}
    if precision == Precision.NVFP4 or work.component == "picture":
        return None
    if work.component == "text_encoder":
        return text_floor(checkpoint.text_encoder_config, rows=tokens * work.batch, precision=precision)
    if work.component == "decoder":
        return decoder_floor(checkpoint.vae_config, batch=work.batch, precision=precision, **size)
    config = checkpoint.transformer_config
    texts = work.batch * (1 if config.guidance_embeds else 2)
    return denoiser_floor(config, texts=texts, precision=precision, **size)


def _inner(config: SanaTransformerConfig) -> int:
    """E, of a half of the mix-FFN."""
    return int(config.mlp_ratio * config.dim)


def products(config: SanaTransformerConfig, rows: int) -> list[Product]:
    """Of one block, for `rows` tokens in all: q, k and v; out; the text's q and out; both of the mix-FFN."""
    dim, inner = config.dim, _inner(config)
    small = Product(rows, dim, dim)
    return [Product(rows, 3 * dim, dim), small, small, small, Product(rows, 2 * inner, dim), Product(rows, dim, inner)]


def traffic_bytes(config: SanaTransformerConfig, rows: int, precision: str = "fp16") -> int:
    """Of one block, between its products; in "fp8" and "int8" what products read has 8 bits, the rest half precision.

    Widths of a token: k and v for the state, q and out of linear attention; the first sum (2 in, 1 out); q and out of
    cross-attention; two norms with their sums (2 in, 2 out each); the convolution's 2 E in, E out. In 8 bits are both outs, an
    out of each norm, and E; and the first sum is written once more, in 8 bits. Its text is small, and so are scales.
    """
    half = HALF * ((2 + 2 + 3 + 2 + 8) * config.dim + 3 * _inner(config))
    saved = (4 - 1) * config.dim + _inner(config) if precision in NARROW else 0
    return rows * (half - saved)


def denoiser_floor(config: SanaTransformerConfig, *, width: int, height: int, texts: int, precision: str) -> Floor:
    """texts: pictures times texts a picture. precision: "fp16", "bf16", "fp32", which is taken at the rate and widths of fp16,
    "int8" or "fp8"."""
    rows = texts * (width // PX_PER_LATENT // config.patch_size) * (height // PX_PER_LATENT // config.patch_size)
    kind = "fp16" if precision == "fp32" else precision
    block = tuple((product, kind, 1) for product in products(config, rows))
    return Floor(config.num_layers * block, config.num_layers * traffic_bytes(config, rows, precision))


def text_floor(config: Gemma2Config, *, rows: int, precision: str = "bf16") -> Floor:
    """rows: tokens of all texts. precision: "bf16", "fp16" or "fp32", which is taken at the rate and widths of fp16.

    Products of a layer: q, k and v; out; gate and up; down. Widths of a token between them: q, k, v and out of attention; two
    norms with their sums (2 in, 2 out each); gate and up in, their product out.
    """
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layer = (
        Product(rows, (heads + 2 * kv_heads) * dim, hidden),
        Product(rows, hidden, heads * dim),
        Product(rows, inner, hidden),
        Product(rows, inner, hidden),
        Product(rows, hidden, inner),
    )
    kind = "fp16" if precision == "fp32" else precision
    numbers = 2 * (heads + kv_heads) * dim + 8 * hidden + 3 * inner
    return Floor(
        config.num_hidden_layers * tuple((each, kind, 1) for each in layer), HALF * rows * config.num_hidden_layers * numbers
    )


def narrow_rate(precision: str) -> float:
    """FLOP/s of PyTorch's product of BIG_GEMM in "fp8" or "int8". Needs a GPU."""
    rows, depth, columns = BIG_GEMM
    call, repeats = _call(Product(rows, columns, depth), precision), 5
    return 1000 * repeats * gemm_flops(BIG_GEMM) / graph_ms([call] * repeats)


def _large(flops: int, precision: str) -> tuple[tuple[Product, str, int], ...]:
    """Products of BIG_GEMM's size, or smaller ones where it has too many, and one with fewer rows, that have those FLOPs. Their
    operands are the same: they are no more in a cache for that, and for 4096 px would take 33 GB."""
    side = next(side for side in (8192, 4096, 2048, 1024, 512, 256) if flops >= gemm_flops((side,) * 3) or side == 256)
    count, rest = divmod(flops, gemm_flops((side,) * 3))
    rows = LEAST_INT8_ROWS * round(rest / gemm_flops((LEAST_INT8_ROWS, side, side)))
    found = ((Product(side, side, side), precision, count), (Product(rows, side, side), precision, 1))
    return tuple(each for each in found if each[0].rows and each[2])


def _call(product: Product, precision: str) -> Callable[[], object]:
    if precision == "int8":
        rows = max(product.rows, LEAST_INT8_ROWS)
        numbers, weights = _int8(rows, product.depth), _int8(product.columns, product.depth)
        return lambda: torch._int_mm(numbers, weights.t())
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[precision]
    x = torch.randn(product.rows, product.depth, device="cuda", dtype=dtype)
    w = torch.randn(product.columns, product.depth, device="cuda", dtype=dtype)
    bias = torch.zeros(product.columns, device="cuda", dtype=dtype)
    if precision != "fp8":
        return lambda: torch.nn.functional.linear(x, w, bias)
    x_bits, w_bits = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    x_scale, w_scale = torch.ones(product.rows, 1, device="cuda"), torch.ones(1, product.columns, device="cuda")
    return lambda: torch._scaled_mm(x_bits, w_bits.t(), x_scale, w_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def _int8(rows: int, columns: int) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), device="cuda", dtype=torch.int8)


def decoder_flops(config: AutoencoderDCConfig, *, width: int, height: int, batch: int) -> int:
    """Of its convolutions and matrix products; a multiply and an add are two."""
    model = empty(lambda: AutoencoderDC(config))
    latents: Tensor = torch.empty(batch, config.latent_channels, height // PX_PER_LATENT, width // PX_PER_LATENT, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.decode(latents)
    return int(counter.get_total_flops())


def residual_flops(config: AutoencoderDCConfig, *, width: int, height: int, batch: int) -> int:
    """Of the two 3x3 convolutions of each of the decoder's residual blocks."""
    depths = config.decoder_layers_per_block
    kinds = per_stage(config.decoder_block_types, len(depths))
    stages = enumerate(zip(kinds, config.decoder_block_out_channels, depths, strict=True))
    return sum(
        2 * depth * 2 * 9 * channels**2 * batch * (width >> stage) * (height >> stage)
        for stage, (kind, channels, depth) in stages
        if kind == "ResBlock"
    )


def decoder_traffic_bytes(config: AutoencoderDCConfig, *, width: int, height: int, batch: int) -> int:
    """In half precision, between convolutions and products.

    Widths of a pixel: a norm with its sum, 2 in and 1 out, in each residual block and twice in each of attention; there, for each
    scale, k and v for the state, q and out; for all but the first scale q, k and v in and out; the mix-FFN's middle, 8 in and 4
    out. The sum with an upsampling's shortcut: the picture before and after it, and the sum. The last norm, 1 in and 1 out. A Lite
    decoder has no layers at full resolution: it upsamples behind its last norm, without a shortcut.
    """
    widths, depths = config.decoder_block_out_channels, config.decoder_layers_per_block
    kinds = per_stage(config.decoder_block_types, len(depths))
    finest = 0 if depths[0] else 1
    numbers = 2 * widths[finest] * (width >> finest) * (height >> finest)
    stages = enumerate(zip(kinds, widths, depths, config.decoder_qkv_multiscales, strict=True))
    for stage, (kind, channels, depth, others) in stages:
        pixels = (width >> stage) * (height >> stage)
        block = 3 if kind == "ResBlock" else 4 * (1 + len(others)) + 6 * len(others) + 12 + 3 + 3
        numbers += depth * block * channels * pixels
        if stage > finest:
            numbers += channels * pixels + 2 * widths[stage - 1] * 4 * pixels
    return HALF * batch * numbers


def decoder_floor(config: AutoencoderDCConfig, *, width: int, height: int, batch: int = 1, precision: str = "bf16") -> Floor:
    """precision: "bf16", "fp16" or "fp32", which is taken at the rate of fp16; or "fp8" or "int8", of the residual blocks alone, as
    ours, beside bf16."""
    size = {"width": width, "height": height, "batch": batch}
    narrow = residual_flops(config, **size) if precision in NARROW else 0
    half = "fp16" if precision in ("fp16", "fp32") else "bf16"
    found = _large(decoder_flops(config, **size) - narrow, half)
    return Floor((_large(narrow, precision) if narrow else ()) + found, decoder_traffic_bytes(config, **size))
