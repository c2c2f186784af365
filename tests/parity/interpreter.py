"""Runs Triton kernels on a CPU, in processes of their own: Triton reads TRITON_INTERPRET once, when it is first imported."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

__all__ = ["interpret", "make_language_ready_once", "run_interpreted"]

Call = tuple[tuple[torch.Tensor, ...], dict[str, object]]


def interpret(function: str, calls: list[Call]) -> list[torch.Tensor]:
    """For each (inputs, keywords) the output of `function`, "module:name", called as name(*inputs, out, **keywords).

    Each out has the shape and dtype of the call's first input and starts as NaN. All calls share one process.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(calls, Path(folder, "calls"))
        run_interpreted("import sys; from parity.interpreter import main; main(*sys.argv[1:])", function, folder)
        return torch.load(Path(folder, "outputs"))


def run_interpreted(code: str, *arguments: str) -> None:
    """`python -c code arguments` where kernels are interpreted, with this process's sys.path; fails where it does.

    A fork of one that has imported PyTorch and Triton, which takes 3 s, and nothing else: each `code` imports the kernels anew.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as said:
        request = {"code": code, "arguments": arguments, "path": sys.path, "environment": dict(os.environ), "said": said.name}
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer == "0\n", f"the interpreter process failed:\n{Path(said.name).read_text(errors='replace')[-6000:]}"


@functools.cache
def _server() -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | INTERPRETED | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.Popen([sys.executable, __file__], **pipes, text=True, env=environment)

    def stop() -> None:
        started.communicate()  # the end of its input

    atexit.register(stop)
    return started


INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def _serve() -> None:
    """Forks for each line of its input, and says how that ended."""
    import triton.runtime.interpreter  # noqa: F401  for the forks

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _become(**json.loads(line))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)  # never back into the loop
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(code: str, arguments: list[str], path: list[str], environment: dict[str, str], said: str) -> None:
    """The process that run_interpreted promises."""
    file = os.open(said, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment | INTERPRETED)
    sys.path[:], sys.argv = path, ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


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
    _serve()
