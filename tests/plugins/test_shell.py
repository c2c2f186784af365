"""The TensorRT plugin without a GPU: a driver that records what it is told stands in for CUDA."""

import ctypes
import hashlib
import struct
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from onnx import TensorProto, helper

from engines import tensorrt
from engines.tensorrt_library import logger
from plugins import cublas_lt, linear, shell, work
from plugins.launch import Kernel, Launch, LaunchError, Output

CUBINS = {"sm80": b"for 80", "sm89": b"for 89!"}
LAUNCH = Launch(
    op="Example",
    inputs=["fp16", "fp16"],
    outputs=[Output(type="fp16", shape=[["dim", 0, 0], ["ceildiv", ["dim", 0, 1], 2]])],
    grid=[["mul", ["dim", 0, 0], 2], ["dim", 1, 0], 1],
    args=[["in", 1], ["out", 0], ["in", 0], ["i32", ["sub", ["dim", 0, 1], 10]], ["f32", 1e-15], ["null"]],
    kernels={
        "sm80": Kernel(entry="run", warps=4, shared=49152, offset=0, size=6, sha256=hashlib.sha256(CUBINS["sm80"]).hexdigest()),
        "sm89": Kernel(entry="run", warps=8, shared=65536, offset=6, size=7, sha256=hashlib.sha256(CUBINS["sm89"]).hexdigest()),
    },
)
PAYLOAD = b"".join(CUBINS.values())


class Driver:
    """As much of cuda.bindings.driver as the plugin uses. `calls` has what changes something."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self, capability=(8, 9), context=1, context_id=1):
        self.capability, self.context, self.context_id = capability, context, context_id
        self.calls, self.fails = [], {}

    def _answer(self, call, *value):
        self.calls.append(call)
        return (self.fails.get(call[0], 0), *value)

    def cuCtxGetCurrent(self):
        return 0, self.context

    def cuCtxGetId(self, context):
        return 0, self.context_id

    def cuCtxGetDevice(self):
        return 0, 0

    def cuDeviceGetAttribute(self, which, device):
        return 0, self.capability[("major", "minor").index(which)]

    def cuModuleLoadData(self, cubin):
        return self._answer(("load", cubin), "module")

    def cuModuleGetFunction(self, module, name):
        return self._answer(("function", name), f"function of {self.calls[-1][1]!r}")

    def cuFuncSetAttribute(self, function, which, value):
        return self._answer((which, value))

    def cuLaunchKernel(self, function, *numbers):
        *grid_and_block, shared, stream, params, _extra = numbers
        addresses = (ctypes.c_void_p * len(LAUNCH.args)).from_address(params)
        slots = [ctypes.string_at(address, 8) for address in addresses]
        return self._answer(("launch", tuple(grid_and_block), shared, stream, slots))

    def cuGetErrorName(self, code):
        return 0, b"CUDA_ERROR_OF_SOME_KIND"

    def cuGetErrorString(self, code):
        return 0, b"some kind of error"


@pytest.fixture
def driver(monkeypatch):
    """Replaces cuda.bindings.driver, and empties what the plugin remembers of the real one."""
    import cuda.bindings

    fake = Driver()
    monkeypatch.setattr(cuda.bindings, "driver", fake, raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    monkeypatch.setattr(work, "_functions", {})
    return fake


@pytest.fixture
def trt():
    return tensorrt.load()


@pytest.fixture
def plugin(trt):
    return shell._classes(trt)[0](LAUNCH, PAYLOAD)


def descs(*shapes):
    return [SimpleNamespace(dims=shape) for shape in shapes]


def launches(driver):
    return [call for call in driver.calls if call[0] == "launch"]


def test_launch(driver, plugin):
    """Grid, block, shared memory, stream, and each argument's bits in its slot, in the kernel's order."""
    attached = plugin.attach_to_context(None)
    assert driver.calls == [("load", CUBINS["sm89"]), ("function", b"run"), ("shared", 65536)]
    inputs, outputs = descs((3, 9), (5,)), descs((3, 5))
    attached.on_shape_change(inputs, outputs)
    attached.enqueue(inputs, outputs, [0x7F0000000010, 0x20], [0x30], 0, 77)
    (_, grid_and_block, shared, stream, slots) = launches(driver)[0]
    assert (grid_and_block, shared, stream) == ((6, 5, 1, 256, 1, 1), 65536, 77)
    assert [struct.unpack("<Q", slots[i])[0] for i in (0, 1, 2, 5)] == [0x20, 0x30, 0x7F0000000010, 0]
    assert struct.unpack("<i", slots[3][:4])[0] == -1
    assert struct.unpack("<f", slots[4][:4])[0] == np.float32(1e-15)


@pytest.mark.parametrize("told", [True, False])
def test_shapes_change_between_launches(driver, plugin, told):
    """Also if TensorRT launches without having said so."""
    attached = plugin.attach_to_context(None)
    for batch, length in ((1, 12), (4, 30)):
        shapes = descs((batch, length), (1,))
        if told:
            attached.on_shape_change(shapes, descs((batch, length // 2)))
        attached.enqueue(shapes, [], [16, 32], [48], 0, 0)
    assert [call[1][:3] for call in launches(driver)] == [(2, 1, 1), (8, 1, 1)]
    assert [struct.unpack("<i", call[4][3][:4])[0] for call in launches(driver)] == [2, 20]


def test_enqueue_only_launches(driver, plugin):
    """No load, no attribute, no query: what a CUDA graph may record."""
    attached = plugin.attach_to_context(None)
    attached.on_shape_change(descs((3, 9), (5,)), [])
    driver.calls.clear()
    attached.enqueue(descs((3, 9), (5,)), [], [16, 32], [48], 0, 0)
    assert [call[0] for call in driver.calls] == ["launch"]


def test_contexts_share_a_kernel_and_not_arguments(driver, plugin):
    first, second = plugin.attach_to_context(None), plugin.attach_to_context(None)
    assert [call[0] for call in driver.calls].count("load") == 1
    first.on_shape_change(descs((1, 12), (1,)), [])
    second.on_shape_change(descs((4, 30), (1,)), [])
    first.enqueue(descs((1, 12), (1,)), [], [16, 32], [48], 0, 0)
    assert struct.unpack("<i", launches(driver)[0][4][3][:4])[0] == 2
    driver.context_id = 2  # another device's context, or one that was made after the first was destroyed
    plugin.attach_to_context(None)
    assert [call[0] for call in driver.calls].count("load") == 2


def test_little_shared_memory_needs_no_attribute(driver, plugin):
    driver.capability = (8, 0)
    plugin.attach_to_context(None)
    assert driver.calls == [("load", CUBINS["sm80"]), ("function", b"run")]


def test_an_empty_tensor_launches_nothing(driver, plugin):
    attached = plugin.attach_to_context(None)
    attached.on_shape_change(descs((0, 9), (5,)), [])
    attached.enqueue(descs((0, 9), (5,)), [], [0, 0], [0], 0, 0)
    assert not launches(driver)


def raises(kind, message, call, *args):
    shell.failures.clear()
    with pytest.raises(kind, match=message) as caught:
        call(*args)
    assert list(shell.failures) == [caught.value], "kept for whoever finds that TensorRT failed"


def test_what_goes_wrong(driver, plugin):
    driver.capability = (8, 7)
    raises(LaunchError, r"got a GPU of architecture sm87; this engine has kernels for sm80, sm89", plugin.attach_to_context, None)
    driver.capability, driver.context = (8, 9), 0
    raises(work.DriverError, "no CUDA context is current", plugin.attach_to_context, None)
    driver.context = 1
    steps = {"load": "cuModuleLoadData of the sm89 cubin", "function": "cuModuleGetFunction", "shared": "65536 bytes"}
    for call, named in steps.items():
        driver.fails = {call: 200}
        raises(work.DriverError, f"Example: .*{named}.*CUDA_ERROR_OF_SOME_KIND: some kind", plugin.attach_to_context, None)
    driver.fails = {}
    shapes = descs((3, 9), (5,))
    raises(LaunchError, "enqueued without a kernel", plugin.enqueue, shapes, [], [16, 32], [48], 0, 0)
    attached = plugin.attach_to_context(None)
    raises(LaunchError, "has no value", attached.on_shape_change, descs((3,), (5,)), [])
    raises(LaunchError, "expected a number of 32 bits", attached.on_shape_change, descs((1, 2**31 + 10), (1,)), [])
    raises(LaunchError, "expected at most", attached.on_shape_change, descs((1, 1), (65536,)), [])
    raises(LaunchError, "multiples of 16 bytes", attached.enqueue, shapes, [], [16, 32], [56], 0, 0)
    driver.fails = {"launch": 1}
    raises(work.DriverError, r"cuLaunchKernel, grid \(6, 5, 1\), 256 threads", attached.enqueue, shapes, [], [16, 32], [48], 0, 0)


def test_clone_and_serialized_fields(trt, plugin):
    copy = plugin.clone()
    assert (copy.plugin_name, copy.plugin_version, copy.plugin_namespace, copy.num_outputs) == ("Example", "1", "", 1)
    copy.get_fields_to_serialize()
    assert [field.tobytes() for field in copy._fields] == [LAUNCH.to_json(), PAYLOAD]


def field(trt, name, data):
    array = np.frombuffer(data, np.int8)
    return SimpleNamespace(name=name, data=array)


def test_creator(trt):
    """From the ONNX parser, which appends a zero byte, and from an engine, which does not."""
    creator = shell._classes(trt)[1]("Example")
    for end in (b"\0", b""):
        made = creator.create_plugin(
            "node", [field(trt, "cubins", PAYLOAD + end), field(trt, "launch", LAUNCH.to_json() + end)], None
        )
        assert (made._launch, made._cubins) == (LAUNCH, PAYLOAD)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "node 'n': got no attribute 'launch'; expected launch and cubins"),
        ({"launch": LAUNCH.to_json()}, "got no attribute 'cubins'"),
        ({"launch": LAUNCH.to_json(), "cubins": b""}, "got no attribute 'cubins'"),
        ({"launch": b"{}", "cubins": b"x"}, "cannot be read"),
        ({"launch": LAUNCH.to_json().replace(b"Example", b"Another"), "cubins": PAYLOAD}, "launch description of 'Another'"),
    ],
)
def test_creator_refuses(trt, fields, message):
    creator = shell._classes(trt)[1]("Example")
    raises(LaunchError, message, creator.create_plugin, "n", [field(trt, *item) for item in fields.items()], None)


D0, D1 = ["dim", 0, 0], ["dim", 0, 1]
SIZES = {  # of inputs (4, 9) and (5,)
    "input": (D1, 9),
    "another input": (["dim", 1, 0], 5),
    "constant": (7, 7),
    "add": (["add", D0, D1], 13),
    "sub": (["sub", D1, D0], 5),
    "mul": (["mul", D0, ["add", D1, 1]], 40),
    "floordiv": (["floordiv", D1, D0], 2),
    "ceildiv": (["ceildiv", D1, D0], 3),
    "min": (["min", D1, D0], 4),
    "max": (["max", D1, D0], 9),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("size", "value"), SIZES.values(), ids=SIZES)
def test_an_op_that_no_code_knows(trt, size, value, dynamic):
    """TensorRT parses and builds it, and its output's shape is the expression's value, of fixed dimensions and of free ones."""
    op = "ExampleOfShapes"
    shell.register(trt, [op])
    launch = replace(LAUNCH, op=op, outputs=[Output(type="fp16", shape=[D0, size])])
    half = TensorProto.FLOAT16
    inputs = {"a": ["n", "m"] if dynamic else [4, 9], "b": ["k"] if dynamic else [5]}
    node = helper.make_node(
        op, list(inputs), ["c"], domain="sana", plugin_version="1", plugin_namespace="", launch=launch.to_json(), cubins=PAYLOAD
    )
    graph = helper.make_graph(
        [node],
        "example",
        [helper.make_tensor_value_info(name, half, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("c", half, [None, None])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sana", 1)]
    builder = trt.Builder(logger())
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger())
    assert parser.parse(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    expected = (4, value) if not dynamic else (-1, size if isinstance(size, int) else -1)
    assert tuple(network.get_output(0).shape) == expected
    config = builder.create_builder_config()
    if dynamic:
        profile = builder.create_optimization_profile()
        profile.set_shape("a", (4, 9), (4, 9), (8, 18))
        profile.set_shape("b", (5,), (5,), (10,))
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_register_twice_is_once(trt):
    shell.register(trt, ["ExampleForRegister"])
    shell.register(trt, ["ExampleForRegister"])
    registered = [creator.name for creator in trt.get_plugin_registry().all_creators]
    assert registered.count("ExampleForRegister") == 1


def test_register_finds_the_name_taken(trt, monkeypatch):
    shell.register(trt, ["ExampleTaken"])
    monkeypatch.setattr(shell, "_creators", {})
    with pytest.raises(RuntimeError, match=r"'ExampleTaken'.*expected it unused"):
        shell.register(trt, ["ExampleTaken"])


def test_supported_types(trt, plugin):
    linear, other, half = trt.TensorFormat.LINEAR, trt.TensorFormat.CHW32, trt.DataType.HALF
    for kind, layout, ok in ((half, linear, True), (trt.DataType.FLOAT, linear, False), (half, other, False)):
        tensors = [SimpleNamespace(desc=SimpleNamespace(type=kind, format=layout))] * 3
        assert [plugin.supports_format_combination(position, tensors, 2) for position in range(3)] == [ok] * 3
    raises(LaunchError, "got 3 inputs; expected 2", plugin.supports_format_combination, 0, [None] * 4, 3)
    assert plugin.get_output_data_types([]) == [trt.DataType.HALF]


class Products:
    """In place of cuBLASLt."""

    made: ClassVar[list] = []

    def __init__(self, dtype, *, bias, context_id):
        self.calls = [(dtype, bias, context_id)]
        self.made.append(self)

    def prepare(self, *sizes):
        self.calls.append(sizes)

    def run(self, *addresses, x_scale, w_scale):
        self.calls.append((*addresses, x_scale, w_scale))


@pytest.fixture
def linear_plugin(driver, trt, monkeypatch):
    monkeypatch.setattr(cublas_lt, "Product", Products)
    Products.made.clear()
    launch = Launch.from_json(linear.attributes("fp16", 3, 6, 8, bias=True)["launch"])
    return shell._classes(trt)[0](launch, b"")


def test_product(linear_plugin):
    """Sizes when they change, addresses at each launch; nothing for an empty tensor."""
    assert linear_plugin.get_workspace_size([], []) == cublas_lt.WORKSPACE
    attached = linear_plugin.attach_to_context(None)
    for batch in (2, 2, 0):
        attached.enqueue(descs((batch, 5, 8), (6, 8), (6,)), descs((batch, 5, 6)), [16, 32, 48], [64], 80, 7)
    assert Products.made[-1].calls == [("fp16", True, 1), (10, 6, 8), *[(16, 32, 48, 64, 80, 7, 0, 0)] * 2]


def test_product_of_fp8(driver, trt, monkeypatch):
    """Bits and scales of both, then the bias."""
    monkeypatch.setattr(cublas_lt, "Product", Products)
    Products.made.clear()
    launch = Launch.from_json(linear.fp8_attributes(3, 16, 32, bias=True)["launch"])
    attached = shell._classes(trt)[0](launch, b"").attach_to_context(None)
    attached.enqueue(descs((2, 5, 32), (16, 32), (2, 5), (16,), (16,)), [], [16, 32, 48, 64, 80], [96], 112, 7)
    assert Products.made[-1].calls == [("fp8", True, 1), (10, 16, 32), (16, 32, 80, 96, 112, 7, 48, 64)]


@pytest.mark.parametrize(
    ("shapes", "addresses", "message"),
    [
        (((2, 5, 9), (6, 8), (6,)), [16, 32, 48], r"got shapes .*; expected \[\(2, 5, 8\), \(6, 8\), \(6,\)\]"),
        (((2, 5, 8), (6, 8), (5,)), [16, 32, 48], "expected"),
        (((2, 5, 8), (6, 8), (6,)), [16, 36, 48], "expected multiples of 16 bytes"),
    ],
)
def test_product_refused(linear_plugin, shapes, addresses, message):
    attached = linear_plugin.attach_to_context(None)
    with pytest.raises(LaunchError, match=message):
        attached.enqueue(descs(*shapes), [], addresses, [64], 80, 7)


def test_product_survives_its_engine(trt, linear_plugin):
    """Its fields, made into a plugin again."""
    fields = linear_plugin.get_fields_to_serialize()
    made = shell._classes(trt)[1]("Linear").create_plugin("linear", fields, trt.TensorRTPhase.RUNTIME)
    assert made._launch == linear_plugin._launch
