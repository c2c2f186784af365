"""Linear layers as plugins: the same numbers before and after, and what is left alone."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engines.spec import Target
from export import linear_nodes
from export.linear_nodes import use_linear_plugins, wants_linear_plugins
from export.plugin_nodes import add_cubins
from plugins import linear
from plugins.launch import Launch

ROWS, COLUMNS, DEPTH = 5, 6, 8
HALF, FLOAT, BF16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16


def model(nodes, *, kind=HALF, shape=("batch", ROWS, DEPTH), more=()):
    """x -> y. Weights: w (COLUMNS, DEPTH), v (COLUMNS, DEPTH), bias (COLUMNS,), one (1,)."""
    rng = np.random.default_rng(0)
    constants = [
        helper.make_tensor(name, kind, size, rng.normal(size=int(np.prod(size))).astype(np.float16))
        for name, size in (("w", (COLUMNS, DEPTH)), ("v", (COLUMNS, DEPTH)), ("bias", (COLUMNS,)), ("one", (1,)))
    ]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, outputs, name=f"n{i}", **more) for i, (op, inputs, outputs, more) in enumerate(nodes)],
        "main",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        constants,
        value_info=list(more),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def cast(source, target, to=FLOAT):
    return "Cast", [source], [target], {"to": to}


TURNED = ("Transpose", ["w"], ["w_turned"], {"perm": [1, 0]})
PRODUCT = [TURNED, cast("x", "x_wide"), cast("w_turned", "w_wide"), ("MatMul", ["x_wide", "w_wide"], ["sums"], {})]
BODY = helper.make_function(
    linear.DOMAIN,
    linear.OP,
    ["x", "w", "b"],
    ["y"],
    [
        helper.make_node("Cast", ["x"], ["x_wide"], to=FLOAT),
        helper.make_node("Cast", ["w"], ["w_wide"], to=FLOAT),
        helper.make_node("Transpose", ["w_wide"], ["w_turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x_wide", "w_turned"], ["sums"]),
        helper.make_node("Cast", ["b"], ["b_wide"], to=FLOAT),
        helper.make_node("Add", ["sums", "b_wide"], ["with_bias"]),
        helper.make_node("CastLike", ["with_bias", "x"], ["y"]),
    ],
    [helper.make_opsetid("", 23)],
    attributes=["launch", "cubins", "plugin_version", "plugin_namespace"],
)


def run(made):
    x = np.random.default_rng(1).normal(size=(2, ROWS, DEPTH)).astype(np.float16)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.reshape(-1, DEPTH) if len(session.get_inputs()[0].shape) == 2 else x})[0]


def ops(made):
    return [node.op_type for node in made.graph.node]


def rewritten(nodes, count=1, **how):
    made = model(nodes, **how)
    before = None if how.get("kind") == BF16 else run(made)  # which ONNX Runtime does not multiply on a CPU
    assert use_linear_plugins(made) == count
    if count and before is not None and all(len(node.input) == 3 for node in made.graph.node if node.op_type == linear.OP):
        given = onnx.ModelProto()
        given.CopyFrom(made)
        given.functions.append(BODY)
        np.testing.assert_allclose(run(given), before, rtol=2e-3, atol=2e-3)  # the bias was added after rounding
    return made


def test_product_with_bias():
    made = rewritten([*PRODUCT, cast("sums", "narrow", HALF), ("Add", ["narrow", "bias"], ["y"], {})])
    assert ops(made) == [linear.OP]
    (node,) = made.graph.node
    assert [*node.input, *node.output] == ["x", "w", "bias", "y"]
    launch = Launch.from_json(next(a.s for a in node.attribute if a.name == "launch"))
    assert launch.inputs == ["fp16"] * 3
    assert (launch.product.columns, launch.product.depth) == (COLUMNS, DEPTH)
    assert add_cubins(made, (Target.SM90,)) == 0  # it has no kernels


def test_gemm():
    how = {"transB": 1, "alpha": 1.0, "beta": 1.0, "transA": 0}
    wide = [cast("x", "x_wide"), cast("w", "w_wide"), cast("bias", "bias_wide")]
    gemm = ("Gemm", ["x_wide", "w_wide", "bias_wide"], ["sums"], how)
    made = rewritten([*wide, gemm, cast("sums", "y", HALF)], shape=("rows", DEPTH))
    assert ops(made) == [linear.OP]


def test_weights_joined():
    """As q, k and v are: a constant, but not one of its own."""
    join = ("Concat", ["w", "v"], ["wv"], {"axis": 0})
    turn = ("Transpose", ["wv"], ["wv_turned"], {"perm": [1, 0]})
    product = ("MatMul", ["x_wide", "wv_wide"], ["sums"], {})
    info = [helper.make_tensor_value_info("wv", HALF, (2 * COLUMNS, DEPTH))]
    made = rewritten([join, turn, cast("x", "x_wide"), cast("wv_turned", "wv_wide"), product, cast("sums", "y", HALF)], more=info)
    assert ops(made) == ["Concat", linear.OP]


def test_bf16_has_no_casts():
    made = rewritten([TURNED, ("MatMul", ["x", "w_turned"], ["y"], {})], kind=BF16)
    assert ops(made) == [linear.OP]


def test_a_result_that_is_used_before_its_bias_keeps_it_apart():
    nodes = [
        *PRODUCT,
        cast("sums", "narrow", HALF),
        ("Add", ["narrow", "bias"], ["added"], {}),
        ("Mul", ["narrow", "added"], ["y"], {}),
    ]
    assert ops(rewritten(nodes)) == [linear.OP, "Add", "Mul"]


def test_what_is_added_to_all_columns_alike_is_no_bias():
    nodes = [*PRODUCT, cast("sums", "narrow", HALF), ("Add", ["narrow", "one"], ["y"], {})]
    assert ops(rewritten(nodes)) == [linear.OP, "Add"]


@pytest.mark.parametrize(
    "nodes",
    [
        [("Transpose", ["x"], ["t"], {"perm": [0, 2, 1]}), ("MatMul", ["x", "t"], ["y"], {})],  # of two activations
        [*PRODUCT, ("Relu", ["sums"], ["r"], {}), cast("r", "y", HALF)],  # whose fp32 result is used
        [*PRODUCT, cast("sums", "y", HALF), ("Relu", ["sums"], ["unused"], {})],
    ],
)
def test_left_alone(nodes):
    assert linear.OP not in ops(rewritten(nodes, 0))


def three_products(columns=(COLUMNS, COLUMNS, COLUMNS), bias=False, end=None):
    """As q, k and v of a text encoder. end: what is made of y0, y1 and y2."""
    nodes = [cast("x", "x_wide")]
    for i, weight in enumerate(("w", "v", "u")):
        nodes += [("Transpose", [weight], [f"{weight}_turned"], {"perm": [1, 0]}), cast(f"{weight}_turned", f"{weight}_wide")]
        nodes += [("MatMul", ["x_wide", f"{weight}_wide"], [f"sums{i}"], {}), cast(f"sums{i}", f"y{i}" + "_" * bias, HALF)]
        nodes += [("Add", [f"y{i}_", "bias"], [f"y{i}"], {})] * bias
    made = model([*nodes, *(end or [("Sub", ["y0", "y1"], ["d"], {}), ("Concat", ["d", "y2"], ["y"], {"axis": -1})])])
    rng = np.random.default_rng(2)
    u = helper.make_tensor("u", HALF, (columns[2], DEPTH), rng.normal(size=columns[2] * DEPTH).astype(np.float16))
    made.graph.initializer.append(u)
    return made


def test_small_products_of_the_same_are_one():
    made = three_products(columns=(COLUMNS, COLUMNS, COLUMNS + 3))
    before = run(made)
    assert use_linear_plugins(made) == 1
    assert ops(made) == ["Concat", linear.OP, "Split", "Sub", "Concat"]
    launch = Launch.from_json(next(a.s for a in made.graph.node[1].attribute if a.name == "launch"))
    assert (launch.product.columns, launch.product.depth) == (3 * COLUMNS + 3, DEPTH)
    as_standard_operators(made)
    np.testing.assert_allclose(run(made), before, rtol=2e-3, atol=2e-3)


def as_standard_operators(made):
    joined = made.graph.node[1]
    del joined.attribute[:]
    joined.op_type, joined.domain = "MatMul", ""
    made.graph.node.insert(1, helper.make_node("Transpose", [joined.input[1]], ["turned"], perm=[1, 0]))
    joined.input[1] = "turned"


def test_what_is_put_side_by_side_again_is_not_split():
    made = three_products(end=[("Concat", ["y0", "y1", "y2"], ["y"], {"axis": 2})])
    before = run(made)
    assert use_linear_plugins(made) == 1
    assert ops(made) == ["Concat", linear.OP]
    as_standard_operators(made)
    np.testing.assert_allclose(run(made), before, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "end",
    [
        [("Concat", ["y0", "y2", "y1"], ["y"], {"axis": -1})],  # in another order
        [("Concat", ["y0", "y1", "y2"], ["y"], {"axis": 1})],  # below each other
        [("Concat", ["y0", "y1", "y2"], ["c"], {"axis": -1}), ("Concat", ["c", "y1"], ["y"], {"axis": -1})],
    ],
)
def test_what_something_else_is_made_of_is_split(end):
    made = three_products(end=end)
    assert use_linear_plugins(made) == 1
    assert ops(made)[:3] == ["Concat", linear.OP, "Split"]


def test_large_products_and_those_with_a_bias_stay_apart(monkeypatch):
    assert use_linear_plugins(three_products(bias=True)) == 3
    monkeypatch.setattr(linear_nodes, "MAX_JOINED", 3 * COLUMNS - 1)
    assert use_linear_plugins(three_products()) == 3


def test_where():
    assert wants_linear_plugins((Target.SM90,), "rtx")
    assert not wants_linear_plugins((Target.SM90,), "tensorrt")
    assert not wants_linear_plugins((Target.SM89, Target.SM120), "rtx")
