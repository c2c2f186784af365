"""A checkpoint: three networks, a tokenizer, a schedule, and how prompts are put, from wherever they come.

    diffusers' layout   load("models/sana-tiny")
    Hugging Face Hub    load("Efficient-Large-Model/Sana_600M_512px_diffusers", revision="<commit>", variant="fp16")
    original .pth       load("Sana_600M_512px.pth", components_from="<folder or id>", transformer_config="sana_600m_512px")

Loading compares every tensor's name and shape with the configs, and reads no weights: those are mapped from their files when a
model is built, each once. Nothing that could run code is read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from engines.errors import CheckpointError, SpecError
from runtime.prompt import PromptTemplate
from sana_ref import hub
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.build import build, check_fit, empty
from sana_ref.instruction import COMPLEX_HUMAN_INSTRUCTION, MAX_SEQUENCE_LENGTH
from sana_ref.pth_layout import PthSource, plan_conversion
from sana_ref.scheduler_config import Sampler, read_sampler
from sana_ref.tensors import Part, RenamedSource, TensorSource, find_weights, load_tensor, read_json
from sana_ref.text_encoder import Gemma2Config, Gemma2Encoder
from sana_ref.transformer import SanaTransformer2DModel, SanaTransformerConfig
from sana_ref.variants import VARIANTS

__all__ = ["COMPONENTS", "KINDS", "Checkpoint", "load"]

ComponentName = Literal["transformer", "vae", "text_encoder"]
Config: TypeAlias = SanaTransformerConfig | AutoencoderDCConfig | Gemma2Config
Device: TypeAlias = str | torch.device

COMPONENTS: tuple[ComponentName, ...] = ("transformer", "vae", "text_encoder")
PTH = ".pth"
# What model_index.json may call each component, the reader of its config, and the module.
KINDS: dict[ComponentName, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Config], Callable[[Any], nn.Module]]] = {
    "transformer": (("SanaTransformer2DModel",), SanaTransformerConfig.from_json, SanaTransformer2DModel),
    "vae": (("AutoencoderDC",), AutoencoderDCConfig.from_json, AutoencoderDC),
    "text_encoder": (("Gemma2Model", "Gemma2ForCausalLM"), Gemma2Config.from_json, Gemma2Encoder),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` returns. Every call makes a new model, in evaluation mode, its weights mapped if type and device allow."""

    name: str  # Hub id, or name of the folder or file
    revision: str | None  # commit, for a Hub id
    folder: Path  # of tokenizer, scheduler and configs
    configs: Mapping[ComponentName, Config]
    sources: Mapping[ComponentName, TensorSource]
    scheduler_config: Mapping[str, Any]
    sampler: Sampler
    prompt: PromptTemplate

    @property
    def transformer_config(self) -> SanaTransformerConfig:
        return self._config("transformer")

    @property
    def vae_config(self) -> AutoencoderDCConfig:
        return self._config("vae")

    @property
    def text_encoder_config(self) -> Gemma2Config:
        return self._config("text_encoder")

    @property
    def tokenizer_path(self) -> Path:
        """The file tokenizer.json. Raises CheckpointError if there is none."""
        path = self.folder / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected a fast tokenizer's single file. Is the download complete?")
        return path

    def state_dict(self, component: ComponentName, dtype: torch.dtype | None = None, device: Device = "cpu") -> dict[str, Tensor]:
        """The tensors of a component under diffusers' or transformers' names; dtype None: as stored."""
        source = self._source(component)
        return {name: load_tensor(source, name, dtype, device) for name in source.shapes}

    def transformer(self, dtype: torch.dtype | None = None, device: Device = "cpu") -> SanaTransformer2DModel:
        return self._build("transformer", dtype, device)

    def vae(self, dtype: torch.dtype | None = None, device: Device = "cpu") -> AutoencoderDC:
        return self._build("vae", dtype, device)

    def text_encoder(self, dtype: torch.dtype | None = None, device: Device = "cpu") -> Gemma2Encoder:
        return self._build("text_encoder", dtype, device)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of everything that decides what the model computes: weights, configs, tokenizer, schedule, prompt template.

        Names of folders and other files do not count. Weights count as bytes: the same tensors in another order or format have
        another digest.
        """
        tokenizer = self.folder / "tokenizer" / "tokenizer.json"
        content = {
            "weights": {name: [_file_sha256(file) for file in source.files] for name, source in self.sources.items()},
            "configs": {name: asdict(config) for name, config in self.configs.items()},
            "tokenizer": _file_sha256(tokenizer) if tokenizer.is_file() else None,
            "sampler": asdict(self.sampler),
            "prompt": asdict(self.prompt),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def component_digest(self, component: ComponentName) -> str:
        """sha256 of one network's weights and config: what a result that depends on this network alone is kept by."""
        content = {
            "weights": [_file_sha256(file) for file in self._source(component).files],
            "config": asdict(self.configs[component]),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _config(self, component: ComponentName) -> Any:
        self._source(component)
        return self.configs[component]

    def _source(self, component: ComponentName) -> TensorSource:
        if component not in self.sources:
            raise CheckpointError(
                f"{self.name}: was loaded without its {component}; expected one of {', '.join(self.sources)}. "
                f"Pass components with {component!r} to load()."
            )
        return self.sources[component]

    def _build(self, component: ComponentName, dtype: torch.dtype | None, device: Device) -> Any:
        source = self._source(component)
        make = KINDS[component][2]
        return build(lambda: make(self.configs[component]), source, f"{self.name}, {component}", dtype, device)


def load(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    components_from: str | Path | None = None,
    transformer_config: SanaTransformerConfig | str | None = None,
    components: Collection[ComponentName] = COMPONENTS,
    vae: Path | None = None,
    cache_dir: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint and check that it is whole and fits its configs; weights are read later.

    path_or_id: a folder in diffusers' layout, an original .pth, or "owner/name" on the Hugging Face Hub.
    revision: commit, tag or branch on the Hub, of path_or_id or, for a .pth, of components_from; a commit makes it reproducible.
    variant: "fp16" or "bf16": prefer the files stored in that precision.
    components_from: only with a .pth, which holds the transformer alone: folder or id of a checkpoint with the rest.
    transformer_config: only with a .pth: a config, or a name of variants.VARIANTS; None: that of components_from.
    components: which networks are wanted; the others may be missing.
    vae: an autoencoder's folder in place of the checkpoint's own, such as DC-AE-Lite's; it must be of the same latents.
    Raises CheckpointError: not there, not complete, not fitting its config, or in a format that can run code.
    """
    path = Path(path_or_id)
    if path.is_file():
        whole = _load_pth(path, revision, variant, components_from, transformer_config, components, cache_dir)
        return whole if vae is None else _with_vae(whole, vae)
    if components_from is not None or transformer_config is not None:
        raise CheckpointError(
            f"{path_or_id}: components_from and transformer_config go with a {PTH} file, and this is none. Leave them out."
        )
    folder = _folder(path_or_id, revision, variant, cache_dir)
    whole = _load_folder(str(path_or_id), folder, variant, components, from_hub=folder != path)
    return whole if vae is None else _with_vae(whole, vae)


def _with_vae(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """With the autoencoder of `folder`. Raises CheckpointError if the transformer does not speak its latents."""
    config = _read_config(folder.parent, "vae", {}, name=folder.name)
    own = checkpoint.vae_config
    for name in ("latent_channels", "px_per_latent", "scaling_factor"):
        if getattr(config, name) != getattr(own, name):
            raise CheckpointError(
                f"{folder}: got an autoencoder with {name} {getattr(config, name)}; expected {getattr(own, name)}, as that of "
                f"{checkpoint.name}: the transformer knows no other latents."
            )
    source, _ = find_weights(folder, hub.WEIGHTS["vae"], None)
    return _checked(
        replace(checkpoint, configs={**checkpoint.configs, "vae": config}, sources={**checkpoint.sources, "vae": source})
    )


def _folder(path_or_id: str | Path, revision: str | None, variant: str | None, cache_dir: Path | None) -> Path:
    path = Path(path_or_id)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{path}: got revision={revision!r} with a folder, which has none. Leave it out.")
        return path
    if not hub.HUB_ID.fullmatch(str(path_or_id)):
        raise CheckpointError(f"{path_or_id}: no such file or folder; expected a path that exists, or owner/name on the Hub.")
    return hub.snapshot(str(path_or_id), revision=revision, variant=variant, cache_dir=cache_dir)


def _load_folder(
    name: str, folder: Path, variant: str | None, components: Collection[ComponentName], *, from_hub: bool
) -> Checkpoint:
    if (folder / "manifest.json").is_file() and not (folder / "model_index.json").exists():
        raise CheckpointError(
            f"{folder}: got a bundle, which holds engines and no checkpoint's weights; expected a checkpoint. A bundle draws: "
            f"sana generate {folder} PROMPT."
        )
    index = read_json(folder / "model_index.json")
    configs: dict[ComponentName, Config] = {}
    sources: dict[ComponentName, TensorSource] = {}
    kinds: list[str | None] = []
    for component in (known for known in COMPONENTS if known in components):
        configs[component] = _read_config(folder, component, index)
        source, kind = find_weights(folder / component, hub.WEIGHTS[component], variant)
        kinds.append(kind)
        sources[component] = _trunk(source) if component == "text_encoder" else source
    if variant is not None and variant not in kinds:
        raise CheckpointError(
            f"{folder}: got variant={variant!r}, and no component has files of it. Leave it out, or use another repository."
        )
    return _checked(
        Checkpoint(
            name=name if from_hub else folder.resolve().name,
            revision=folder.name if from_hub else None,
            folder=folder,
            configs=configs,
            sources=sources,
            **_how_to_sample(folder, index),
        )
    )


def _load_pth(
    path: Path,
    revision: str | None,
    variant: str | None,
    components_from: str | Path | None,
    transformer_config: SanaTransformerConfig | str | None,
    components: Collection[ComponentName],
    cache_dir: Path | None,
) -> Checkpoint:
    if path.suffix != PTH:
        raise CheckpointError(
            f"{path}: got a {path.suffix or 'file without an ending'}; expected a folder, a Hub id, or an original {PTH}. "
            "Other pickles (.bin, .ckpt) can run code; for a lone .safetensors give the folder around it."
        )
    if components_from is None:
        raise CheckpointError(
            f"{path}: holds the transformer alone. Pass components_from with a folder or Hub id that has vae, text_encoder, "
            "tokenizer and scheduler, such as the diffusers-format repository of the same family."
        )
    folder = _folder(components_from, revision, variant, cache_dir)
    rest = _load_folder(
        str(components_from), folder, variant, set(components) - {"transformer"}, from_hub=folder != Path(components_from)
    )
    if isinstance(transformer_config, str):
        if transformer_config not in VARIANTS:
            raise CheckpointError(f"transformer_config: got {transformer_config!r}; expected one of {', '.join(VARIANTS)}.")
        transformer_config = VARIANTS[transformer_config].transformer
    if transformer_config is None:
        transformer_config = SanaTransformerConfig.from_json(read_json(folder / "transformer" / "config.json"))
    original = PthSource(path)
    transformer = RenamedSource(original, plan_conversion(original.shapes))
    return _checked(
        Checkpoint(
            name=path.name,
            revision=None,
            folder=folder,
            configs={"transformer": transformer_config, **rest.configs},
            sources={"transformer": transformer, **rest.sources},
            scheduler_config=rest.scheduler_config,
            sampler=rest.sampler,
            prompt=rest.prompt,
        )
    )


def _read_config(folder: Path, component: ComponentName, index: Mapping[str, Any], *, name: str | None = None) -> Config:
    """name: of the component's folder, if it is not the component's."""
    names, read, _ = KINDS[component]
    entry = index.get(component)
    if entry is not None and (not isinstance(entry, list) or len(entry) != 2 or entry[1] not in names):
        raise CheckpointError(
            f"{folder / 'model_index.json'}: {component} is {entry}; expected {' or '.join(names)}. "
            "Only Sana's text-to-image models are supported."
        )
    file = folder / (name or component) / "config.json"
    values = read_json(file)
    if "quantization_config" in values:
        raise CheckpointError(
            f"{file}: got a quantization_config: these weights are quantized, and would be quantized again. "
            "Use the repository's unquantized ones."
        )
    try:
        return read(values)
    except (SpecError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def _how_to_sample(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    lines = index.get("complex_human_instruction", COMPLEX_HUMAN_INSTRUCTION)
    length = index.get("max_sequence_length", MAX_SEQUENCE_LENGTH)
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines) or not isinstance(length, int):
        raise CheckpointError(
            f"{folder / 'model_index.json'}: got complex_human_instruction {lines!r} and max_sequence_length {length!r}; "
            "expected a list of strings and an integer."
        )
    return {
        "scheduler_config": scheduler_config,
        "sampler": read_sampler(scheduler_config, index),
        "prompt": PromptTemplate(complex_human_instruction="\n".join(lines), max_sequence_length=length),
    }


def _trunk(source: TensorSource) -> TensorSource:
    """Gemma-2's trunk out of a file that was saved with the language model's head."""
    plan = {}
    for name in source.shapes:
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            plan[name.removeprefix("model.")] = Part(name)
    return RenamedSource(source, plan)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    for component, source in checkpoint.sources.items():
        config, make = checkpoint.configs[component], KINDS[component][2]
        model = empty(functools.partial(make, config))
        check_fit(model, source, f"{checkpoint.name}, {component}")
    return checkpoint


def _file_sha256(file: Path) -> str:
    status = file.stat()
    return _sha256_of_version(str(file.resolve()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_of_version(path: str, size: int, modified_ns: int) -> str:
    """Gigabytes take seconds; size and time tell a version of a file well enough within one process."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
