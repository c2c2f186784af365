"""From a checkpoint to a bundle: the stages in order, and the folder that they end in.

    read the checkpoint -> export each component -> run the references -> compile each engine -> check parity -> write the bundle

Nothing at `out` changes before everything has passed, and then it changes at once.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from engines import tensorrt
from engines.bundle import Bundle
from engines.bundle_writer import write_bundle
from engines.digest import digest_of
from engines.disk import human_bytes
from engines.errors import BundleError
from engines.golden import golden_name
from engines.manifest import BundleInfo, LatentInfo, PromptInfo, TensorRTInfo, graph_name
from engines.parity_report import ParityReport
from engines.quantization_report import QUANTIZATION_NAME, RECIPE_NAME, Method
from engines.spec import (
    COMPONENTS,
    PX_PER_LATENT,
    QUANTIZED,
    ComponentName,
    Precision,
    ShapeRange,
    component_precision,
)
from engines.store import Store
from engines.token_table import TABLE_NAME
from engines.weight_report import weights_name
from export.components import Component, components, profiles, with_weights
from export.fingerprint import code, versions
from export.plans import CONV_TARGETS, check_request, decoder_plan, decoder_precision, denoiser_plan, is_cublas
from export.progress import Progress
from export.quantize import Quantized, check_asked, quantize, report_of
from export.reference import reference_dtype
from export.references import make_references, schedule_info
from export.request import BuildRequest, shape_range
from export.stages import GOLDEN_NAME, EngineFile, Result, Runner, engine_groups, parity_of, quality_of, weights_of
from export.text_plans import check_text, left_out, text_plan, wants_text_plan
from export.token_table import TABLE_FILE
from export.weight_only import check_weights, for_targets
from export.weights import DATA_NAME, PORTABLE_NAME
from runtime.ort_session import cpu_name
from runtime.prompt import PromptTokenizer
from sana_ref.checkpoint import Checkpoint, load
from sana_ref.quantization import groups_of
from sana_ref.variants import variant_of

__all__ = ["BuildResult", "build"]

SMALL_PARAMETERS = 100_000_000  # up to which whole pictures are drawn and compared
LICENCE_FILES = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """bundle: what is at `out` now. unchanged: it was there already, and nothing was done."""

    bundle: Bundle
    unchanged: bool


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """Results of the stages, by component. weights: of those in 4 or 8 bits alone. quantized: how the denoiser was, if it was."""

    components: dict[ComponentName, Component]
    graphs: dict[ComponentName, Result]
    engines: dict[ComponentName, list[EngineFile]]
    references: dict[ComponentName, Result]
    parity: dict[ComponentName, Result]
    weights: dict[ComponentName, Result]
    quantized: Quantized | None


def build(request: BuildRequest, progress: Progress) -> BuildResult:
    """Build the bundle at `request.out`. Raises SanaError, and leaves what is at `out` as it is then."""
    check_asked(request)
    check_request(request)
    check_weights(request.weights, request.targets)
    check_text(request)
    with progress.stage("read checkpoint") as stage:
        checkpoint = load(
            request.model,
            revision=request.revision,
            variant=request.variant,
            components_from=request.components_from,
            vae=request.vae,
        )
        stage.note(f"{checkpoint.name}, sha256 {checkpoint.digest[:12]}")
    runner = Runner(checkpoint=checkpoint, store=Store(request.cache), progress=progress)
    quantized = None
    if request.quantization is not None and "denoiser" in request.components:
        quantized = quantize(request, request.quantization, checkpoint, runner.store, progress)
        request = replace(request, precision=quantized.precision)
    precisions = component_precision(request.precision) | {"decoder": decoder_precision(request)}
    for line in _of_components(request, precisions["decoder"]):
        progress.say(f"  {line}")
    ranges = shape_range(
        request,
        trained_side=checkpoint.transformer_config.sample_size * PX_PER_LATENT,
        max_sequence_length=checkpoint.prompt.max_sequence_length,
    )
    everything = components(checkpoint, precisions)
    weights = for_targets(request.weights, request.targets, progress)
    everything = with_weights(everything, weights)
    unread = left_out(request)
    if unread is not None:
        progress.say(f"  {unread}")
    if wants_text_plan(request):
        component = replace(everything["text_encoder"], plan=text_plan(request, runner, everything, ranges))
        everything = {**everything, "text_encoder": component}
    if request.precision in QUANTIZED and "denoiser" in request.components:
        if quantized is None:
            quantized = _uncalibrated(request, runner, everything, ranges)
        component = replace(everything["denoiser"], plan=quantized.plan, in_engine=is_cublas(request))
        everything = {**everything, "denoiser": component}
    if precisions["decoder"] in CONV_TARGETS and "decoder" in request.components:
        plan = decoder_plan(request, runner, everything["decoder"], ranges)
        everything = {**everything, "decoder": replace(everything["decoder"], plan=plan, in_engine=True)}
    parts = _run_stages(request, runner, everything, ranges, quantized)
    result = _write(request, runner, _bundle_info(request, checkpoint, ranges, parts), parts)
    if quantized is not None:
        for line in quantized.report.lines():
            progress.say(f"  denoiser: {line}")
    return result


def _of_components(request: BuildRequest, decoder: Precision) -> Iterator[str]:
    """For people: what one precision means for each component. decoder: its precision."""
    precision = request.precision
    if precision in QUANTIZED:
        yield f"{precision} is the denoiser's linear layers: the rest of it computes in fp16, the text encoder in bf16"
    if precision is Precision.FP16:
        yield "fp16 is the denoiser's alone: Gemma-2 and DC-AE overflow in it, so text encoder and decoder are bf16"
    if decoder in CONV_TARGETS:
        yield f"decoder: {decoder} is the 3x3 convolutions of its residual blocks, in engines alone; the rest of it is bf16"
    elif precision in (Precision.FP8, Precision.NVFP4) and request.decoder_precision is None:
        yield "decoder: bf16, because FP8 convolutions are kernels of engines, and none is built"
    elif precision in QUANTIZED:
        yield "decoder: bf16"


def _uncalibrated(
    request: BuildRequest, runner: Runner, everything: Mapping[ComponentName, Component], ranges: ShapeRange
) -> Quantized:
    plan = denoiser_plan(request, runner, everything, ranges)
    dynamic = not request.targets and request.precision is not Precision.NVFP4
    method: Method = "plan" if request.plan is not None else "dynamic" if dynamic else "parity inputs"
    groups = groups_of(name for name, _ in everything["denoiser"].module.named_parameters())
    return Quantized(precision=request.precision, plan=plan, report=report_of(plan, groups, method), recipe=None)


def _run_stages(
    request: BuildRequest,
    runner: Runner,
    everything: Mapping[ComponentName, Component],
    ranges: ShapeRange,
    quantized: Quantized | None,
) -> _Parts:
    checkpoint = runner.checkpoint
    tokenizer = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt)
    wanted = {name: everything[name] for name in request.components}
    graphs = {name: runner.export(component) for name, component in wanted.items()}
    references = make_references(runner, everything, request.components, ranges)
    engines: dict[ComponentName, list[EngineFile]] = {}
    for name, component in wanted.items():
        profile = profiles(
            component,
            ranges,
            instructed_tokens=tokenizer.sequence_length(),
            embedded_guidance=checkpoint.transformer_config.guidance_embeds,
        )
        groups = engine_groups(request.targets)
        engines[name] = [runner.engine(component, graphs[name], targets, profile) for targets in groups]
    weights = {name: runner.weights(component, graphs[name], references[name]) for name, component in wanted.items()}
    parity = {name: runner.parity(component, graphs[name], references[name], engines[name]) for name, component in wanted.items()}
    return _Parts(
        components=wanted,
        graphs=graphs,
        engines=engines,
        references=references,
        parity=parity,
        weights={name: result for name, result in weights.items() if result is not None},
        quantized=quantized,
    )


def _bundle_info(
    request: BuildRequest,
    checkpoint: Checkpoint,
    ranges: ShapeRange,
    parts: _Parts,
) -> BundleInfo:
    transformer = checkpoint.transformer_config
    with_levels = bool(request.targets) and "decoder" in parts.components
    on_host = any(component.on_host for component in parts.components.values())
    return BundleInfo(
        schema_version=4 if with_levels else 3 if on_host else 2,
        model=checkpoint.name,
        model_digest=checkpoint.digest,
        variant=variant_of(transformer) or "custom",
        precision={name: component.precision for name, component in parts.components.items()},
        ranges=ranges,
        targets=request.targets,
        tensorrt=TensorRTInfo(flavor="rtx" if tensorrt.flavor() == "rtx" else "full", version=tensorrt.version())
        if request.targets
        else None,
        plugins={name: dict(component.spec.plugins) for name, component in parts.components.items()},
        schedule=schedule_info(checkpoint),
        prompt=PromptInfo(
            complex_human_instruction=checkpoint.prompt.complex_human_instruction,
            max_sequence_length=checkpoint.prompt.max_sequence_length,
            lowercase=checkpoint.prompt.lowercase,
        ),
        latents=LatentInfo(channels=transformer.in_channels, scaling_factor=checkpoint.vae_config.scaling_factor),
        guidance_embeds=transformer.guidance_embeds,
        caption_channels=transformer.caption_channels,
        token_table_rows=checkpoint.text_encoder_config.vocab_size if on_host else 0,
        licence=_licence(checkpoint),
    )


def _licence(checkpoint: Checkpoint) -> str:
    """What the model card says: the `license` of its front matter."""
    card = checkpoint.folder / "README.md"
    if card.is_file():
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
        front = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
        for line in front:
            key, _, value = line.partition(":")
            if key.strip() in ("license", "license_name") and value.strip():
                return value.strip().strip("\"'")
    return "not stated by the checkpoint"


def _files(request: BuildRequest, checkpoint: Checkpoint, parts: _Parts) -> dict[str, Path]:
    """Name in the bundle: file to copy."""
    files = {"tokenizer/tokenizer.json": checkpoint.tokenizer_path}
    for name in request.components:
        files[graph_name(name)] = parts.graphs[name].folder / PORTABLE_NAME
        files[f"{name}/{DATA_NAME}"] = parts.graphs[name].folder / DATA_NAME
        files |= {f"{name}/{engine.name}": engine.path for engine in parts.engines[name]}
        files[golden_name(name)] = parts.references[name].folder / GOLDEN_NAME
        if parts.components[name].on_host:
            files[TABLE_NAME] = parts.graphs[name].folder / TABLE_FILE
    for licence in LICENCE_FILES:
        if (checkpoint.folder / licence).is_file():
            files[licence] = checkpoint.folder / licence
    return files


def _write(request: BuildRequest, runner: Runner, info: BundleInfo, parts: _Parts) -> BuildResult:
    files = _files(request, runner.checkpoint, parts)
    drawn = None
    if _small(parts.components.values()) and set(request.components) == set(COMPONENTS):
        graphs = {name: file for name, file in files.items() if not name.endswith(".engine")}
        drawn = runner.quality(info, graphs, {name: result.key for name, result in parts.graphs.items()})
    quality, page = (None, {}) if drawn is None else quality_of(drawn)
    files |= page
    texts = _quantization_files(parts)
    key = digest_of(
        {
            "stage": "bundle",
            "info": info.model_dump(mode="json"),
            "graphs": {name: result.key for name, result in parts.graphs.items()},
            "engines": {name: [engine.key for engine in engines] for name, engines in parts.engines.items()},
            "references": {name: result.key for name, result in parts.references.items()},
            "parity": {name: result.key for name, result in parts.parity.items()},
            "quality": None if drawn is None else drawn.key,
            "quantization": [*texts.values()],
            "code": code(
                (
                    "export/build.py",
                    "engines/bundle_writer.py",
                    "engines/digest.py",
                    "engines/manifest.py",
                    "engines/parity_report.py",
                )
            ),
        }
    )
    with runner.progress.stage("write bundle") as stage:
        present = _present(request.out, runner.store, key)
        if present is not None:
            stage.cached = True
            return BuildResult(bundle=present, unchanged=True)
        report = ParityReport(
            schema_version=1 if quality is None else 2,
            reference=_reference_name(parts.components.values()),
            components={name: parity_of(parts.parity[name]) for name in request.components},
            machine=cpu_name(),
            versions=versions(),
            quality=quality,
        )
        with write_bundle(request.out) as writer:
            for name, source in files.items():
                writer.add(source, name)
            (writer.path / "parity.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
            for name, text in texts.items():
                (writer.path / name).write_text(text, encoding="utf-8")
            bundle = writer.finish(info)
        runner.store.get_or_make(key, lambda folder: _record(folder, bundle.digest))
        stage.note(f"{human_bytes(sum(f.size for f in bundle.manifest.files.values()))}, sha256 {bundle.digest[:12]}")
    return BuildResult(bundle=bundle, unchanged=False)


def _quantization_files(parts: _Parts) -> dict[str, str]:
    reports = {name: weights_of(result) for name, result in parts.weights.items()}
    found = {weights_name(name): report.model_dump_json(indent=1) + "\n" for name, report in reports.items()}
    if parts.quantized is None:
        return found
    found[QUANTIZATION_NAME] = parts.quantized.report.model_dump_json(indent=1) + "\n"
    return found if parts.quantized.recipe is None else found | {RECIPE_NAME: parts.quantized.recipe}


def _reference_name(parts: Iterable[Component]) -> Literal["fp32 PyTorch", "fp64 PyTorch"]:
    """The narrowest reference that was used: large components have fp32, small ones fp64."""
    return "fp64 PyTorch" if all(reference_dtype(each) is torch.float64 for each in parts) else "fp32 PyTorch"


def _small(parts: Iterable[Component]) -> bool:
    """Whether whole pictures are drawn on the CPU in seconds."""
    return sum(p.numel() for each in parts for p in each.module.parameters()) <= SMALL_PARAMETERS


class _Absent(Exception):
    """The cache has no such entry."""


def _record(folder: Path, digest: str) -> None:
    (folder / "bundle.json").write_text(json.dumps({"digest": digest}), encoding="utf-8")


def _present(out: Path, store: Store, key: str) -> Bundle | None:
    """The bundle at `out`, if it is whole and the one that this build would write."""

    def absent(_: Path) -> None:
        raise _Absent

    try:
        recorded = json.loads((store.get_or_make(key, absent) / "bundle.json").read_text(encoding="utf-8"))
        bundle = Bundle.open(out)
    except (_Absent, BundleError):
        return None
    return bundle if bundle.digest == recorded["digest"] else None
