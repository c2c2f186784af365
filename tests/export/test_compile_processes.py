"""Kernels compiled in a process for each architecture, into Triton's cache."""

import onnx
import pytest
from onnx import TensorProto, helper

from engines.spec import Target
from export.compile_processes import compile_ahead
from plugins import linear, relu_linear_attention

TARGETS = (Target.SM80, Target.SM89)


def graph(path, op):
    names = ("q", "k", "v", "out")
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["b", "h", "n", 32]) for name in names}
    node = helper.make_node(op, names[:3], names[3:], domain="sana", eps=1e-15)
    made = helper.make_graph([node], "main", [values[name] for name in names[:3]], [values["out"]])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("sana", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=11), path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Triton's, empty; and two processors, however many there are."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    return tmp_path / "cache"


@pytest.mark.slow
def test_each_architecture_has_its_kernel(tmp_path, cache):
    compile_ahead(graph(tmp_path / "graph.onnx", relu_linear_attention.OP), TARGETS)
    assert len([*cache.rglob("*.cubin")]) == len(TARGETS)


@pytest.mark.slow
def test_what_is_wrong_is_left_to_the_build(tmp_path, cache):
    compile_ahead(graph(tmp_path / "graph.onnx", "NoSuchOp"), TARGETS)
    assert not [*cache.rglob("*.cubin")]


def test_one_architecture_needs_no_process(tmp_path, cache):
    compile_ahead(tmp_path / "not read", TARGETS[:1])
    assert not cache.exists()


def test_a_graph_without_kernels_needs_no_process(tmp_path, cache, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: started.append(command))
    compile_ahead(graph(tmp_path / "graph.onnx", linear.OP), TARGETS)
    assert not started
    compile_ahead(graph(tmp_path / "graph.onnx", relu_linear_attention.OP), TARGETS)
    assert [command[-1] for command in started] == [*TARGETS]
