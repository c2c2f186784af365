"""A Hugging Face Hub id to a folder on this machine: only the files that are needed, at one commit.

Without a connection, or with HF_HUB_OFFLINE=1, what an earlier download left in the cache is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from engines.errors import CheckpointError

__all__ = ["HUB_ID", "WEIGHTS", "snapshot", "wanted_files"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
JSON_FOLDERS = ("transformer", "vae", "text_encoder", "scheduler")
WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}  # component to the stem of its files' names
ALWAYS = ("model_index.json", "tokenizer/tokenizer.json", "README.md", "LICENSE", "LICENCE", "NOTICE")


def snapshot(repository: str, *, revision: str | None, variant: str | None, cache_dir: Path | None) -> Path:
    """Download what is missing of a diffusers-format repository and return its folder in the cache; its name is the commit.

    revision: a commit (cannot change), tag or branch; None: the default branch, as it is now. variant: "fp16", "bf16", None.
    Raises CheckpointError, naming the remedy, for every way in which the Hub refuses or cannot be reached.
    """
    import httpx  # what huggingface_hub speaks with the Hub through
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{repository} at {revision or 'its default branch'}"
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().repo_info(repository, revision=revision)
            names = wanted_files([file.rfilename for file in info.siblings or ()], variant, where=at)
            return Path(snapshot_download(repository, revision=info.sha, allow_patterns=names, cache_dir=cache_dir))
        except GatedRepoError:
            raise CheckpointError(
                f"{at}: access is restricted. Accept its licence on the Hub, then log in with `hf auth login`."
            ) from None
        except RepositoryNotFoundError:
            raise CheckpointError(
                f"{at}: no such repository on the Hub, and no such path here. Check the spelling; log in if it is private."
            ) from None
        except RevisionNotFoundError:
            raise CheckpointError(f"{repository}: the Hub knows no revision {revision!r}. Use a commit, tag or branch.") from None
        except HfHubHTTPError as error:
            raise CheckpointError(f"{at}: the Hub answered with an error ({error}). Try again later.") from None
        except httpx.TransportError:
            pass  # no connection: the cache may have it
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, local_files_only=True, allow_patterns=["model_index.json"], cache_dir=cache_dir
            )
        )
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise CheckpointError(
            f"{at}: not in the cache {cache_dir or constants.HF_HUB_CACHE}, and {why}. "
            "Download it once with a connection (`hf download`), or give the path of a folder."
        ) from None


def wanted_files(names: Iterable[str], variant: str | None, *, where: str) -> list[str]:
    """Which of a repository's files to download: configs, tokenizer, and each component's weights in one precision, not in all.

    Raises CheckpointError if the repository is not in diffusers' format or lacks a component's weights.
    """
    names = set(names)
    if "model_index.json" not in names:
        raise CheckpointError(
            f"{where}: has no model_index.json; expected a diffusers-format repository. Original weights have one whose name "
            "ends in _diffusers; or download the .pth and give its path."
        )
    wanted = {name for name in names if name in ALWAYS}
    wanted |= {name for name in names if name.endswith(".json") and name.count("/") == 1 and name.split("/")[0] in JSON_FOLDERS}
    for component, stem in WEIGHTS.items():
        wanted |= _weights(names, component, stem, variant, where)
    return sorted(wanted)


def _weights(names: set[str], component: str, stem: str, variant: str | None, where: str) -> set[str]:
    shard = r"(-\d+-of-\d+)?"
    for kind in dict.fromkeys((variant, None)):
        tag = "" if kind is None else re.escape(f".{kind}")
        # both places where a shard's number has been written: before the variant and after it
        pattern = re.compile(rf"{component}/{stem}(?:{shard}{tag}|{tag}{shard})\.safetensors")
        if found := {name for name in names if pattern.fullmatch(name)}:
            return found
    others = sorted(name for name in names if name.startswith(f"{component}/") and name.endswith(".safetensors"))
    raise CheckpointError(
        f"{where}: {component} has no {stem}{'' if variant is None else '.' + variant}.safetensors; got "
        f"{', '.join(others) or 'no safetensors at all'}. Pass the variant that is there, for example variant='fp16'."
    )
