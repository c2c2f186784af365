"""Products through cuBLASLt, without it: a library that does on host memory what cublasLt.h says stands in for it."""

import ctypes
from ctypes import c_float, c_int, c_int8, c_int32, c_uint64, c_void_p

import numpy as np
import pytest

from plugins import cublas_lt

ROWS, COLUMNS, DEPTH = 5, 3, 4


class Library:
    """fp32 only. Matrices are column by column; `op` is OP(A) B + bias, where OP transposes if the description says so."""

    def __init__(self) -> None:
        self.made: dict[int, object] = {}
        self.alive: set[int] = set()
        self.algorithms, self.fails = 1, {}
        self.workspaces: list[tuple[int | None, int]] = []
        self.needs, self.refuses = [0] * 8, set()  # workspace of each algorithm; those that are refused
        self.ran: list[int] = []
        self.named: dict[int, list[tuple[int, float]]] = {}  # by the mode of scales: what the heuristic answers, and its waves
        self.asked: list[tuple[int, int]] = []  # preferences

    def __getattr__(self, name):
        def call(*arguments):
            return self.fails.get(name) or getattr(self, "_" + name.removeprefix("cublasLt"))(*arguments) or 0

        return call

    def _new(self, pointer, what):
        number = len(self.made) + 1
        self.made[number] = what
        self.alive.add(number)
        ctypes.cast(pointer, ctypes.POINTER(c_void_p))[0] = number

    def _drop(self, handle):
        self.alive.remove(handle.value)

    def _Create(self, pointer):
        self._new(pointer, "handle")

    def _MatmulDescCreate(self, pointer, compute, scale):
        assert (compute, scale) == (68, 0)
        self._new(pointer, {})

    def _MatmulDescSetAttribute(self, description, attribute, value, size):
        kind = {3: c_int32, 7: c_int32, 8: c_void_p, 17: c_void_p, 18: c_void_p, 25: c_int8, 31: c_int32, 32: c_int32}[attribute]
        assert size.value == ctypes.sizeof(kind)
        self.made[description.value][attribute] = ctypes.cast(value, ctypes.POINTER(kind))[0]

    def _MatrixLayoutCreate(self, pointer, dtype, height, width, stride):
        assert dtype in (0, 2, 28)
        assert stride.value >= height.value
        self._new(pointer, (height.value, width.value, stride.value))

    def _MatmulPreferenceCreate(self, pointer):
        self._new(pointer, "preference")

    def _MatmulPreferenceSetAttribute(self, preference, attribute, value, size):
        kind = {8: c_uint64, 4: ctypes.c_uint32}[size.value]
        self.asked.append((attribute, ctypes.cast(value, ctypes.POINTER(kind))[0]))

    def _MatmulAlgoGetHeuristic(self, handle, description, a, b, c, d, preference, wanted, result, found):
        modes = [self.made[description.value].get(attribute) for attribute in (31, 32)]
        if modes[0] is not None:
            assert modes[0] == modes[1]
            answers = self.named[modes[0]]
            ctypes.cast(found, ctypes.POINTER(c_int))[0] = len(answers)
            for place, (number, waves) in enumerate(answers):
                result[place].algo[0], result[place].waves = number, waves
            return
        ctypes.cast(found, ctypes.POINTER(c_int))[0] = min(wanted, self.algorithms)
        for number in range(min(wanted, self.algorithms)):
            result[number].algo[0], result[number].workspace = number, self.needs[number]

    def _MatmulAlgoCheck(self, handle, description, a, b, c, d, algo, result):
        assert [self.made[description.value][attribute] for attribute in (31, 32)] == [3, 3]
        number = ctypes.cast(algo, ctypes.POINTER(c_uint64))[0]
        found = ctypes.cast(result, ctypes.POINTER(cublas_lt._Heuristic))[0]
        found.waves, found.workspace = dict(self.named[0])[number], self.needs[number]
        return 15 if number in self.refuses else 0

    def _matrix(self, address, layout):
        height, width, stride = self.made[layout.value]
        flat = np.ctypeslib.as_array((c_float * (stride * width)).from_address(address.value))
        return flat.reshape(width, stride).T[:height]

    def _Matmul(self, handle, description, alpha, a, a_at, b, b_at, beta, c, c_at, d, d_at, algo, workspace, size, stream):
        number = ctypes.cast(algo, ctypes.POINTER(cublas_lt._Heuristic))[0].algo[0]
        if number in self.refuses or (self.needs[number] and not workspace.value) or (workspace.value or 0) % 256:
            return 7
        self.workspaces.append((workspace.value, size.value))
        self.ran.append(number)
        how = self.made[description.value]
        left, right, out = (self._matrix(address, layout) for address, layout in ((a, a_at), (b, b_at), (d, d_at)))
        out[:] = (left.T if how.get(3) else left) @ right
        if how.get(7) == 4:
            out += np.ctypeslib.as_array((c_float * len(out)).from_address(how[8]))[:, None]

    def _drops(self, handle):
        self._drop(handle)

    _MatmulDescDestroy = _MatrixLayoutDestroy = _MatmulPreferenceDestroy = _drops


@pytest.fixture
def library(monkeypatch):
    fake = Library()
    monkeypatch.setattr(cublas_lt, "_library", lambda: fake)
    cublas_lt._handle.cache_clear()
    yield fake
    cublas_lt._handle.cache_clear()


def at(array) -> int:
    return array.ctypes.data


@pytest.mark.parametrize("bias", [True, False])
def test_product(library, bias):
    """Also for another size, after which nothing of the first is left."""
    product = cublas_lt.Product("fp32", bias=bias, context_id=1)
    rng = np.random.default_rng(0)
    for rows in (ROWS, 2):
        x, w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, DEPTH), (COLUMNS, DEPTH), (COLUMNS,)))
        out = np.full((rows, COLUMNS), np.nan, np.float32)
        product.prepare(rows, COLUMNS, DEPTH)
        product.run(at(x), at(w), at(b) if bias else 0, at(out), 0, 0)
        np.testing.assert_allclose(out, x @ w.T + (b if bias else 0), rtol=1e-6)
    product.close()
    assert [library.made[number] for number in library.alive] == ["handle"]
    assert (1, 32 << 20) in library.asked
    assert {(attribute, 16) for attribute in (5, 6, 7, 8)} <= set(library.asked)


def test_no_algorithm(library):
    library.algorithms = 0
    with pytest.raises(cublas_lt.CublasError, match="got no algorithm for 5 x 3 x 4; expected one"):
        cublas_lt.Product("fp32", bias=False, context_id=1).prepare(ROWS, COLUMNS, DEPTH)


@pytest.mark.parametrize("needs", [0, 4096])
def test_a_workspace_at_an_address_that_is_refused(library, needs):
    """As TensorRT gives it: a multiple of 128. None is passed where none is needed, else its part from a multiple of 256 on."""
    library.algorithms, library.needs = 1, [needs]
    run_once(library, workspace=128)
    assert library.workspaces == [(256, 32 << 20) if needs else (None, 0)] * 2
    assert 256 + (32 << 20) <= 128 + cublas_lt.WORKSPACE


def run_once(library, workspace=0):
    product = cublas_lt.Product("fp32", bias=False, context_id=1)
    x, w, out = np.ones((ROWS, DEPTH), np.float32), np.ones((COLUMNS, DEPTH), np.float32), np.zeros((ROWS, COLUMNS), np.float32)
    product.prepare(ROWS, COLUMNS, DEPTH)
    for _ in range(2):
        product.run(at(x), at(w), 0, at(out), workspace, 0)
    assert (out == DEPTH).all()


def test_next_algorithm_where_the_first_is_refused(library):
    library.algorithms, library.refuses = 3, {0}
    run_once(library)
    assert library.ran == [1, 1]


def test_without_a_workspace_those_that_need_none(library):
    library.algorithms, library.needs = 3, [4096, 4096, 0]
    run_once(library)
    assert library.ran == [2, 2]
    library.needs = [4096] * 3
    with pytest.raises(cublas_lt.CublasError, match="without a workspace"):
        run_once(library)


@pytest.mark.parametrize(
    ("own", "others", "refuses", "needs", "order"),
    [
        (2.18, [(1, 0.97), (2, 1.7), (3, 1.1)], set(), {}, [1, 2, 0]),  # as 2240 columns of 2048 rows are; 3 is as bad
        (2.18, [(1, 0.97), (2, 1.7)], {1}, {}, [2, 0]),
        (2.18, [(1, 0.97)], set(), {1: 64 << 20}, [0]),
        (10.7, [(1, 0.99)], set(), {}, [0]),  # well filled: as it was
        (0.0, [(1, 0.99)], set(), {}, [0]),  # cuBLASLt does not say
    ],
)
def test_fp8_takes_blocks_that_fill_their_waves(library, own, others, refuses, needs, order):
    library.named, library.refuses = {3: [(0, own)], 0: others}, refuses
    library.needs = [needs.get(number, 0) for number in range(8)]
    product = cublas_lt.Product("fp8", bias=True, context_id=1)
    product.prepare(2048, 2240, 2240)
    assert [each.algo[0] for each in product.candidates] == order
    assert [library.made[product._description.value][attribute] for attribute in (31, 32)] == [3, 3]


def test_all_refused(library):
    library.algorithms, library.refuses = 2, {0, 1}
    with pytest.raises(cublas_lt.CublasError, match=r"got status 7 .* for \(5, 3, 4\), x 0x.*, workspace 0x0"):
        run_once(library)


@pytest.mark.parametrize("call", ["cublasLtCreate", "cublasLtMatmulDescCreate", "cublasLtMatmul"])
def test_refused(library, call):
    library.fails[call] = 14
    zeros = np.zeros((ROWS, DEPTH), np.float32)

    def multiply():
        product = cublas_lt.Product("fp32", bias=False, context_id=1)
        product.prepare(ROWS, COLUMNS, DEPTH)
        product.run(at(zeros), at(zeros), 0, at(zeros), 0, 0)

    with pytest.raises(cublas_lt.CublasError, match=f"{call}: got status 14"):
        multiply()


def test_not_installed(monkeypatch):
    monkeypatch.setattr(cublas_lt, "paths", lambda: ["libnothing.so.13", "/nowhere/libcublasLt.so.13"])
    cublas_lt._library.cache_clear()
    with pytest.raises(cublas_lt.CublasError, match=r"got no cuBLASLt \(libnothing.*nowhere.*pip install 'sana-deploy"):
        cublas_lt._library()


def test_paths(tmp_path, monkeypatch):
    """The search path before the installed packages, CUDA 13 before 12."""
    (tmp_path / "nvidia" / "cu13").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "nvidia", raising=False)
    paths = cublas_lt.paths()
    assert paths[:2] == ["libcublasLt.so.13", str(tmp_path / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13")]
    assert "libcublasLt.so.12" in paths


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_on_a_gpu(dtype):
    """As exact as PyTorch, at sizes of a model and at odd ones, also out of a CUDA graph."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    torch.manual_seed(0)
    for rows, columns, depth in ((2048, 2240, 5600), (2, 13440, 2240), (77, 120, 64)):
        x, w = (torch.randn(size, device="cuda").to(kind) for size in ((rows, depth), (columns, depth)))
        bias, out = torch.randn(columns, device="cuda").to(kind), torch.empty(rows, columns, device="cuda", dtype=kind)
        workspace = torch.empty(cublas_lt.WORKSPACE, dtype=torch.uint8, device="cuda")
        product = cublas_lt.Product(dtype, bias=True, context_id=1)
        product.prepare(rows, columns, depth)

        def run(product=product, x=x, w=w, bias=bias, out=out, workspace=workspace):
            stream = torch.cuda.current_stream().cuda_stream
            product.run(x.data_ptr(), w.data_ptr(), bias.data_ptr(), out.data_ptr(), workspace.data_ptr(), stream)

        exact = x.double() @ w.double().T + bias.double()
        peer = (torch.nn.functional.linear(x, w, bias).double() - exact).norm()
        run()
        first = out.clone()
        assert (out.double() - exact).norm() <= 2 * peer
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        out.zero_()
        graph.replay()
        assert torch.equal(out, first)


@pytest.mark.gpu
def test_fp8_on_a_gpu():
    """As exact as PyTorch with a scale a row, at sizes whose blocks fill their waves and at others."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0, where cuBLASLt has a scale a row")
    torch.manual_seed(0)
    for rows, columns, depth in ((2048, 2240, 2240), (2048, 2240, 5600), (2048, 1152, 2880), (2048, 11200, 2240), (77, 112, 64)):
        x, w = (torch.randn(size, device="cuda").to(torch.float8_e4m3fn) for size in ((rows, depth), (columns, depth)))
        x_scale, w_scale = (0.5 + torch.rand(size, device="cuda") for size in (rows, columns))
        bias, out = torch.randn(columns, device="cuda").half(), torch.empty(rows, columns, device="cuda", dtype=torch.half)
        workspace = torch.empty(cublas_lt.WORKSPACE, dtype=torch.uint8, device="cuda")
        product = cublas_lt.Product("fp8", bias=True, context_id=1)
        product.prepare(rows, columns, depth)
        addresses = [tensor.data_ptr() for tensor in (x, w, bias, out, workspace)]
        scales = {"x_scale": x_scale.data_ptr(), "w_scale": w_scale.data_ptr()}
        product.run(*addresses, torch.cuda.current_stream().cuda_stream, **scales)
        exact = (x.double() * x_scale.double()[:, None]) @ (w.double() * w_scale.double()[:, None]).T + bias.double()
        peer = torch._scaled_mm(x, w.t(), x_scale[:, None], w_scale[None], out_dtype=torch.bfloat16, use_fast_accum=True)
        peer_error = (peer.double() + bias.double() - exact).norm()
        assert (out.double() - exact).norm() <= 2 * peer_error, (rows, columns, depth)
