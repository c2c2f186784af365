"""Graphs of the smallest quantised denoiser, ready to be compiled, and how far an engine of them may be off the simulation.

    python tests/quantized_engines.py FOLDER sm90     # makes the graphs of one architecture, for a machine without the exporter

A machine with a GPU that has no ONNX Runtime, or another PyTorch, takes them from the folder that SANA_TEST_GRAPHS names.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from engines import tensorrt
from engines.golden import Golden, load_golden, save_golden
from engines.parity_report import ErrorStats, bound_from, check_size, measure, pooled
from engines.spec import FP8_TARGETS, Target
from export.weights import TYPED_NAME
from plugins import shell

GIVEN = "SANA_TEST_GRAPHS"
QDQ = "fp8 qdq"  # with TensorRT's own products on sm90 too
SIDES = (64, 128, 192)  # px of the smallest size; each has one that is wider, too
_GOLDEN, _OTHERS, _BUILD = "golden.safetensors", "others.safetensors", "build.json"
Outputs = Mapping[str, Mapping[str, np.ndarray]]  # case: output: array


@dataclass(frozen=True, kw_only=True)
class EngineCase:
    """golden: outputs are the simulation's in fp32. plain: the same model's without quantisation. own: the simulation in fp16."""

    folder: Path  # with the graph and its weights
    golden: dict[str, Golden]
    plain: Outputs
    own: Outputs
    profile: dict[str, Any]
    plugins: dict[str, int]

    def build(self, path: Path, targets: tuple[Target, ...]) -> tensorrt.BuildReport:
        """Raises BuildError as TensorRT refuses."""
        with path.open("wb") as file:
            return tensorrt.build_engine_file(
                self.folder / TYPED_NAME,
                file,
                profiles=self.profile,
                targets=targets,
                expected_plugins=self.plugins,
                register_plugins=shell.register,
            )

    def complaints(self, got: Outputs) -> list[str]:
        """What is wrong with an engine's outputs, a sentence each.

        Of all cases together they may be off the simulation in fp32 by twice what PyTorch's in fp16 is. A number that is rounded to
        the other neighbour in a case or two makes a factor of 2 of one case alone. And they are nearer to the simulation than to
        the model as it was: else something is not quantised.
        """
        exact = {case: each.outputs for case, each in self.golden.items()}
        wrong = []
        for name, own in of_all(self.own, exact).items():
            error, plain = of_all(got, exact)[name], of_all(got, self.plain)[name]
            wrong += [f"{name}: {sentence}" for sentence in check_size(error, bound_from(own))]
            if error.rms >= plain.rms:
                wrong.append(f"{name}: {error.rms:.2e} off the simulation and {plain.rms:.2e} off the model that is not quantised")
        return wrong

    def summary(self, got: Outputs) -> str:
        """One line for people: how much of what it may be the error is, by output."""
        exact = {case: each.outputs for case, each in self.golden.items()}
        own, found = of_all(self.own, exact), of_all(got, exact)
        return "; ".join(
            f"{name}: rms {found[name].rms:.2e}, {found[name].rms / own[name].rms:.2f} x PyTorch's in fp16; "
            f"max {found[name].max / own[name].max:.2f} x"
            for name in own
        )


def of_all(got: Outputs, exact: Outputs) -> dict[str, ErrorStats]:
    """By output, of all cases together."""
    names = next(iter(exact.values()))
    return {
        name: pooled([(measure(got[case][name], each[name]), each[name].size) for case, each in exact.items()]) for name in names
    }


def engine_case(kind: str, targets: tuple[Target, ...]) -> EngineCase:
    """kind: int8, fp8, nvfp4 or QDQ. Made here, unless SANA_TEST_GRAPHS has it."""
    if given := os.environ.get(GIVEN):
        folder = Path(given) / "-".join([kind, *targets])
    else:
        from tiny_build import shared

        folder = shared() / "-".join([kind, *targets])
        if not folder.exists():
            folder.mkdir()
            make(kind, targets, folder)
    others: dict[str, dict[str, dict[str, np.ndarray]]] = {"own": {}, "plain": {}}
    for key, array in load_file(folder / _OTHERS).items():
        which, name, output = key.split("/")
        others[which].setdefault(name, {})[output] = array
    build = json.loads((folder / _BUILD).read_text())
    return EngineCase(
        folder=folder,
        golden=load_golden(folder / _GOLDEN),
        **others,
        profile=build["profile"],
        plugins=build["plugins"],
    )


def make(kind: str, targets: tuple[Target, ...], folder: Path) -> None:
    """Write what engine_case reads."""
    import onnx_ir as ir  # only here, as all of the exporter
    import torch
    from quantized_denoiser import CUBLAS, denoiser, everything, exported, plan, simulated
    from tiny_build import RANGES, runner

    from export.components import profiles
    from export.engine_graph import write_engine_graph
    from export.onnx_export import with_function_bodies
    from export.qdq_nodes import quantize_graph
    from export.references import denoiser_inputs
    from export.weights import DATA_NAME, write_weights
    from sana_ref.quantization import QuantizationPlan

    inputs = {}
    for side in SIDES:
        found = denoiser_inputs(runner(), everything(), RANGES.model_copy(update={"min_side": side, "opt_side": side}))[0]()
        inputs |= {f"{case}-{side}": each for case, each in found.items()}
    in_engine = kind == "fp8" and targets == (Target.SM90,)
    chosen = plan(CUBLAS if in_engine else kind)
    if kind != "nvfp4":  # low-rank branches are beside 4-bit weights alone (export/quantization_plan.py)
        kept = {name: tensor for name, tensor in chosen.tensors.items() if name.endswith(".smooth")}
        # Behind the norm there is none, so that it quantises itself (export/epilogue_nodes.py); two products are smoothed still.
        kept = {name: tensor for name, tensor in kept.items() if not name.endswith("ff.conv_inverted.smooth")}
        chosen = chosen.model_copy(update={"tensors": kept})
    exact, own = (simulated(chosen, dtype, inputs) for dtype in (torch.float32, torch.float16))
    plain = simulated(QuantizationPlan(layers={}), torch.float32, inputs)
    save_golden(folder / _GOLDEN, {case: Golden(inputs=dict(each), outputs=exact[case]) for case, each in inputs.items()})
    others = {"own": own, "plain": plain}
    flat = {
        f"{which}/{case}/{name}": x for which, each in others.items() for case, found in each.items() for name, x in found.items()
    }
    save_file(flat, folder / _OTHERS)

    model, load = exported().clone(), runner().loader(denoiser())
    if not in_engine:
        load = quantize_graph(model, chosen, load, torch.float16)
    write_weights(model, load, folder / DATA_NAME)
    typed = folder / "exported.onnx"
    ir.save(with_function_bodies(model), typed)
    component = replace(denoiser(), plan=chosen, in_engine=in_engine)
    plugins = write_engine_graph(component, typed, folder, targets)
    typed.unlink()
    profile = profiles(component, RANGES, instructed_tokens=60, embedded_guidance=False)
    (folder / _BUILD).write_text(json.dumps({"profile": profile, "plugins": plugins}))


def kinds(target: Target) -> list[str]:
    """What can be built for it."""
    return ["int8", *(["fp8"] if target in FP8_TARGETS else []), *(["nvfp4"] if target in (Target.SM120, Target.SM121) else [])]


if __name__ == "__main__":
    os.environ.setdefault("SANA_TESTS_CACHE", tempfile.mkdtemp(prefix="sana-tests-cache-"))
    for each in (*kinds(Target(sys.argv[2])), *([QDQ] if sys.argv[2] == Target.SM90 else [])):
        out = Path(sys.argv[1]) / f"{each}-{sys.argv[2]}"
        out.mkdir(parents=True)
        make(each, (Target(sys.argv[2]),), out)
