"""The graph that TensorRT compiles: the typed graph, with what its targets and its format need put in.

It is complete: whoever compiles it needs neither the checkpoint nor the exporter, so that may be another machine.
"""

from collections import Counter
from pathlib import Path

import onnx

from engines import tensorrt
from engines.spec import Target
from export.compile_processes import compile_ahead
from export.components import Component
from export.epilogue_nodes import use_epilogues
from export.folding import FOLDED_NAME, fold_weights
from export.fp8_nodes import use_fp8
from export.level_nodes import add_levels
from export.linear_nodes import use_linear_plugins, wants_linear_plugins
from export.plugin_nodes import add_cubins
from export.quantized_constants import DATA_NAME as QUANTIZED_DATA_NAME
from export.quantized_conv_nodes import use_quantized_convs
from export.weights import TYPED_NAME
from plugins import linear

__all__ = ["EXTRA_DATA", "write_engine_graph"]

EXTRA_DATA = (QUANTIZED_DATA_NAME, FOLDED_NAME)  # beside the exported weights; needed as long as the graph is compiled


def write_engine_graph(component: Component, typed: Path, folder: Path, targets: tuple[Target, ...]) -> dict[str, int]:
    """Write `folder`/TYPED_NAME and EXTRA_DATA. Returns how many plugin layers of each op TensorRT must make of it.

    typed: the exported graph. folder: has the exported weights under their name (export/weights.py). Raises BuildError for a kernel
    that does not compile, ValueError as use_fp8 does.
    """
    model = onnx.load(typed, load_external_data=False)
    expected = Counter(component.spec.plugins)
    expected[linear.OP] += use_linear_plugins(model) if wants_linear_plugins(targets, tensorrt.flavor()) else 0
    fold_weights(model, folder)
    if component.in_engine:
        expected.update(_use_plan(component, model, folder))
    use_epilogues(model)
    if component.name == "decoder":
        add_levels(model)
    onnx.save(model, folder / TYPED_NAME)
    compile_ahead(folder / TYPED_NAME, targets)
    add_cubins(model, targets)
    onnx.save(model, folder / TYPED_NAME)
    return {op: count for op, count in expected.items() if count}


def _use_plan(component: Component, model: onnx.ModelProto, folder: Path) -> dict[str, int]:
    """How many more nodes of each op there are."""
    assert component.plan is not None
    if component.name == "decoder":
        return use_quantized_convs(model, folder, component.plan)
    added = use_fp8(model, folder, component.plan)
    return added | {linear.OP: -added[linear.FP8]}
