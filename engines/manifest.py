"""What manifest.json holds, as types. docs/bundle.md is the format's description; this is its schema."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from engines.digest import num_parts
from engines.paths import check_relative
from engines.spec import COMPONENTS, QUANTIZED, ComponentName, Precision, ShapeRange, Target
from engines.token_table import TABLE_NAME

__all__ = [
    "MANIFEST_NAME",
    "MAX_FILES",
    "SCHEMA_VERSIONS",
    "BundleInfo",
    "FileEntry",
    "FileRole",
    "LatentInfo",
    "Manifest",
    "PromptInfo",
    "ScheduleInfo",
    "TensorRTInfo",
    "engine_targets",
    "graph_name",
]

# 3 is of bundles with a table of tokens on the host, which programs of before would look for in the graph; 4 of decoders' engines
# with outputs that they would give no memory
SCHEMA_VERSIONS = (2, 4)
MANIFEST_NAME = "manifest.json"
MAX_FILES = 10_000

# graph: model.onnx; weights: its external data; golden: inputs and fp32 outputs for a parity re-run;
# report: parity.json and its page of pictures, how the denoiser was quantized
FileRole = Literal["graph", "weights", "engine", "tokenizer", "golden", "report", "licence"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=65536)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorRTInfo(_Model):
    """The TensorRT that compiled the engines. An engine opens in the same flavor and version only."""

    flavor: Literal["rtx", "full"]  # TensorRT for RTX, or TensorRT
    version: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){1,3}$", max_length=64)]


class ScheduleInfo(_Model):
    """The sampler that the model was trained for: what a request gets when it asks for nothing else."""

    scheduler: Literal["flow_euler", "flow_dpm_solver", "scm"]
    flow_shift: Positive = 3.0  # not used by scm
    num_inference_steps: int = Field(ge=1, le=1000)
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    timestep_scale: Positive = 1.0  # the transformer config's factor on the timestep it is fed
    max_timestep: Positive | None = None  # scm only: radians, where it starts
    intermediate_timestep: Positive | None = None  # scm only: radians, the middle of two steps


class PromptInfo(_Model):
    """How a prompt becomes tokens."""

    complex_human_instruction: Text  # put before the prompt, lines joined by \n; "" for none
    max_sequence_length: int = Field(ge=1, le=8192)  # tokens that the denoiser sees
    lowercase: bool = True  # lower case and strip before tokenizing


class LatentInfo(_Model):
    """What lies between denoiser and decoder."""

    channels: int = Field(ge=1, le=4096)
    scaling_factor: Positive  # latents are the autoencoder's output times this
    px_per_latent: Literal[32] = 32


class FileEntry(_Model):
    sha256: Sha256
    size: int = Field(ge=0, le=1 << 50)  # bytes
    role: FileRole
    parts: tuple[Sha256, ...] = ()  # of each 64 MiB of a larger file, so that all cores can compare it; not written if empty

    @model_validator(mode="after")
    def _all_parts(self) -> Self:
        if self.parts and len(self.parts) != num_parts(self.size):
            raise ValueError(
                f"parts: got {len(self.parts)} digests for {self.size} bytes; expected {num_parts(self.size)}, one for each 64 MiB "
                "of a file that is larger"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_no_parts(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "parts" or value}


class BundleInfo(_Model):
    """All of the manifest but the list of files, which the writer makes itself."""

    schema_version: Literal[2, 3, 4] = 2
    model: Annotated[str, Field(min_length=1, max_length=4096)]  # name or id of the checkpoint
    model_digest: Sha256  # of the checkpoint
    variant: Annotated[str, Field(min_length=1, max_length=256)]  # a name of sana_ref.variants, or "custom"
    precision: dict[ComponentName, Precision]
    ranges: ShapeRange
    targets: tuple[Target, ...]  # architectures that have engines; empty: portable graphs alone
    tensorrt: TensorRTInfo | None  # none if there is no engine
    plugins: dict[ComponentName, dict[Annotated[str, Field(max_length=256)], Count]]  # component: op: how many nodes
    schedule: ScheduleInfo
    prompt: PromptInfo
    latents: LatentInfo
    guidance_embeds: bool  # the guidance scale is an input of the network (Sprint)
    caption_channels: int = Field(ge=1, le=1 << 20)  # channels of a prompt embedding
    token_table_rows: int = Field(0, ge=0, le=1 << 30)  # of the table in TABLE_NAME; 0, not written: it is in graph and engines
    licence: Text  # of the weights

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.targets) != (self.tensorrt is not None):
            raise ValueError(
                f"targets and tensorrt: got {len(self.targets)} targets and {'a' if self.tensorrt else 'no'} TensorRT version; "
                "expected both or neither"
            )
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets: got {', '.join(self.targets)}; expected each once")
        if self.prompt.max_sequence_length != self.ranges.max_sequence_length:
            raise ValueError(
                f"max_sequence_length: got {self.prompt.max_sequence_length} under prompt and "
                f"{self.ranges.max_sequence_length} under ranges; expected the same"
            )
        if self.token_table_rows and self.schema_version < 3:
            raise ValueError(f"schema_version: got {self.schema_version} with token_table_rows; expected 3 or 4")
        return self

    @model_serializer(mode="wrap")
    def _without_no_table(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key != "token_table_rows" or value}


class Manifest(BundleInfo):
    """manifest.json: everything about a bundle, and the digest of every other file in it."""

    files: dict[str, FileEntry]  # POSIX path inside the folder: what is there

    @property
    def components(self) -> tuple[ComponentName, ...]:
        """Those that have a graph, in the order in which a picture passes through them."""
        return tuple(name for name in COMPONENTS if graph_name(name) in self.files)

    def engine_name(self, component: ComponentName, sm: str) -> str | None:
        """The path of the engine that runs `component` on the architecture `sm` ("sm89"), or None."""
        for name in self.files:
            if name.startswith(f"{component}/") and sm in engine_targets(name):
                return name
        return None

    @model_validator(mode="after")
    def _files_fit(self) -> Self:
        if len(self.files) > MAX_FILES:
            raise ValueError(f"files: got {len(self.files)} files; expected at most {MAX_FILES}")
        for name in self.files:
            check_relative(name, source="manifest.json")
            if name == MANIFEST_NAME:
                raise ValueError(f"files: got {MANIFEST_NAME} itself, whose digest cannot be inside it")
            if not set(engine_targets(name)) <= set(self.targets):
                raise ValueError(f"files: got the engine {name!r} for a GPU outside targets ({', '.join(self.targets) or 'none'})")
        if not self.components:
            raise ValueError("files: got no model.onnx; expected one for each component")
        for what, named in (("precision", self.precision), ("plugins", self.plugins)):
            if set(named) != set(self.components):
                raise ValueError(f"{what}: got {', '.join(named) or 'nothing'}; expected {', '.join(self.components)}")
        text, step = self.precision.get("text_projection"), self.precision.get("denoiser")
        between = Precision.FP16 if step in QUANTIZED else step  # whose layers alone are FP8
        if text and step and text is not between:
            raise ValueError(
                f"precision: got {text} for text_projection and {step} for denoiser; expected {between} for the first, since the "
                "second reads what it wrote"
            )
        if (self.token_table_rows > 0) != (TABLE_NAME in self.files):
            raise ValueError(
                f"token_table_rows: got {self.token_table_rows} and {'a' if TABLE_NAME in self.files else 'no'} file {TABLE_NAME}; "
                "expected both or neither"
            )
        if self.token_table_rows and "text_encoder" not in self.components:
            raise ValueError(f"token_table_rows: got {self.token_table_rows} without a text encoder; expected none")
        for component in self.components:
            missing = [sm for sm in self.targets if self.engine_name(component, sm) is None]
            if missing:
                raise ValueError(f"files: no engine of {component} for {', '.join(missing)}, though targets names it")
        return self


def graph_name(component: ComponentName) -> str:
    return f"{component}/model.onnx"


def engine_targets(name: str) -> tuple[str, ...]:
    """The architectures in an engine's file name: denoiser/sm86-sm89.engine serves both. Empty for any other file."""
    path = PurePosixPath(name)
    return tuple(path.stem.split("-")) if path.suffix == ".engine" else ()
