"""Triton kernels compiled for GPUs that are not here, and the attributes of a node that carries them (plugins/launch.py).

What a kernel's file calls measured was measured on SM 90. For every other architecture a plan is reasoned, also where it is the
same one: its cubins compile, within its shared memory, and were never run.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from plugins.launch import Expression, Kernel, Launch, Output

__all__ = ["CAPABILITIES", "MAX_SHARED", "TYPES", "Cubin", "attributes", "check_type", "compile_cubin", "max_shared"]

CAPABILITIES = (80, 86, 89, 90, 100, 120, 121)  # what the ptxas that comes with Triton compiles for
MAX_SHARED = 99 * 1024  # bytes a block may have on SM 86, 89 and 120, the smallest of them
_MORE_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # CUDA's programming guide, "Technical Specifications"
TYPES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cubin:
    """A kernel for one architecture. shared: bytes of dynamic shared memory. params: how many it takes, Triton's own included."""

    code: bytes
    entry: str
    warps: int
    shared: int
    params: int


def check_type(op: str, dtype: str) -> None:
    """Raises ValueError unless dtype is one of TYPES."""
    if dtype not in TYPES:
        raise ValueError(f"{op}: got dtype {dtype!r}; expected one of {', '.join(TYPES)}")


def max_shared(capability: int) -> int:
    """Bytes of shared memory that a block may have on an SM such as 89."""
    return _MORE_SHARED.get(capability, MAX_SHARED)


def compile_cubin(
    kernel: "triton.JITFunction[Any]",
    capability: int,
    *,
    op: str,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str],
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> Cubin:
    """For an SM such as 89. No GPU needed; about 0.4 s.

    signature: Triton's type of each argument, "constexpr" for those in `constants`. aligned: arguments that are multiples of 16,
    as the plugin checks of pointers. max_registers: of a thread, a multiple of 8, so that more programs run at a time. The same
    arguments and Triton version give the same bytes, on any machine and from any folder. Raises ValueError for a capability that
    is not in CAPABILITIES.
    """
    if capability not in CAPABILITIES:
        raise ValueError(f"{op}: got target sm{capability}; expected one of {', '.join(f'sm{c}' for c in CAPABILITIES)}")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = triton.compiler.ASTSource(kernel, dict(signature), dict(constants), attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers, "enable_fp_fusion": True}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it would put the kernel's path into the cubin
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    meta = compiled.metadata
    limit = max_shared(capability)
    if meta.shared > limit or meta.global_scratch_size or meta.profile_scratch_size or meta.num_ctas != 1:
        raise RuntimeError(
            f"{op}, sm{capability} {dict(constants)}: got {meta.shared} bytes of shared memory, {meta.global_scratch_size} of "
            f"scratch, {meta.num_ctas} blocks a cluster; expected at most {limit}, 0 and 1. Triton {triton.__version__} needs "
            "another plan()"
        )
    header = re.search(rf"\.entry {meta.name}\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    if header is None:
        raise RuntimeError(
            f"{op}, sm{capability}: Triton's PTX has no entry {meta.name!r}; this Triton version is not known to work"
        )
    return Cubin(
        code=compiled.asm["cubin"],
        entry=meta.name,
        warps=meta.num_warps,
        shared=meta.shared,
        params=header[1].count(".param"),
    )


def attributes(
    op: str,
    targets: Iterable[str],
    compiled: Callable[[int], Cubin],
    *,
    inputs: Sequence[str],
    outputs: Sequence[Output],
    grid: Sequence[Expression],
    args: Sequence[list[Any]],
) -> dict[str, str | bytes]:
    """What makes a node of `op` a plugin for the GPU architectures `targets` ("sm80", "sm89", ...).

    compiled: the kernel for a capability. The rest as in plugins/launch.py; Triton's own parameters are added to args.
    plugin_version and plugin_namespace make TensorRT's ONNX parser look for a plugin; without them it inlines the function body and
    says nothing. `launch` and `cubins` are read by plugins/shell.py.
    """
    payload, kernels, num_params = b"", {}, set()
    for sm in sorted(set(targets), key=lambda name: int(name.removeprefix("sm"))):
        cubin = compiled(int(sm.removeprefix("sm")))
        kernels[str(sm)] = Kernel(
            entry=cubin.entry,
            warps=cubin.warps,
            shared=cubin.shared,
            offset=len(payload),
            size=len(cubin.code),
            sha256=hashlib.sha256(cubin.code).hexdigest(),
        )
        payload += cubin.code
        num_params.add(cubin.params)
    if len(num_params) != 1 or min(num_params) < len(args):
        raise RuntimeError(f"{op}: got kernels with {sorted(num_params)} parameters; expected one number, of at least {len(args)}")
    description = Launch(
        op=op,
        inputs=list(inputs),
        outputs=list(outputs),
        grid=list(grid),
        args=[*args, *[["null"]] * (num_params.pop() - len(args))],
        kernels=kernels,
    )
    return {"plugin_version": "1", "plugin_namespace": "", "launch": description.to_json(), "cubins": payload}
