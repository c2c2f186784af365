"""Checkpoints from the Hub and its cache, without a network."""

import re
import shutil
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from engines.errors import CheckpointError
from sana_ref import hub
from sana_ref.checkpoint import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(whole, tmp_path):
    """What huggingface_hub leaves behind: blobs, and a snapshot of links to them."""
    repository = tmp_path / "cache" / "models--owner--tiny"
    for file in whole.rglob("*.*"):
        blob = repository / "blobs" / str(abs(hash(file)))
        link = repository / "snapshots" / COMMIT / file.relative_to(whole)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_hub_cache_without_a_connection(cache, whole, revision):
    checkpoint = load("owner/tiny", revision=revision, cache_dir=cache)
    assert (checkpoint.name, checkpoint.revision) == ("owner/tiny", COMMIT)
    assert checkpoint.digest == load(whole).digest


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "revision"), [("owner/other", None), ("owner/tiny", "0" * 40), ("owner/tiny", "v2")])
def test_not_in_the_cache(cache, name, revision):
    with pytest.raises(CheckpointError, match=r"not in the cache .*HF_HUB_OFFLINE is set.*`hf download`"):
        load(name, revision=revision, cache_dir=cache)


@pytest.mark.usefixtures("offline")
def test_incomplete_cache(cache):
    (cache / "models--owner--tiny" / "snapshots" / COMMIT / "vae" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="vae: holds no weights"):
        load("owner/tiny", cache_dir=cache)


FILES = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "model_index.json",
    "asset/picture.png",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.bf16-00001-of-00002.safetensors",
    "text_encoder/model.bf16-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def test_only_one_precision_is_downloaded():
    plain = hub.wanted_files(FILES, None, where="x")
    fp16 = hub.wanted_files(FILES, "fp16", where="x")
    other_precisions = {name for name in FILES if ".bf16" in name or ".fp16" in name}
    assert plain == sorted(set(FILES) - other_precisions - {".gitattributes", "asset/picture.png", "tokenizer/tokenizer.model"})
    assert set(fp16) ^ set(plain) == {
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_repositories_in_another_format():
    with pytest.raises(CheckpointError, match=r"has no model_index\.json; expected a diffusers-format repository"):
        hub.wanted_files(["checkpoints/Sana_600M_512px_MultiLing.pth"], None, where="x")
    with pytest.raises(CheckpointError, match=r"vae has no diffusion_pytorch_model\.safetensors; got no safetensors at all"):
        hub.wanted_files(FILES[:-1], None, where="x")


def answer(monkeypatch, error=None):
    """Let the Hub answer with an error, or with its list of files."""

    def repo_info(self, repository, *, revision):
        if error is not None:
            raise error
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in FILES])

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)


def hub_error(kind):
    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))


def test_download_asks_for_the_commit_and_only_for_what_is_needed(monkeypatch, tmp_path):
    asked = {}
    answer(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **how: asked.update(how) or str(tmp_path))
    assert hub.snapshot("owner/tiny", revision="v1", variant="fp16", cache_dir=None) == tmp_path
    assert asked["revision"] == COMMIT
    assert asked["allow_patterns"] == hub.wanted_files(FILES, "fp16", where="x")


def test_cache_serves_when_there_is_no_connection(monkeypatch, cache):
    answer(monkeypatch, httpx.ConnectError("no route"))
    assert load("owner/tiny", cache_dir=cache).revision == COMMIT
    with pytest.raises(CheckpointError, match="the Hub cannot be reached"):
        load("owner/other", cache_dir=cache)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, "no such repository on the Hub, and no such path here"),
        (RevisionNotFoundError, "the Hub knows no revision 'v9'"),
        (GatedRepoError, "access is restricted. Accept its licence"),
        (HfHubHTTPError, "the Hub answered with an error"),
    ],
)
def test_hub_refuses(monkeypatch, cache, kind, message):
    answer(monkeypatch, hub_error(kind))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load("owner/tiny", revision="v9", cache_dir=cache)
