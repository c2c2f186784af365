"""Engines of a TensorRT that is not there, what a program says and logs that runs them, and the pictures that are asked for."""

import subprocess
from pathlib import Path

import onnx

from engines.spec import Target

ACTIVATIONS = {"text_encoder": 5000, "text_projection": 6000, "denoiser": 70_000, "decoder": 30_000}  # bytes
TYPES = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}
REQUEST = ["--seed", 3, "--steps", 5, "--scheduler", "flow_dpm_solver", "--width", 96, "--negative", "blue"]
WORDS = {"seed": 3, "steps": 5, "scheduler": "flow_dpm_solver", "width": 96, "negative_prompts": "blue"}


def write_engine(folder: Path, component: str, target: Target, levels: bool = True) -> str:
    """levels: it is not of before, when decoders' engines had none."""
    graph = folder / component / "model.onnx"
    model = onnx.load(graph, load_external_data=False).graph
    lines = [f"graph {graph}", f"activations {ACTIVATIONS[component]}"]
    for word, tensors in (("in", model.input), ("out", model.output)):
        for each in tensors:
            kind = each.type.tensor_type
            name = "bfloat16" if each.name == "inputs_embeds" else TYPES[kind.elem_type]  # as a table on the host has them
            lines.append(f"{word} {each.name} {name} {len(kind.shape.dim)}")
    lines += ["out levels uint8 4", "out not_finite int32 1"] if levels and component == "decoder" else []
    name = f"{component}/{target}.engine"
    (folder / name).write_text("\n".join(lines))
    return name


class Ran:
    """log: what the fakes wrote, a line a call."""

    def __init__(self, done: subprocess.CompletedProcess[str], log: Path) -> None:
        self.code, self.output, self.error = done.returncode, done.stdout, done.stderr
        self.pictures = [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]
        self.log = log.read_text().splitlines() if log.exists() else []

    def count(self, word: str) -> int:
        return sum(line.startswith(word) for line in self.log)

    def runs(self, component: str) -> list[dict[str, int]]:
        """The addresses of each launch, and the arena's size as "arena"."""
        found = []
        for line in self.log:
            if line.startswith(f"run {component} arena "):
                size, *addresses = line.split()[3:]
                found.append({"arena": int(size)} | {name: int(at) for name, at in (each.split("=") for each in addresses)})
        return found
