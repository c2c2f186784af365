"""How one kernel is launched, as data: what a node carries so that a plugin which knows no op can run it.

A node of domain `sana` has two attributes. `cubins` is the compiled kernel for each GPU architecture, end to end. `launch` is
JSON, read here, that says what each cubin's entry is called and how grid, scalars and output shapes follow from input shapes.
Shapes are small integer expressions in prefix form, so that neither Python nor C++ needs a parser or an `eval`:

    expression   7 | ["dim", INPUT, AXIS] | [OPERATION, expression, expression]
    OPERATION    add  sub  mul  floordiv  ceildiv  min  max      (the operations that TensorRT has on dimensions)

Fields of format 2, every one required, no others allowed:

    format    2
    op        the op's name, for messages
    inputs    [TYPE, ...]                                  TYPE is one of TYPES
    outputs   [{"type": TYPE, "shape": [expression, ...]}, ...]
    grid      [expression, expression, expression]         thread blocks
    args      [["in", i] | ["out", i] | ["i32", expression] | ["f32", number] | ["null"], ...]   in the kernel's order;
              "null" is a pointer that is 0 (Triton kernels end with two, for scratch memory that ours do not use)
    kernels   {"sm89": {"entry", "warps", "shared" (bytes), "offset", "size" (bytes, in cubins), "sha256"}, ...}
    product   null; or {"rows", "columns", "depth"}, expressions each: no kernel is launched, but cuBLASLt multiplies the inputs
              x (rows, depth), weight (columns, depth) and, if there is a third, adds bias (columns,); grid and args are unused.
              Where x and weight are int8, they are the bits of FP8 (e4m3), and two fp32 inputs follow them: the scales of x's rows
              and of weight's

Why not one plugin class per op, or a launch function in C++: an op would then exist twice, and an engine would only run where that
code is installed. Needs the standard library only.
"""

import hashlib
import json
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FORMAT", "TYPES", "Expression", "Kernel", "Launch", "LaunchError", "Output", "Product", "evaluate"]

FORMAT = 2
TYPES = ("fp32", "fp16", "bf16", "fp8", "int32", "int64", "int8", "uint8", "bool")  # fp8: e4m3
PRODUCTS: dict[tuple[str, ...], str] = {  # types of the inputs, without a bias, and of the output, which a bias shares
    ("fp32", "fp32"): "fp32",
    ("fp16", "fp16"): "fp16",
    ("bf16", "bf16"): "bf16",
    ("int8", "int8", "fp32", "fp32"): "fp16",
}
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "ceildiv": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}
MAX_DEPTH = 8  # of an expression; ours reach 2, and a hostile file must not exhaust the stack

Expression = int | list[Any]
Dims = Sequence[Sequence[int]]


class LaunchError(ValueError):
    """A node's launch description or cubins cannot be used: malformed, changed, or not made for these shapes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One architecture's cubin. offset and size in bytes of the node's `cubins`; shared in bytes of dynamic shared memory."""

    entry: str
    warps: int
    shared: int
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    type: str
    shape: list[Expression]


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Sizes of out (rows, columns) = x (rows, depth) times weight (columns, depth), transposed."""

    rows: Expression
    columns: Expression
    depth: Expression


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The `launch` attribute; the module's docstring explains each field. Checked when built."""

    op: str
    inputs: list[str]
    outputs: list[Output]
    grid: list[Expression]
    args: list[list[Any]]
    kernels: dict[str, Kernel]
    product: Product | None = None

    def __post_init__(self) -> None:
        for kind in (*self.inputs, *(output.type for output in self.outputs)):
            if kind not in TYPES:
                raise LaunchError(f"{self.op}: got tensor type {kind!r}; expected one of {', '.join(TYPES)}")
        if len(self.grid) != 3:
            raise LaunchError(f"{self.op}: got a grid of {len(self.grid)} numbers; expected 3")
        for expression in (*self.grid, *(size for output in self.outputs for size in output.shape)):
            _check(expression, len(self.inputs), self.op)
        for arg in self.args:
            self._check_arg(arg)
        if self.product is not None:
            self._check_product(self.product)
        for sm, kernel in self.kernels.items():
            counts = (kernel.warps, kernel.shared, kernel.offset, kernel.size)
            whole = all(type(count) is int and 0 <= count < 2**31 for count in counts)
            if not whole or kernel.size == 0 or not 1 <= kernel.warps <= 32 or not kernel.entry:
                raise LaunchError(f"{self.op}, {sm}: got {kernel}; expected whole numbers, 1 to 32 warps, a cubin and an entry")

    def _check_arg(self, arg: list[Any]) -> None:
        match arg:
            case ["in", int(index)] if 0 <= index < len(self.inputs):
                return
            case ["out", int(index)] if 0 <= index < len(self.outputs):
                return
            case ["i32", expression]:
                _check(expression, len(self.inputs), self.op)
            case ["f32", float() | int()] | ["null"]:
                return
            case _:
                raise LaunchError(
                    f'{self.op}: got kernel argument {arg!r}; expected ["in"|"out", index], ["i32", …], ["f32", …] or ["null"]'
                )

    def _check_product(self, product: Product) -> None:
        for expression in (product.rows, product.columns, product.depth):
            _check(expression, len(self.inputs), self.op)
        inputs, outputs = tuple(self.inputs), [output.type for output in self.outputs]
        biased = PRODUCTS.get(inputs[:-1]) == inputs[-1] if inputs else False
        if self.kernels or outputs != [PRODUCTS.get(inputs[:-1] if biased else inputs)]:
            raise LaunchError(
                f"{self.op}: got a product of {self.inputs} to {outputs} and {len(self.kernels)} kernels; expected no kernels, and "
                f"{' or '.join(f'{list(known)} to {out}' for known, out in PRODUCTS.items())}, with or without a bias of that type"
            )

    def to_json(self) -> bytes:
        """Canonical: the same launch gives the same bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Launch":
        """Raises LaunchError for anything that is not a launch of this format."""
        try:
            fields = json.loads(data)
            found = fields.pop("format")
            if found != FORMAT:
                raise LaunchError(f"got launch format {found!r}; expected {FORMAT}. Build the engine again with this version")
            fields["outputs"] = [Output(**output) for output in fields["outputs"]]
            fields["kernels"] = {sm: Kernel(**kernel) for sm, kernel in fields["kernels"].items()}
            fields["product"] = Product(**fields["product"]) if fields["product"] is not None else None
            return cls(**fields)
        except LaunchError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise LaunchError(
                f"got a launch description that cannot be read ({error!r}); expected JSON of format {FORMAT}"
            ) from error

    def cubin(self, cubins: bytes, sm: str) -> bytes:
        """The cubin of architecture `sm` ("sm89") out of the node's `cubins`.

        Raises LaunchError if there is none for `sm`, or if its bytes are not those that were compiled.
        """
        kernel = self.kernels.get(sm)
        if kernel is None:
            raise LaunchError(
                f"{self.op}: got a GPU of architecture {sm}; this engine has kernels for {', '.join(sorted(self.kernels))}. "
                f"Build it again with {sm} among its targets"
            )
        cubin = cubins[kernel.offset : kernel.offset + kernel.size]
        if hashlib.sha256(cubin).hexdigest() != kernel.sha256:
            raise LaunchError(f"{self.op}, {sm}: the cubin's SHA-256 is not {kernel.sha256}, as expected. Build the engine again")
        return cubin


def _check(expression: Expression, num_inputs: int, op: str, depth: int = 0) -> None:
    match expression:
        case bool():
            pass
        case int():
            return
        case ["dim", int(index), int(axis)] if 0 <= index < num_inputs and 0 <= axis < 8:
            return
        case [str(name), left, right] if name in OPERATIONS and depth < MAX_DEPTH:
            _check(left, num_inputs, op, depth + 1)
            _check(right, num_inputs, op, depth + 1)
            return
    raise LaunchError(
        f'{op}: got expression {reprlib.repr(expression)}; expected an integer, ["dim", input, axis] of {num_inputs} inputs, '
        f"or [{'|'.join(OPERATIONS)}, a, b], at most {MAX_DEPTH} deep"
    )


def evaluate(expression: Expression, dims: Dims) -> int:
    """The value of a checked expression, where `dims[i]` is input i's shape. Raises LaunchError if the shapes do not fit it."""
    if isinstance(expression, int):
        return expression
    try:
        if expression[0] == "dim":
            return int(dims[expression[1]][expression[2]])
        return OPERATIONS[expression[0]](evaluate(expression[1], dims), evaluate(expression[2], dims))
    except (IndexError, ZeroDivisionError) as error:
        raise LaunchError(f"got shapes {[tuple(d) for d in dims]}, on which {expression!r} has no value ({error})") from error
