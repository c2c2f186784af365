"""The launch description: what it evaluates to, that it survives being written, and what it refuses."""

import hashlib
import json
from dataclasses import replace

import pytest

from plugins.launch import Kernel, Launch, LaunchError, Output, Product, evaluate

CUBINS = b"first" + b"second"
KERNELS = {
    "sm80": Kernel(entry="kernel", warps=4, shared=0, offset=0, size=5, sha256=hashlib.sha256(b"first").hexdigest()),
    "sm89": Kernel(entry="kernel", warps=8, shared=65536, offset=5, size=6, sha256=hashlib.sha256(b"second").hexdigest()),
}
LAUNCH = Launch(
    op="Example",
    inputs=["fp16", "int32"],
    outputs=[Output(type="fp16", shape=[["dim", 0, 0], ["ceildiv", ["dim", 0, 1], 2]])],
    grid=[["mul", ["dim", 0, 0], 2], 1, 1],
    args=[["in", 0], ["in", 1], ["out", 0], ["i32", ["sub", ["dim", 0, 1], 1]], ["f32", 0.5], ["null"]],
    kernels=KERNELS,
)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (7, 7),
        (["dim", 1, 0], 5),
        (["add", ["dim", 0, 0], ["dim", 0, 1]], 12),
        (["sub", ["dim", 0, 0], 10], -7),
        (["mul", ["dim", 0, 1], ["max", 2, ["dim", 0, 0]]], 27),
        (["floordiv", ["dim", 0, 1], 2], 4),
        (["ceildiv", ["dim", 0, 1], 2], 5),
        (["min", ["dim", 0, 1], 4], 4),
    ],
)
def test_evaluate(expression, value):
    assert evaluate(expression, [(3, 9), (5,)]) == value


@pytest.mark.parametrize("expression", [["dim", 1, 1], ["floordiv", 1, ["sub", ["dim", 0, 0], 3]]])
def test_shapes_that_do_not_fit(expression):
    with pytest.raises(LaunchError, match="has no value"):
        evaluate(expression, [(3, 9), (5,)])


def test_written_and_read_again():
    data = LAUNCH.to_json()
    assert Launch.from_json(data) == LAUNCH
    assert Launch.from_json(data).to_json() == data


def test_cubin_by_architecture():
    assert [LAUNCH.cubin(CUBINS, sm) for sm in KERNELS] == [b"first", b"second"]
    with pytest.raises(
        LaunchError, match=r"got a GPU of architecture sm87; this engine has kernels for sm80, sm89\. Build it again"
    ):
        LAUNCH.cubin(CUBINS, "sm87")


@pytest.mark.parametrize("cubins", [b"firstseconD", b"firstsecon", b""])
def test_changed_cubins(cubins):
    with pytest.raises(LaunchError, match="SHA-256"):
        LAUNCH.cubin(cubins, "sm89")


deep = 0
for _ in range(10_000):
    deep = ["add", deep, 1]

BAD = {
    "unknown operation": {"grid": [["pow", 2, 2], 1, 1]},
    "text": {"grid": ["__import__('os')", 1, 1]},
    "input that is not there": {"grid": [["dim", 2, 0], 1, 1]},
    "negative axis": {"grid": [["dim", 0, -1], 1, 1]},
    "fraction": {"grid": [1.5, 1, 1]},
    "truth value": {"grid": [True, 1, 1]},
    "two-dimensional grid": {"grid": [1, 1]},
    "too deep": {"grid": [deep, 1, 1]},
    "unknown argument": {"args": [["f64", 1.0]]},
    "output that is not there": {"args": [["out", 1]]},
    "argument without kind": {"args": [[]]},
    "unknown type": {"inputs": ["float", "int32"]},
    "no warps": {"kernels": {"sm80": replace(KERNELS["sm80"], warps=0)}},
    "negative offset": {"kernels": {"sm80": replace(KERNELS["sm80"], offset=-5)}},
    "product of two types": {"product": Product(rows=1, columns=1, depth=1), "kernels": {}},
    "product of one input": {"product": Product(rows=1, columns=1, depth=1), "kernels": {}, "inputs": ["fp16"]},
    "product with kernels": {"product": Product(rows=1, columns=1, depth=1), "inputs": ["fp16"] * 2},
    "product of no size": {"product": Product(rows=["dim", 9, 0], columns=1, depth=1), "inputs": ["fp16"] * 2, "kernels": {}},
    "empty cubin": {"kernels": {"sm80": replace(KERNELS["sm80"], size=0)}},
}


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in BAD.items()])
def test_refused(changes):
    with pytest.raises(LaunchError, match="expected"):
        replace(LAUNCH, **changes)


FIELDS = json.loads(LAUNCH.to_json())
SM80 = FIELDS["kernels"]["sm80"]


def edited(without=None, **changes):
    return json.dumps({name: value for name, value in (FIELDS | changes).items() if name != without}).encode()


def test_edited_alone_is_read():
    """What is refused below is refused for its change."""
    assert Launch.from_json(edited()) == LAUNCH


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        edited(format=3),
        edited(grid=None),
        edited(without="grid"),
        edited(without="product"),
        edited(surprise=1),
        edited(kernels=[1]),
        edited(outputs=[{"type": "fp16"}]),
        edited(kernels={"sm80": {"entry": "kernel"}}),
        edited(kernels={"sm80": SM80 | {"warps": "four"}}),
        edited(kernels={"sm80": SM80 | {"warps": 4.0}}),
        edited(kernels={"sm80": {name: value for name, value in SM80.items() if name != "warps"}}),
        edited(inputs=7),
        edited(args=7),
    ],
    ids=str,
)
def test_unreadable(data):
    with pytest.raises(LaunchError, match="expected"):
        Launch.from_json(data)
