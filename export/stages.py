"""The stages of a build. Each is a function of what it says it depends on, and its result is kept by the digest of just that.

A stage loads what it needs, writes files, and lets go: one network is in memory at a time, and none while TensorRT compiles.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from engines import tensorrt
from engines.digest import digest_of
from engines.disk import human_bytes
from engines.golden import Golden, load_golden, save_golden
from engines.gpu import current_target, device_info
from engines.manifest import BundleInfo
from engines.parity_report import ComponentParity
from engines.quality_report import PAGE_NAME, QualityReport
from engines.spec import AHEAD_OF_TIME_TARGETS, Target
from engines.store import Store
from engines.weight_report import WeightReport, parse_weights
from export.cases import Arrays
from export.components import Component, Profile
from export.engine_graph import EXTRA_DATA, write_engine_graph
from export.fingerprint import code, versions
from export.onnx_export import export_module, with_function_bodies
from export.parity import bounds, measured, run_onnxruntime, run_tensorrt, summary
from export.progress import Progress, Stage
from export.qdq_nodes import quantize_graph
from export.quality import build_quality
from export.reference import PyTorchErrors, loaded, make_reference, reference_dtype, run_module, simulation
from export.stage_code import ENGINE_CODE, EXPORT_CODE, PARITY_CODE, QUALITY_CODE, REFERENCE_CODE
from export.token_table import with_rows, write_token_table
from export.weight_only import WeightsSeen, output_errors
from export.weight_only_nodes import dequantized, pack_graph
from export.weights import DATA_NAME, PORTABLE_NAME, TYPED_NAME, write_weights
from export.wide import Wide
from export.widen import widened
from plugins import shell
from sana_ref.checkpoint import Checkpoint
from sana_ref.quantization import QuantizationPlan, load_plan, plan_digest, save_plan

__all__ = [
    "GOLDEN_NAME",
    "EngineFile",
    "Result",
    "Runner",
    "engine_groups",
    "golden_of",
    "parity_of",
    "pytorch_of",
    "quality_of",
    "weights_of",
]

GOLDEN_NAME = "golden.safetensors"
_PYTORCH, _PARITY, _QUALITY, _LOG, _PLAN = "pytorch.json", "parity.json", "quality.json", "tensorrt.log", "plan.safetensors"
_MEMORY = "memory.json"  # what an engine needs on the GPU, as engines/tensorrt.py reports it
_ROLES, _WEIGHTS = "roles.json", "weights.json"  # what quantized weights lost, by role; that and what the outputs lost
# A bundle's engines run one after another in a CUDA graph. Products of narrow weights have 8 MB of scratch each, which TensorRT 1.7
# lets none share on several streams: Gemma-2-2B's arena is 3 GB then, and 0.2 GB on one. And a graph whose engines were for several
# streams, and for 4096 px, took 1.06 GB beside them on an H200, one for one stream and 2048 px 17 MB.
_ONE_STREAM = 0
_FRUGAL_BYTES = 1 << 30  # weights above this are widened one by one when a portable graph is checked


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage left in the cache. `key` stands for its content in the keys of later stages."""

    folder: Path
    key: str


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """A compiled engine and the architectures that it runs on."""

    path: Path
    targets: tuple[Target, ...]
    key: str

    @property
    def name(self) -> str:
        return "-".join(self.targets) + ".engine"

    def memory(self) -> dict[str, int]:
        """Bytes on the GPU: see engines.tensorrt.BuildReport."""
        found: dict[str, int] = json.loads((self.path.parent / _MEMORY).read_bytes())
        return found


def engine_groups(targets: tuple[Target, ...]) -> list[tuple[Target, ...]]:
    """Architectures that go into one engine: all that are compiled ahead of time; each other alone, on its own GPU."""
    ahead = tuple(target for target in targets if target in AHEAD_OF_TIME_TARGETS)
    return ([ahead] if ahead else []) + [(target,) for target in targets if target not in AHEAD_OF_TIME_TARGETS]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs stages against a checkpoint and a cache."""

    checkpoint: Checkpoint
    store: Store
    progress: Progress

    def _run(self, title: str, content: dict[str, Any], make: Callable[[Path, Stage], None], needed: int | None = None) -> Result:
        key = digest_of(content)
        with self.progress.stage(title) as stage:
            stage.cached = True

            def made(folder: Path) -> None:
                stage.cached = False
                make(folder, stage)

            return Result(folder=self.store.get_or_make(key, made, needed=needed), key=key)

    def stored(self, component: Component) -> Callable[[str], Tensor]:
        """Parameter name in the component's module -> the tensor as the checkpoint stores it."""
        source = self.checkpoint.sources[component.source]
        return lambda parameter: source.read(component.checkpoint_name(parameter))

    def loader(self, component: Component) -> Callable[[str], Tensor]:
        """As `stored`; of weights in 4 or 8 bits under 16-bit activations, what they are dequantised to."""
        load = self.stored(component)
        if component.weights is None:
            return load
        return dequantized(load, component.packed, component.dtype)

    def _weights_bytes(self, component: Component) -> int:
        return sum(p.numel() * p.element_size() for p in component.module.parameters())

    def export(self, component: Component) -> Result:
        """The folder of the portable graph, the typed graph, and the weights of both."""

        def make(folder: Path, stage: Stage) -> None:
            model, load = export_module(component.graph_module, component.graph_spec), self.stored(component)
            seen = WeightsSeen()
            if component.graph_plan is not None:
                load = quantize_graph(model, component.graph_plan, load, component.dtype, seen.add if component.weights else None)
            if component.weights is not None:
                load = pack_graph(model, load, component.packed, component.dtype, seen.add)
            size = write_weights(model, load, folder / DATA_NAME)
            if component.on_host:
                size += write_token_table(component, self.stored(component), folder)
            if component.weights is not None:
                roles = {role: each.model_dump() for role, each in seen.roles().items()}
                (folder / _ROLES).write_text(json.dumps(roles), encoding="utf-8")
            for name, graph in ((TYPED_NAME, model), (PORTABLE_NAME, widened(model))):
                ir.save(with_function_bodies(graph), folder / name)
                onnx.checker.check_model(str(folder / name), full_check=True)  # also that the data file is where it says
            kind = str(component.precision)
            if component.weights is not None:
                kind += f", weights {component.weights}"
            if component.table is not None:
                kind += f", table {'on the ' if component.on_host else ''}{component.table}"
            if component.weights is not None and component.plan is not None:
                kind += ", activations int8"
            stage.note(f"{kind}, {human_bytes(size)} of weights")

        content = {
            "stage": "export",
            "component": component.name,
            "precision": component.precision,
            "plan": _digest(component.graph_plan),
            "weights": component.weights,
            "table": component.table,
            "max_sequence_length": self.checkpoint.prompt.max_sequence_length,
            "checkpoint": self.checkpoint.component_digest(component.source),
            "code": code(EXPORT_CODE),
            "versions": versions(),
        }
        return self._run(f"export {component.name}", content, make, needed=self._weights_bytes(component))

    def engine(self, component: Component, graphs: Result, targets: tuple[Target, ...], profile: Profile) -> EngineFile:
        """Compile the typed graph for `targets`, which share one engine."""
        name = "-".join(targets) + ".engine"

        def make(folder: Path, stage: Stage) -> None:
            log: list[str] = []
            with _beside(graphs.folder / DATA_NAME, folder), (folder / name).open("wb") as file:
                expected = write_engine_graph(component, graphs.folder / TYPED_NAME, folder, targets)
                report = tensorrt.build_engine_file(
                    folder / TYPED_NAME,
                    file,
                    profiles=profile,
                    targets=targets,
                    expected_plugins=expected,
                    register_plugins=shell.register,
                    log=log.append,
                    aux_streams=_ONE_STREAM,
                )
            for each in EXTRA_DATA:
                (folder / each).unlink(missing_ok=True)
            (folder / _LOG).write_text("".join(f"{line}\n" for line in log), encoding="utf-8")
            (folder / _MEMORY).write_text(json.dumps(report.memory), encoding="utf-8")
            plugins = ", ".join(f"{count} {op}" for op, count in report.plugins.items())
            stage.note(human_bytes(report.engine_bytes) + (f", plugins: {plugins}" if plugins else ""))

        content = {
            "stage": "engine",
            "plan": _digest(component.plan),
            "graphs": graphs.key,
            "targets": targets,
            "precision": component.precision,
            "profile": profile,
            "tensorrt": [tensorrt.flavor(), tensorrt.version()],
            "code": code(ENGINE_CODE),
            "versions": versions(),
        }
        title = f"engine {component.name} {'-'.join(targets)}"
        result = self._run(title, content, make, needed=self._weights_bytes(component))
        return EngineFile(path=result.folder / name, targets=targets, key=result.key)

    def ranges(self, component: Component, make_plan: Callable[[], QuantizationPlan], depends: dict[str, Any]) -> QuantizationPlan:
        """A plan whose scales come from inputs that `depends` stands for. It is kept, not made again."""

        def make(folder: Path, stage: Stage) -> None:
            plan = make_plan()
            save_plan(plan, folder / _PLAN)
            stage.note(f"{sum(layer.format != 'none' for layer in plan.layers.values())} of {len(plan.layers)} groups")

        content = {
            "stage": "ranges",
            "component": component.name,
            "precision": component.precision,
            "weights": component.weights,
            "table": component.table,
            "checkpoint": self.checkpoint.component_digest(component.source),
            "depends": depends,
            "code": code((*REFERENCE_CODE, "export/plans.py", "export/text_plans.py")),
            "versions": versions(),
        }
        return load_plan(self._run(f"ranges {component.name}", content, make).folder / _PLAN)

    def reference(self, component: Component, cases: Callable[[], Mapping[str, Arrays]], depends: dict[str, Any]) -> Result:
        """Golden inputs and outputs, and PyTorch's own errors.

        depends: what decides the inputs, which `cases` makes, besides the weights of the component's source.
        """

        def make(folder: Path, stage: Stage) -> None:
            golden, errors = make_reference(component, cases(), self.loader(component))
            save_golden(folder / GOLDEN_NAME, golden)
            (folder / _PYTORCH).write_text(errors.model_dump_json(indent=1), encoding="utf-8")
            stage.note(f"{len(golden)} cases in {'fp64' if reference_dtype(component) is torch.float64 else 'fp32'}")

        content = {
            "stage": "reference",
            "component": component.name,
            "precision": component.precision,
            "plan": _digest(component.plan),
            "weights": component.weights,
            "table": component.table,
            "checkpoint": self.checkpoint.component_digest(component.source),
            "depends": depends,
            "code": code(REFERENCE_CODE),
            "versions": versions(),
        }
        return self._run(f"reference {component.name}", content, make)

    def weights(self, component: Component, graphs: Result, reference: Result) -> Result | None:
        """What weights in 4 or 8 bits cost: the same cases with the weights as they were. None: the component has none."""
        if component.weights is None:
            return None

        def make(folder: Path, stage: Stage) -> None:
            golden, dtype = golden_of(reference), reference_dtype(component)
            module = loaded(component.module, self.stored(component), component.dtype)
            exact = {case: run_module(module, component, each.inputs, dtype) for case, each in golden.items()}
            if component.plan is not None:  # the golden outputs are of activations that are not quantized
                golden = self._simulated(component, golden, dtype)
            report = WeightReport.model_validate(
                {
                    "format": component.weights,
                    "table": component.table,
                    "activations": None if component.plan is None else "int8",
                    "precision": component.precision,
                    "roles": json.loads((graphs.folder / _ROLES).read_bytes()),
                    "outputs": {name: each.model_dump() for name, each in output_errors(exact, golden).items()},
                }
            )
            (folder / _WEIGHTS).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")

        content = {
            "stage": "weights",
            "component": component.name,
            "plan": _digest(component.plan),
            "graphs": graphs.key,
            "reference": reference.key,
            "code": code((*REFERENCE_CODE, "export/weight_only.py", "engines/weight_report.py")),
            "versions": versions(),
        }
        result = self._run(f"weights {component.name}", content, make)
        for line in weights_of(result).lines():
            self.progress.say(f"  {component.name}: {line}")
        return result

    def _simulated(self, component: Component, golden: Mapping[str, Golden], dtype: torch.dtype) -> dict[str, Golden]:
        """The same inputs, with outputs of the component as it is quantized, all else in `dtype`."""
        module = loaded(component.module, self.loader(component), component.dtype)
        planned = simulation(component, module)  # quantizes weights as they are stored, so before they are widened
        found = {}
        with Wide(dtype), planned:
            for case, each in golden.items():
                found[case] = Golden(inputs=each.inputs, outputs=run_module(module, component, each.inputs))
        return found

    def parity(self, component: Component, graphs: Result, reference: Result, engines: Sequence[EngineFile]) -> Result:
        """Hold what was exported and compiled against the reference. Raises ParityError."""
        here = current_target() if engines else None
        engine = next((each for each in engines if here in each.targets), None)

        def make(folder: Path, stage: Stage) -> None:
            golden = golden_of(reference)
            parity = bounds(pytorch_of(reference), None if component.plan is None else golden)
            frugal = self._weights_bytes(component) > _FRUGAL_BYTES
            cases = with_rows(component, graphs.folder, golden)
            portable = run_onnxruntime(graphs.folder / PORTABLE_NAME, cases, frugal=frugal)
            for name, error in measured(component.name, "onnxruntime", portable, golden, parity).items():
                parity[name] = parity[name].model_copy(update={"onnxruntime": error})
            if engine is not None:
                compiled = run_tensorrt(engine.path, cases)
                for name, error in measured(component.name, "tensorrt", compiled, golden, parity).items():
                    parity[name] = parity[name].model_copy(update={"tensorrt": error})
            report = ComponentParity(precision=component.precision, outputs=parity)
            (folder / _PARITY).write_text(report.model_dump_json(indent=1), encoding="utf-8")

        content = {
            "stage": "parity",
            "graphs": graphs.key,
            "reference": reference.key,
            "engine": None if engine is None else [engine.key, device_info().name],
            "code": code(PARITY_CODE),
            "versions": versions(),
        }
        result = self._run(f"parity {component.name}", content, make)
        self.progress.say(summary(component.name, parity_of(result)))
        return result

    def quality(self, info: BundleInfo, files: Mapping[str, Path], depends: dict[str, Any]) -> Result:
        """The quality section and its page. depends: what decides the pictures besides the checkpoint: keys of the graphs."""

        def make(folder: Path, stage: Stage) -> None:
            section, page = build_quality(self.checkpoint, info, files, folder)
            for name, data in page.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
            (folder / _QUALITY).write_text(section.model_dump_json(indent=1), encoding="utf-8")
            stage.note(f"LPIPS to {section.against.name}: {section.lpips.mean:.4f}")

        content = {
            "stage": "quality",
            "checkpoint": self.checkpoint.digest,
            "info": info.model_dump(mode="json", exclude={"targets", "tensorrt"}),
            "depends": depends,
            "code": code(QUALITY_CODE),
            "versions": versions(),
        }
        return self._run("quality", content, make)


def _digest(plan: QuantizationPlan | None) -> str | None:
    return None if plan is None else plan_digest(plan)


@contextlib.contextmanager
def _beside(data: Path, folder: Path) -> Iterator[None]:
    """The weights under their name in `folder`, as long as the block lasts: a graph names a file beside it."""
    link = folder / data.name
    try:
        os.link(data, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(data, link)
    try:
        yield
    finally:
        link.unlink()


def parity_of(result: Result) -> ComponentParity:
    return ComponentParity.model_validate_json((result.folder / _PARITY).read_bytes())


def weights_of(result: Result) -> WeightReport:
    return parse_weights((result.folder / _WEIGHTS).read_bytes(), source=_WEIGHTS)


def quality_of(result: Result) -> tuple[QualityReport, dict[str, Path]]:
    """The section, and the page's files by their name in a bundle."""
    section = QualityReport.model_validate_json((result.folder / _QUALITY).read_bytes())
    names = [PAGE_NAME, *(str(Path(PAGE_NAME).with_name(name)) for row in section.rows for name in row.pictures)]
    return section, {name: result.folder / name for name in names}


def golden_of(reference: Result) -> dict[str, Golden]:
    return load_golden(reference.folder / GOLDEN_NAME)


def pytorch_of(reference: Result) -> PyTorchErrors:
    return PyTorchErrors.model_validate_json((reference.folder / _PYTORCH).read_bytes(), strict=False)
