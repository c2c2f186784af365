"""A small ONNX model around one or more attention nodes, for the tests of the op, of the plugin and of TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from plugins import relu_linear_attention as op

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ONNX_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}
HEADS, HEAD_DIM = 6, 32


def qkv(shape: tuple[int, ...], dtype: str, scale: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Normal q, k, v of shape (B, H, N, D), the first two times `scale`; the same for every dtype, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return tuple(t.to(DTYPES[dtype]) for t in (q * scale, k * scale, v))


def attention_model(dtype: str, *, nodes: int = 1, op_type: str = op.OP, **attributes: Any) -> onnx.ModelProto:
    """out = attention(...attention(q, k, v)) with the function body; batch and tokens are dynamic. One node is `attention_0`."""
    shape = ["batch", HEADS, "tokens", HEAD_DIM]
    value = {n: helper.make_tensor_value_info(n, ONNX_TYPES[dtype], shape) for n in ("q", "k", "v", "out")}
    names = ["q", *(f"hidden_{i}" for i in range(1, nodes)), "out"]
    body = [
        helper.make_node(op_type, [names[i], "k", "v"], [names[i + 1]], domain=op.DOMAIN, name=f"attention_{i}", **attributes)
        for i in range(nodes)
    ]
    graph = helper.make_graph(body, "attention", [value["q"], value["k"], value["v"]], [value["out"]])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(op.DOMAIN, 1)]
    return helper.make_model(graph, functions=[op.function_body()], opset_imports=opsets, ir_version=10)


def with_weight(model: onnx.ModelProto, dtype: str) -> tuple[onnx.ModelProto, torch.Tensor]:
    """The model with v replaced by v @ weight, and the weight (D, D), an initializer."""
    weight = torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(9)).to(DTYPES[dtype])
    bits = weight.view(torch.int32 if dtype == "fp32" else torch.int16).numpy()
    tensor = numpy_helper.from_array(bits, "weight")
    tensor.data_type = ONNX_TYPES[dtype]
    model.graph.initializer.append(tensor)
    for node in model.graph.node:
        node.input[2] = "mixed"
    model.graph.node.insert(0, helper.make_node("MatMul", ["v", "weight"], ["mixed"]))
    return model, weight


def save(model: onnx.ModelProto, path: Path) -> Path:
    """With every weight in `<path>.data`."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def profiles(highest: int = 4096) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Batch 1 to 4, tokens 1 to `highest`."""
    shapes = tuple((batch, HEADS, tokens, HEAD_DIM) for batch, tokens in ((1, 1), (2, 1024), (4, highest)))
    return dict.fromkeys("qkv", shapes)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """fp16 and fp32 only: numpy has no bf16."""
    return tensor.cpu().numpy()
