"""The whole pipeline's GPU memory in each precision, of fp16's, reckoned from engines that are built here: no GPU is needed.

    python benchmarks/quantized_memory.py --variant sana_1600m_1024px --recipes int8,fp8,nvfp4 --work /tmp/memory --record
    python benchmarks/quantized_memory.py --model models/sana-tiny --work /tmp/memory

    memory = weights of the four engines + the largest of their activations, which share an arena + inputs and outputs

all for one picture of the model's size, at batch 1 with guidance. What TensorRT says an engine needs is in its build's log
(engines/tensorrt.py). Left out is what no precision changes: the driver's context, code of kernels, and page-locked host memory. A
table of tokens on the host is in no engine; its rows are an input. fp16 is as it is built by default, with the table in its engine.

Blocks of a network are alike, so a large one is not built whole: engines with one and with two of its blocks give what a block adds
and what all the rest takes, and the sum is exact for weights. Activations of a block are gone before the next one's: their
difference is added likewise, and is near zero. Weights are random, since none of this depends on them.
--record appends quant_FORMAT_memory_ratio of sana_1600m_1024px; of others quant_FORMAT_MODEL_memory_ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import record
from benchmarks.quantized_sizes import TARGETED
from benchmarks.random_checkpoint import write_random_checkpoint
from engines.disk import human_bytes
from engines.errors import BuildError, SanaError
from engines.spec import COMPONENTS, LEVELS, PX_PER_LATENT, ComponentName, Precision, ShapeRange, Target, component_precision
from engines.store import Store
from export.components import Component, Profile, components, profiles, with_weights
from export.plans import usual_decoder
from export.progress import Progress
from export.recipe import Recipe, load_recipe
from export.stages import Runner
from export.weight_only import text_weights
from runtime.prompt import PromptTokenizer
from sana_ref.checkpoint import Checkpoint, load
from sana_ref.quantization import LayerPlan, QuantizationPlan, groups_of
from sana_ref.quantized_convs import conv_groups, conv_plan
from sana_ref.variants import GEMMA_2_2B, VARIANTS

__all__ = ["Memory", "extrapolated", "main", "total", "transfers"]

BLOCKS = (1, 2)  # of the networks that stand for a large one
SCALE = 0.05  # of quantized activations: any


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the GPU. weights: of an engine, what it keeps besides included. activations: its need of the arena."""

    weights: int
    activations: int


def extrapolated(small: Memory, large: Memory, blocks: int) -> Memory:
    """Of a network with `blocks` blocks, from two of it with BLOCKS of them."""
    steps = (blocks - BLOCKS[0]) // (BLOCKS[1] - BLOCKS[0])
    grown = {
        field: getattr(small, field) + steps * (getattr(large, field) - getattr(small, field))
        for field in ("weights", "activations")
    }
    return Memory(weights=grown["weights"], activations=max(grown["activations"], small.activations))


def total(parts: Mapping[ComponentName, Memory], buffers: int) -> int:
    return sum(part.weights for part in parts.values()) + max(part.activations for part in parts.values()) + buffers


def transfers(everything: Mapping[ComponentName, Component], shapes: Mapping[ComponentName, Profile], blocks: int) -> int:
    """Bytes of inputs and outputs, those that two components share once; keys and values of `blocks` blocks."""
    sizes: dict[str, int] = {}
    for name, component in everything.items():
        largest = {each: shape[2] for each, shape in shapes[name].items()}
        for tensor in component.graph_spec.inputs:
            sizes[tensor.name] = int(np.prod(largest[tensor.name])) * tensor.torch_dtype.itemsize
    batch, _, height, width = shapes["decoder"]["latents"][2]
    sizes[LEVELS] = batch * 3 * height * width * PX_PER_LATENT**2
    sizes["images"] = sizes[LEVELS] * torch.float32.itemsize
    sizes |= dict.fromkeys(("next_latents", "prediction"), sizes["latents"])
    held = everything["denoiser"].spec.inputs
    there = next(each.dims[0] for each in held if each.name == "text_keys")
    assert isinstance(there, int)
    sizes |= {name: sizes[name] // there * blocks for name in ("text_keys", "text_values")}
    return sum(sizes.values())


def _plan(component: Component, recipe: Recipe) -> QuantizationPlan:
    """As a calibration's by size: scales, smoothing and low-rank branches are there, whatever is in them."""
    parameters = dict(component.module.named_parameters())
    groups, of_text = groups_of(parameters), component.name == "text_encoder"
    formats = recipe.of_text(list(groups)) if of_text else recipe.formats_of(list(groups))
    layers, tensors = {}, {}
    smooth = recipe.text_encoder_smoothquant if of_text else recipe.awq if recipe.smoothquant is None else recipe.smoothquant
    for group, names in groups.items():
        columns, depth = sum(parameters[name].shape[0] for name in names), parameters[names[0]].shape[1]
        layers[group] = LayerPlan(format=formats[group], input_scale=None if formats[group] == "none" else SCALE)
        if formats[group] == "none":
            continue
        if smooth is not None:
            tensors[f"{group}.smooth"] = torch.full((depth,), 1.25)
        if recipe.low_rank and formats[group] == "nvfp4":
            tensors[f"{group}.low_rank_down"] = torch.full((recipe.low_rank, depth), 0.01)
            tensors[f"{group}.low_rank_up"] = torch.full((columns, recipe.low_rank), 0.01)
    return QuantizationPlan(layers=layers, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class _Built:
    parts: dict[ComponentName, Memory]
    buffers: int


def _build(checkpoint: Checkpoint, recipe: Recipe | None, store: Store, target: Target, blocks: int) -> _Built:
    """blocks: of the transformer whose keys and values are counted."""
    runner = Runner(checkpoint=checkpoint, store=store, progress=Progress())
    kind = Precision.FP16 if recipe is None or recipe.format == "none" else Precision(recipe.format)
    decoder = usual_decoder(kind, (target,))
    everything = components(checkpoint, component_precision(kind) | {"decoder": decoder})
    if decoder is Precision.FP8:
        groups = conv_groups(name for name, _ in everything["decoder"].module.named_parameters())
        plan = conv_plan("fp8", dict.fromkeys(groups, 1.0), 1.0)
        everything["decoder"] = replace(everything["decoder"], plan=plan, in_engine=True)
    if recipe is not None:
        everything["denoiser"] = replace(everything["denoiser"], plan=_plan(everything["denoiser"], recipe))
        everything = with_weights(everything, text_weights(recipe))
        if recipe.text_encoder == "w8a8":
            everything["text_encoder"] = replace(everything["text_encoder"], plan=_plan(everything["text_encoder"], recipe))
    side = checkpoint.transformer_config.sample_size * PX_PER_LATENT
    length = checkpoint.prompt.max_sequence_length
    ranges = ShapeRange(min_side=side, opt_side=side, max_side=side, max_batch=1, max_sequence_length=length)
    tokens = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt).sequence_length()
    guided = checkpoint.transformer_config.guidance_embeds
    shapes = {
        name: profiles(component, ranges, instructed_tokens=tokens, embedded_guidance=guided)
        for name, component in everything.items()
    }
    found: dict[ComponentName, Memory] = {}
    for name in COMPONENTS:
        engine = runner.engine(everything[name], runner.export(everything[name]), (target,), shapes[name])
        said = engine.memory()
        if not {"Weights", "Activation"} <= said.keys():
            raise BuildError(
                f"{name}: got {said} from TensorRT's log; expected the sizes of weights and activations, as 1.7 writes."
            )
        weights = said["Weights"] + said.get("Device Persistent", 0)
        found[name] = Memory(weights=weights, activations=said["Activation"])
    return _Built(parts=found, buffers=transfers(everything, shapes, blocks))


def _small(variant: str, blocks: int, work: Path) -> Checkpoint:
    """The variant with `blocks` blocks in the transformer and in the text encoder, all else as it is; written once."""
    out = work / f"{variant}-{blocks}"
    if not (out / "done").is_file():
        made = VARIANTS[variant]
        made = replace(made, transformer=replace(made.transformer, num_layers=blocks))
        out.mkdir(parents=True, exist_ok=True)
        write_random_checkpoint(made, out, text_encoder=replace(GEMMA_2_2B, num_hidden_layers=blocks))
        (out / "done").touch()
    return load(out)


def _of_variant(variant: str, recipe: Recipe | None, work: Path, target: Target) -> _Built:
    config = VARIANTS[variant].transformer
    layers: dict[ComponentName, int] = dict.fromkeys(COMPONENTS, config.num_layers)
    layers["text_encoder"] = GEMMA_2_2B.num_hidden_layers
    store = Store(work / "cache")
    small, large = (_build(_small(variant, blocks, work), recipe, store, target, config.num_layers) for blocks in BLOCKS)
    parts = {name: extrapolated(small.parts[name], large.parts[name], layers[name]) for name in COMPONENTS}
    return _Built(parts=parts, buffers=small.buffers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--variant", choices=sorted(VARIANTS), help="a published model, by its shapes, with Gemma-2-2B")
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint, built whole")
    parser.add_argument("--recipes", default="int8,fp8,nvfp4", help="names in configs/quantization, or .yaml files")
    parser.add_argument("--key", action="append", default=[], metavar="KEY=VALUE", help="over each recipe: text_encoder=null")
    parser.add_argument("--target", default="sm120", choices=[*Target], help="the architecture; sm120 has all formats")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for checkpoints and engines; kept")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/figures.jsonl")
    return parser


def _shown(built: _Built) -> str:
    arena = max(part.activations for part in built.parts.values())
    names = {name: name.replace("_", " ") for name in built.parts}
    parts = ", ".join(f"{names[name]} {part.weights / 1e6:.0f}" for name, part in built.parts.items())
    needs = ", ".join(f"{names[name]} {part.activations / 1e6:.0f}" for name, part in built.parts.items())
    return f"{parts}, arena {arena / 1e6:.0f} ({needs}), inputs and outputs {built.buffers / 1e6:.0f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 for a recipe, a checkpoint or a build that fails."""
    options = _parser().parse_args(arguments)
    target = Target(options.target)
    model = options.variant or options.model.name
    recipes: dict[str, Recipe | None] = {"fp16": None}
    base = 0
    try:
        recipes |= {name: load_recipe(name, options.key) for name in options.recipes.split(",")}
        for name, recipe in recipes.items():
            if options.variant:
                built = _of_variant(options.variant, recipe, options.work, target)
            else:
                checkpoint = load(options.model)
                blocks = checkpoint.transformer_config.num_layers
                built = _build(checkpoint, recipe, Store(options.work / "cache"), target, blocks)
            bytes_ = total(built.parts, built.buffers)
            base = base or bytes_
            print(f"{model} {name}: {bytes_ / base:.4f} of fp16's, {human_bytes(bytes_)}: {_shown(built)}", flush=True)
            if options.record and recipe is not None:
                which = "" if model == TARGETED else f"_{model[5:] if model.startswith(('sana_', 'sana-')) else model}"
                how = f"engines with {BLOCKS[0]} and {BLOCKS[1]} blocks, extrapolated" if options.variant else "engines built whole"
                keys = "".join(f" {key}" for key in options.key)
                note = f"{model}, {target}, one picture, reckoned from TensorRT's log: {how}; not run. Recipe {name}{keys}: "
                note += f"{_shown(built)}; fp16 {base / 1e6:.0f} MB"
                print(json.dumps(record(f"quant_{recipe.format}{which}_memory_ratio", bytes_ / base, "ratio", note=note)))
    except SanaError as error:
        print(f"quantized_memory: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
