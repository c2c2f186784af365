"""Runs Triton kernels on a CPU, in a process of its own: Triton reads TRITON_INTERPRET once, when it is first imported."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["interpret", "make_language_ready_once"]

Call = tuple[tuple[torch.Tensor, ...], dict[str, object]]


def interpret(function: str, calls: list[Call]) -> list[torch.Tensor]:
    """For each (inputs, keywords) the output of `function`, "module:name", called as name(*inputs, out, **keywords).

    Each out has the shape and dtype of the call's first input and starts as NaN. All calls share one process, which takes 3 s.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(calls, Path(folder, "calls"))
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__, function, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"the interpreter process failed:\n{done.stderr}"
        return torch.load(Path(folder, "outputs"))


def make_language_ready_once() -> None:
    """Triton's interpreter puts its own functions in the place of the language's, hundreds of them, at each launch and at each
    call of a function inside a kernel, which takes most of its time. Here, once for each function: the process does nothing else.
    """
    from triton.runtime import interpreter

    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)


def _convert_to_e4m3_as_a_gpu_does() -> None:
    """Triton 3.9's interpreter loses a carry into the exponent, rounds ties up and makes NaN a number. Instead: PyTorch's
    conversion, which rounds ties to even, of what was cut to 448 before. The hardware's own is for tests on a GPU."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(data, from_type, to_type, rounding):  # numpy arrays
        if to_type != tl.float8e4nv:
            return convert(data, from_type, to_type, rounding)
        assert from_type == tl.float32
        return torch.from_numpy(data).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = converted


def main(function: str, folder: str) -> None:
    import importlib

    make_language_ready_once()
    _convert_to_e4m3_as_a_gpu_does()
    module, name = function.split(":")
    run = getattr(importlib.import_module(module), name)
    outputs = []
    for inputs, keywords in torch.load(Path(folder, "calls")):
        out = torch.full_like(inputs[0], float("nan"))
        run(*inputs, out, **keywords)
        outputs.append(out)
    torch.save(outputs, Path(folder, "outputs"))


if __name__ == "__main__":
    main(*sys.argv[1:])
