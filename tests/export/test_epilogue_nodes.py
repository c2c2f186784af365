"""Numbers in 8 bits from the kernels that make them: which nodes, that the graph computes what it did; and TensorRT's kernels."""

import json
import re
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantized_denoiser import cases, graphs
from quantized_engines import engine_case

from engines import tensorrt
from engines.spec import Target
from export.epilogue_nodes import use_epilogues
from export.plugin_nodes import add_cubins
from export.weights import TYPED_NAME
from plugins import shell
from plugins.launch import Launch
from plugins.static_scale import OUT_KIND, OUT_SCALE

MAKERS = {"CrossAttention": 0, "GatedDepthwiseConv": 0, "LinearAttentionApply": 0, "ModulatedNorm": 1, "GatedModulatedNorm": 1}


def graph_of(*readers, op="CrossAttention", domain="sana", outputs=()):
    """`op` and what reads its output: words of a chain, Cast, Reshape, Mul; or (scale, numpy's type of the zero point, zero) of a
    QuantizeLinear, with DequantizeLinear behind. Results are the last of each."""
    made = [f"made{number}" for number in range(MAKERS.get(op, 0) + 1)]
    nodes, constants = [helper.make_node(op, ["x"], made, domain=domain)], [numpy_helper.from_array(np.array([-1, 8]), "rows")]
    constants.append(numpy_helper.from_array(np.ones(8, np.float32), "inverse_smooth"))
    types, results = dict.fromkeys(made, TensorProto.FLOAT16), list(outputs)
    for number, chain in enumerate(readers):
        name = made[-1]
        for place, word in enumerate(chain):
            before, name, kind = name, f"y{number}_{place}", types[name]
            if word == "Cast":
                nodes.append(helper.make_node("Cast", [before], [name], to=TensorProto.FLOAT))
                kind = TensorProto.FLOAT
            elif word == "Reshape":
                nodes.append(helper.make_node("Reshape", [before, "rows"], [name]))
            elif word == "Mul":
                nodes.append(helper.make_node("Mul", [before, "inverse_smooth"], [name]))
            else:
                scale, zero = (np.array(word[0], np.float32), word[1]) if len(word) == 2 else (None, None)
                given = [before, "dynamic"] if scale is None else [before, f"{name}_scale", f"{name}_zero"]
                constants += (
                    [] if scale is None else [numpy_helper.from_array(scale, given[1]), helper.make_tensor(given[2], *zero)]
                )
                nodes.append(helper.make_node("QuantizeLinear", given, [f"{name}_numbers"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}_numbers", *given[1:]], [name]))
            types[name] = kind
        results.append(name)
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
    graph = helper.make_graph(nodes, "chain", [], [helper.make_empty_tensor_value_info(name) for name in results], constants)
    graph.value_info.extend(values)
    return helper.make_model(graph)


INT8, FP8 = (TensorProto.INT8, [], [0]), (TensorProto.FLOAT8E4M3FN, [], [0.0])
Q = (0.25, INT8)


def ops(model):
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(("kind", "zero"), [("int8", INT8), ("e4m3", FP8)])
@pytest.mark.parametrize("op", MAKERS)
def test_rewritten(op, kind, zero):
    """Several readers of one scale, behind casts and reshapes in either order; a norm's first output stays."""
    quantize = (0.25, zero)
    model = graph_of(["Cast", quantize], ["Reshape", "Cast", quantize], ["Cast", "Reshape", quantize], [quantize], op=op)
    assert use_epilogues(model) == 1
    assert ops(model) == {op: 1, "Reshape": 2, "DequantizeLinear": 4}
    maker, *_ = model.graph.node
    assert {a.name: helper.get_attribute_value(a) for a in maker.attribute} == {
        OUT_SCALE: 0.25,
        OUT_KIND: kind.encode(),
    }
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node[1:]:
        assert types[node.input[0]] == zero[0]
        assert node.input[0] == maker.output[-1] or made[node.input[0]].op_type == "Reshape"
    assert len(maker.output) == MAKERS[op] + 1
    assert all(types[name] == TensorProto.FLOAT16 for name in maker.output[:-1])


STAY = {
    "two scales": graph_of(["Cast", Q], ["Cast", (0.5, INT8)]),
    "another reader": graph_of(["Cast", Q], ["Cast", "Mul"]),
    "smoothing": graph_of(["Cast", "Mul", Q]),
    "two types": graph_of(["Cast", Q], ["Cast", (0.25, FP8)]),
    "uint8": graph_of(["Cast", (0.25, (TensorProto.UINT8, [], [0]))]),
    "a zero point": graph_of(["Cast", (0.25, (TensorProto.INT8, [], [1]))]),
    "a scale a channel": graph_of(["Cast", ([0.25] * 8, (TensorProto.INT8, [8], [0] * 8))]),
    "a dynamic scale": graph_of(["Cast", "dynamic"]),
    "an output": graph_of(["Cast", Q], outputs=["made0"]),
    "quantised output": graph_of(["Cast", Q], outputs=["y0_1_numbers"]),
    "no reader": graph_of(),
    "another op": graph_of(["Cast", Q], op="LinearAttentionState"),
    "another domain": graph_of(["Cast", Q], domain="other"),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name):
    model = onnx.ModelProto()
    model.CopyFrom(STAY[name])
    assert use_epilogues(model) == 0
    assert model == STAY[name]


def undone(model):
    """What nodes give in 8 bits, quantised by a QuantizeLinear again. Plugins then say that they give fp16: not to be run."""
    for kind, zero in ((b"int8", INT8), (b"e4m3", FP8)):
        model.graph.initializer.append(helper.make_tensor(f"undone_{kind.decode()}", *zero))
    for node in list(model.graph.node):
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if OUT_KIND in given:
            numbers = node.output[-1]
            node.output[-1] = f"{numbers}_plain"
            model.graph.initializer.append(numpy_helper.from_array(np.array(given[OUT_SCALE], np.float32), f"{numbers}_scale"))
            quantize = (
                helper.make_node("Cast", [f"{numbers}_plain"], [f"{numbers}_wide"], to=TensorProto.FLOAT),
                helper.make_node(
                    "QuantizeLinear", [f"{numbers}_wide", f"{numbers}_scale", f"undone_{given[OUT_KIND].decode()}"], [numbers]
                ),
            )
            place = [*model.graph.node].index(node)
            for number, each in enumerate(quantize):
                model.graph.node.insert(place + 1 + number, each)
            kept = [a for a in node.attribute if a.name not in (OUT_SCALE, OUT_KIND, "launch")]
            del node.attribute[:]
            node.attribute.extend(kept)
            if "launch" in given:
                launch = json.loads(given["launch"])
                launch["outputs"][-1]["type"] = "fp16"
                node.attribute.append(helper.make_attribute("launch", json.dumps(launch)))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_denoiser(kind):
    """Attention's and the convolution's outputs, and not the norm's, which is smoothed. ONNX Runtime computes the same bits."""
    folder = graphs(kind)
    model = onnx.load(folder / TYPED_NAME, load_external_data=False)
    before = ops(model)
    assert use_epilogues(model) == 3
    assert before - ops(model) == {"QuantizeLinear": 3, "Cast": 3}
    chosen = [node for node in model.graph.node if any(a.name == OUT_KIND for a in node.attribute)]
    assert sorted(node.op_type for node in chosen) == ["CrossAttention", "GatedDepthwiseConv", "LinearAttentionApply"]
    (folder / "undone.onnx").write_bytes(undone(model).SerializeToString())
    for inputs in cases().values():
        results = []
        for name in (TYPED_NAME, "undone.onnx"):
            session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
            results.append(session.run(None, inputs))
        assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), [("int8", Target.SM80), ("fp8", Target.SM89)])
def test_cubins(kind, target):
    model = onnx.load(graphs(kind) / TYPED_NAME, load_external_data=False)
    use_epilogues(model)
    add_cubins(model, (target,))
    for node in model.graph.node:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if OUT_KIND in given:
            launch = Launch.from_json(given["launch"])
            assert [output.type for output in launch.outputs] == [kind]
            assert ["f32", given[OUT_SCALE]] in launch.args


def kernels(engine):
    """Of the kernels that TensorRT wrote, how many there are of each name; and how many products."""
    functions = re.findall(rb"function=\{ name=__myl_(\w+) ", engine)
    return Counter(name.decode() for name in functions), len(re.findall(rb"fully_connected=\{ name=\"node_", engine))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target"), [*(("int8", target) for target in (Target.SM80, Target.SM89)), ("fp8", Target.SM89), ("fp8", Target.SM120)]
)
def test_tensorrt_quantises_nothing_behind_a_plugin(kind, target):
    """Without the rewriting, a kernel of its own quantises behind each of four plugins. All else stays as it is."""
    case = engine_case(kind, (target,))
    (case.folder / "plain.onnx").write_bytes(
        undone(onnx.load(case.folder / TYPED_NAME, load_external_data=False)).SerializeToString()
    )
    before, after = (
        tensorrt.build_engine(
            case.folder / name,
            profiles=case.profile,
            targets=(target,),
            expected_plugins=case.plugins,
            register_plugins=shell.register,
        )
        for name in ("plain.onnx", TYPED_NAME)
    )
    (old, old_products), (new, new_products) = kernels(before), kernels(after)
    assert old - new == {"CastMulMinMaxRounCast" if kind == "int8" else "CastMulCast": 4}
    assert not new - old
    assert new_products == old_products == 6
