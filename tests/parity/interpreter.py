"""Runs Triton kernels on a CPU, in a process of its own: Triton reads TRITON_INTERPRET once, when it is first imported."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["interpret"]

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


def main(function: str, folder: str) -> None:
    import importlib

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
