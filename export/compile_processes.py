"""Compiles the kernels of a graph in several processes, one for each GPU architecture, into Triton's own cache on disk.

Triton holds Python's lock while it compiles, and a decoder's kernels for four architectures take a core more than a minute. Nothing
comes back but what is in that cache: add_cubins then finds it there, and says what is wrong if something is.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx

from engines.errors import BuildError
from engines.spec import Target
from export.plugin_nodes import add_cubins, has_kernel

__all__ = ["compile_ahead"]

ROOT = Path(__file__).parent.parent


def compile_ahead(graph: Path, targets: Sequence[Target]) -> None:
    """graph: an ONNX file, whose weights are not read.

    Returns at once if there is one architecture, one processor or no kernel: a process takes seconds to start.
    """
    processes = min(len(targets), len(os.sched_getaffinity(0)))
    if processes < 2 or not any(map(has_kernel, onnx.load(graph, load_external_data=False).graph.node)):
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

    def compile_for(target: Target) -> None:
        command = [sys.executable, "-m", "export.compile_processes", str(graph), str(target)]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(compile_for, targets))


if __name__ == "__main__":
    try:
        add_cubins(onnx.load(sys.argv[1], load_external_data=False), (Target(sys.argv[2]),))
    except BuildError:
        sys.exit(1)  # the process that waits meets it too, and says it
