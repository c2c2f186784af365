"""A plan of the text encoder's W8A8 out of a checkpoint and a recipe: as the denoiser's, with texts for pictures.

    plan = load_plan(calibrate_text(checkpoint, load_recipe("int8", ["text_encoder=w8a8"])) / PLAN)

A text costs one pass and a picture dozens, so four times as many prompts are read where the file has them, with their instruction,
and the empty negative prompt. With as few as pictures have, smoothing fits those few: sana-tiny's embeddings were 4.3 % off with 16
texts and 2.3 % with 64. Ranges are of tokens, not of padding, which no token sees. Each text is an entry of the store: a
calibration that was killed goes on where it was, and the same inputs give the same plan, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.digest import digest_of, file_sha256
from engines.store import Store
from export.calibration import OBSERVERS, Observer, Statistics, watching
from export.calibration_prompts import prompts_file, read_prompts
from export.calibration_report import write_report
from export.calibrators import check_version
from export.fingerprint import code, versions
from export.progress import Pace, Progress
from export.quantization_plan import PLAN, PLANNERS, check_weights, plan_groups
from export.recipe import Recipe
from runtime.prompt import PromptCutWarning, PromptTokenizer, Tokens
from sana_ref.checkpoint import Checkpoint
from sana_ref.quantization import groups_of, save_plan

__all__ = ["TEXTS_A_PROMPT", "calibrate_text", "texts_of"]

TEXTS_A_PROMPT = 4  # texts for each of the recipe's num_prompts
KEEP = "text_encoder_keep"
_FILE = "statistics.safetensors"


def texts_of(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, ...]:
    """The first prompts of the recipe's file. Raises SpecError where there are fewer than num_prompts, or as read_prompts does."""
    path, least = prompts_file(recipe.calibration.prompts, checkpoint.folder), recipe.calibration.num_prompts
    return read_prompts(path, least, most=TEXTS_A_PROMPT * least)


def calibrate_text(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Path:
    """The folder with plan.safetensors, calibration.json and calibration.html.

    Raises SpecError as texts_of does, ConfigError for a pattern that matches no group, CheckpointError naming a layer that has no
    range.
    """
    store, progress = store or Store(), progress or Progress()
    check_version()
    shapes = checkpoint.sources["text_encoder"].shapes
    formats = recipe.of_text(list(groups_of(shapes)))
    texts = texts_of(checkpoint, recipe)
    seen = {
        "stage": "calibration of the text encoder",
        "checkpoint": checkpoint.component_digest("text_encoder"),
        "tokenizer": file_sha256(checkpoint.tokenizer_path),
        "prompt": [checkpoint.prompt.complex_human_instruction, checkpoint.prompt.max_sequence_length, checkpoint.prompt.lowercase],
        "device": torch.device(device).type,
        "rows": max(1, recipe.calibration.rows // TEXTS_A_PROMPT),
        "code": code((*OBSERVERS, "export/text_calibration.py")),
        "versions": versions(),
    }
    own = recipe.model_copy(update={"smoothquant": recipe.text_encoder_smoothquant, "awq": None, "low_rank": 0})
    chosen = {name: getattr(own, name) for name in ("activations", "method", "percentile", "smoothquant")}
    key = digest_of(
        {**seen, "texts": texts, "formats": formats, "recipe": chosen, "planners": code(PLANNERS), "modelopt": check_version()}
    )

    def make(folder: Path) -> None:
        tokenizer = PromptTokenizer(checkpoint.tokenizer_path, checkpoint.prompt)
        encoder = checkpoint.text_encoder(torch.float32, device).eval()
        check_weights(encoder, formats)
        statistics = _observe(encoder, tokenizer, texts, seen, store=store, progress=progress)
        with progress.stage("calibration of the text encoder: scales") as stage:
            plan, reports = plan_groups(encoder, own, formats, statistics)
            stage.note(f"{len(plan.layers)} groups of layers quantized, {len(formats) - len(plan.layers)} kept")
        notes = {
            "text encoder": checkpoint.component_digest("text_encoder"),
            "texts": digest_of(texts),
            "modelopt": check_version(),
        }
        save_plan(plan.model_copy(update={"notes": notes}), folder / PLAN)
        write_report(folder, reports, notes)

    return store.get_or_make(key, make)


def _observe(
    encoder: nn.Module,
    tokenizer: PromptTokenizer,
    texts: Sequence[str],
    content: Mapping[str, Any],
    *,
    store: Store,
    progress: Progress,
) -> Statistics:
    """Run the encoder on every text, or read what was seen before. content: what decides it beside the text."""
    groups = groups_of(name for name, _ in encoder.named_parameters())
    files, seen = [], 0
    wanted = [*((text, False) for text in texts), ("", True)]
    with progress.stage("calibration of the text encoder: activations") as stage:
        pace = Pace(progress, "activations of a text")
        for number, (text, negative) in enumerate(wanted, 1):

            def make(folder: Path, text: str = text, negative: bool = negative, left: int = len(wanted) - number) -> None:
                nonlocal seen
                seen += 1
                with pace.piece(left), warnings.catch_warnings():
                    warnings.simplefilter("ignore", PromptCutWarning)  # what is left is still a prompt
                    tokens = tokenizer.encode([text], negative=negative)
                    save_file(_observe_text(encoder, tokens, text, groups, content["rows"]), folder / _FILE)

            key = digest_of({**content, "text": text, "negative": negative})
            files.append(store.get_or_make(key, make) / _FILE)
        stage.cached = not seen
        stage.note(f"{len(groups)} groups of layers, {len(wanted)} texts, {len(wanted) - seen} of them from the cache")
    return Statistics(groups=tuple(groups), files=tuple(files), keep=KEEP)


def _observe_text(
    encoder: nn.Module, tokens: Tokens, text: str, groups: Mapping[str, Sequence[str]], rows: int
) -> dict[str, Tensor]:
    device = next(encoder.parameters()).device
    ids, mask = (torch.from_numpy(array).to(device) for array in (tokens.ids, tokens.mask))
    where = f"the text {text[:60]!r}"
    observers = {group: Observer(group, int(mask.sum()), rows, where=where) for group in groups}
    with torch.inference_mode(), watching(encoder, groups, observers, mask > 0):
        encoder(ids, mask)
    return {name: tensor for observer in observers.values() for name, tensor in observer.found().items()}
