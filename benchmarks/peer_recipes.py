"""What is compared: fp16, our recipes, and ModelOpt's and torchao's own, on the same linear layers of the same reference.

A peer is given each weight of our groups as an nn.Linear of its own (1x1 convolutions are such products), quantizes them as it
would any model's, and computes the products in place of the reference's. Depth-wise convolutions, embeddings and the text's keys
and values stay precise, as in ours. ModelOpt's default calibrations read nothing of activations but each channel's largest number,
so they are given one token that holds those of the whole calibration: the same ranges as if each had run the sampling itself.
torchao finds scales while it runs. ModelOpt 0.47 computes NVFP4 on a GPU alone, so its NVFP4_DEFAULT_CFG (block scales found while
it runs, a tensor's scale from its largest number, no corrections) is computed by our own operators, and is named so.
No peer quantizes the text's components: each is given the weights there that our recipe of its format has.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engines.errors import SpecError
from engines.store import Store, digest_of
from export.calibration import Statistics, observe
from export.calibration_data import draw_all, plan_runs
from export.calibrators import check_version
from export.choose_recipe import group_bytes, sizes_of
from export.progress import Progress
from export.quantization_plan import make_plan
from export.recipe import Recipe, load_recipe
from export.weight_only import Weights, text_weights
from sana_ref.pipeline import SanaReference
from sana_ref.quantization import QuantizationPlan, plan_digest
from sana_ref.quantize_ops import QuantizedWeight
from sana_ref.quantized import Products, QuantizedLinears, static_scale, uniform_plan

__all__ = ["FORMATS", "FP16", "FP32", "Candidate", "OurLinears", "PeerLinears", "Unavailable", "candidates", "unquantized"]

Kind = Literal["int8", "fp8", "nvfp4"]
FP32, FP16 = "fp32", "fp16"  # names of the candidates that quantize nothing
FORMATS: tuple[Kind, ...] = ("int8", "fp8", "nvfp4")
MODELOPT: dict[Kind, tuple[str, ...]] = {
    "int8": ("INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG"),
    "fp8": ("FP8_DEFAULT_CFG",),
    "nvfp4": (),
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """products: of a transformer; inside, it computes as this recipe has it. digest: of all that decides its numbers.

    weights: of the text's components (benchmarks/text_weights.py).
    """

    name: str
    tool: Literal["sana", "modelopt", "torchao"]
    format: str
    size_ratio: float  # bytes of the denoiser's weights, of those in fp16
    digest: str
    weights: Weights
    products: Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Unavailable:
    """What a tool would not do here."""

    name: str
    format: str
    why: str


class _Real(QuantizedWeight):
    """Dequantized once: a picture multiplies with it hundreds of times."""

    def real(self) -> Tensor:
        return self.numbers


class OurLinears(QuantizedLinears):
    """As QuantizedLinears, with dequantized weights kept: 4 bytes a number."""

    def __init__(self, transformer: nn.Module, plan: QuantizationPlan) -> None:
        super().__init__(transformer, plan)
        self._layers = {
            group: replace(layer, weight=_Real(numbers=layer.weight.real(), scale=layer.weight.scale))
            for group, layer in self._layers.items()
        }


class PeerLinears(Products):
    """Inside, each product of a group is one of `linears`, which a tool may have quantized: by group and first row."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__(transformer)
        self.linears = nn.ModuleDict()
        for group, parts in self.parts.items():
            start = 0
            for part in parts:
                weight = part.detach().flatten(1)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
                self.linears[_key(group, start)] = linear
                start += weight.shape[0]

    def compute(self, group: str, rows: slice, x: Tensor, bias: Tensor | None) -> Tensor:
        """In fp32, rounded once to the type of x, as in ours."""
        out: Tensor = self.linears[_key(group, rows.start)](x.float())
        return (out if bias is None else out + bias.float()).to(x.dtype)


def _key(group: str, start: int) -> str:
    return f"{group}.{start}".replace(".", "/")  # a ModuleDict's names have no dots


def modelopt_linears(transformer: nn.Module, config: str, statistics: Statistics) -> PeerLinears:
    """By ModelOpt's recipe of that name, with the ranges of `statistics`."""
    check_version()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        peer = PeerLinears(transformer)

        def show(linears: nn.Module) -> None:
            for group, parts in peer.parts.items():
                start, token = 0, statistics.channels(group)[None]
                for part in parts:
                    peer.linears[_key(group, start)](token)
                    start += part.shape[0]

        with torch.no_grad():
            mtq.quantize(peer.linears, copy.deepcopy(getattr(mtq, config)), show)
            mtq.fold_weight(peer.linears)  # the same numbers, rounded once
    return peer


def torchao_linears(transformer: nn.Module, kind: Kind) -> PeerLinears:
    """By torchao's recipe of scales that are found while it runs. Raises what torchao raises where it cannot."""
    from torchao import quantization
    from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

    configs = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "fp8": quantization.Float8DynamicActivationFloat8WeightConfig,
        "nvfp4": NVFP4DynamicActivationNVFP4WeightConfig,
    }
    peer = PeerLinears(transformer)
    quantization.quantize_(peer.linears, configs[kind]())
    return peer


def candidates(
    reference: SanaReference, formats: Sequence[Kind], keys: Sequence[str], *, store: Store, progress: Progress
) -> tuple[list[Candidate], list[Unavailable]]:
    """Of each format ours, also without nvfp4's branch, which is the peers' size, and with int8's dynamic scales; then peers."""
    checkpoint, transformer = reference.checkpoint, reference.denoiser.transformer
    sizes, sides = sizes_of(transformer)
    found: list[Candidate] = []
    missing: list[Unavailable] = []

    def add(
        name: str, tool: Any, kind: Kind, digest: str, make: Callable[[nn.Module], Any], rank: int = 0, smooth: bool = False
    ) -> None:
        size = sizes.fixed + sum(group_bytes(kind, *each, rank=rank, smooth=smooth) for each in sides.values())
        digest = digest_of({"denoiser": digest, "text": weights})
        found.append(
            Candidate(
                name=name,
                tool=tool,
                format=kind,
                size_ratio=size / sizes.half,
                digest=digest,
                weights=weights,
                products=_once(make),
            )
        )

    for kind in formats:
        recipe = load_recipe(kind, keys)
        weights = text_weights(recipe)
        if weights.get("text_encoder") == "w8a8":
            raise SpecError("text_encoder: got w8a8; expected weights alone, int8 say: benchmarks/text_weights.py measures W8A8.")
        own: list[tuple[str, Recipe]] = [(f"sana {kind}", recipe)]
        if kind == "nvfp4" and recipe.low_rank:
            own.append(("sana nvfp4, no branch", recipe.model_copy(update={"low_rank": 0})))
        if kind == "int8" and recipe.activations == "static":
            own.append(("sana int8, dynamic", recipe.model_copy(update={"activations": "dynamic"})))
        for name, each in own:
            plan = make_plan(checkpoint, each, store=store, progress=progress)
            smooth = any(key.endswith(".smooth") for key in plan.tensors)
            add(name, "sana", kind, plan_digest(plan), partial(OurLinears, plan=plan), each.low_rank, smooth)
        settings = recipe.calibration
        runs = draw_all(reference, plan_runs(checkpoint, settings), store, progress)
        seen = observe(reference, runs, rows=settings.rows, store=store, progress=progress)
        for config in MODELOPT[kind]:
            digest = digest_of({"modelopt": check_version(), "config": config, "runs": [run.key for run in runs]})
            smooth = "SMOOTHQUANT" in config

            make = partial(modelopt_linears, config=config, statistics=seen)
            add(f"modelopt {config}", "modelopt", kind, digest, make, smooth=smooth)
        if kind == "nvfp4":
            scales = {group: static_scale(kind, float(seen.channels(group).amax())) for group in sides}
            plain = uniform_plan(kind, sides, scales)
            name = "modelopt NVFP4_DEFAULT_CFG, by our operators"
            add(name, "modelopt", kind, plan_digest(plain), partial(OurLinears, plan=plain))
        try:
            release = version("torchao")
            torchao_linears(transformer, kind)
        except PackageNotFoundError:
            missing.append(Unavailable(name=f"torchao {kind}", format=kind, why="torchao is not installed"))
        except (AssertionError, NotImplementedError, RuntimeError) as error:  # what torchao 0.18 raises for other hardware
            missing.append(
                Unavailable(name=f"torchao {kind}", format=kind, why=f"torchao {release} says: {str(error).rstrip('.')}")
            )
        else:
            digest = digest_of({"torchao": release, "kind": kind})
            add(f"torchao {kind}, dynamic", "torchao", kind, digest, partial(torchao_linears, kind=kind))
    return found, missing


def unquantized(name: str) -> Candidate:
    """FP32 or FP16."""
    return Candidate(
        name=name,
        tool="sana",
        format=name,
        size_ratio=2.0 if name == FP32 else 1.0,
        digest=name,
        weights={},
        products=lambda transformer: nullcontext(),
    )


def _once(make: Callable[[nn.Module], AbstractContextManager[Any]]) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """Made at the first call, and the same after: nothing is made for pictures that are all in the cache."""
    kept: dict[int, AbstractContextManager[Any]] = {}

    def get(transformer: nn.Module) -> AbstractContextManager[Any]:
        if id(transformer) not in kept:
            kept[id(transformer)] = make(transformer)
        return kept[id(transformer)]

    return get
