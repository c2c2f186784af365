"""Pictures by diffusers' own pipelines of the smallest checkpoints, on a CPU: like PyTorch's, or they are not timed."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_build import PARTS, tiny
from tiny_checkpoint import SCM, write_checkpoint

from benchmarks import latency_pipelines
from benchmarks.figures import ROOT
from benchmarks.latency_parity import picture_error
from benchmarks.latency_peers import PEERS
from benchmarks.latency_pipelines import checked_pipelines
from benchmarks.latency_work import Work
from engines.errors import ParityError, RequestError
from sana_ref.checkpoint import load

Drawn = Callable[..., Any]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def drawn(said: list[str]) -> Drawn:
    """Peers of two pictures of 64 x 96 px. folder: of the peers' weights."""

    def make(folder: Path | None = None, model: Path | None = None, *, steps: int = 2, modes: tuple[str, ...] = ("eager",)) -> Any:
        work, folder = Work(component="picture", width=64, height=96, batch=2, steps=steps), folder or tiny()
        checkpoint = load(model or folder)
        return checked_pipelines(folder, checkpoint, work, modes, dtype=torch.float32, device="cpu", say=said.append)

    return make


@pytest.mark.slow
def test_diffusers_draws_what_pytorch_draws(drawn: Drawn, said: list[str]) -> None:
    with drawn(ROOT / "models" / "sana-tiny") as found:
        assert found.keys() == {"diffusers_eager"}, said
        peer = found["diffusers_eager"]
        assert peer.rms_error < 1e-5
        assert peer.task.by_wall
        whole = peer.task.sample().wall_ms
        png = re.fullmatch(r"PNG by Pillow (\d+\.\d) ms", peer.task.note())
        assert png
        assert 0 < float(png[1]) < whole
        pictures = [Image.open(io.BytesIO(data)) for data in peer.task.call()]
    assert [(each.format, each.mode, each.size) for each in pictures] == [("PNG", "RGB", (64, 96))] * 2
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sprint(drawn: Drawn, said: list[str], tmp_path: Path, steps: int) -> None:
    """With fresh noise in each step but the last; two steps have a middle that others are refused."""
    parts = PARTS | {"transformer": replace(PARTS["transformer"], guidance_embeds=True)}
    with drawn(write_checkpoint(tmp_path, **parts, scheduler=SCM), steps=steps) as found:
        assert found["diffusers_eager"].rms_error < 1e-5
        assert type(found["diffusers_eager"].task.call._pipeline).__name__ == "SanaSprintPipeline"
    assert said == []


@pytest.mark.slow
def test_each_call_has_new_prompts(drawn: Drawn) -> None:
    with drawn() as found:
        asked: list[dict[str, Any]] = []
        call = found["diffusers_eager"].task.call
        picture = SimpleNamespace(save=lambda file, format: file.write(b"png"))
        call._pipeline = lambda **settings: asked.append(settings) or SimpleNamespace(images=[picture])
        assert [call(), call()] == [[b"png"]] * 2
    first, second = (set(each["prompt"]) for each in asked)
    assert len(first) == len(second) == 2
    assert not first & second
    assert not {"latents", "prompt_embeds"} & asked[0].keys()  # noise and text are a part of a picture
    assert (asked[0]["num_inference_steps"], asked[0]["width"], asked[0]["height"]) == (2, 64, 96)


@pytest.mark.slow
def test_other_weights_are_not_timed(drawn: Drawn, said: list[str], tmp_path: Path) -> None:
    with drawn(write_checkpoint(tmp_path, **PARTS, seed=1), tiny()) as found:
        assert not found
    assert said[0].startswith("picture, diffusers_eager: rms error: got ")
    assert said[0].endswith("It is not timed.")


@pytest.mark.slow
def test_other_noise_is_not_timed(drawn: Drawn, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, factors = latency_pipelines._latents, iter([1, 1, 1.001])  # of both references, and of the peer
    monkeypatch.setattr(latency_pipelines, "_latents", lambda *arguments: next(factors) * real(*arguments))
    with drawn() as found:
        assert not found
    assert "rms error" in said[0]


@pytest.mark.slow
def test_a_pipeline_that_fails_is_not_timed(drawn: Drawn, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("got 139 GiB")

    monkeypatch.setattr(latency_pipelines._Pipeline, "__call__", without_memory)
    with drawn() as found:
        assert not found
    assert said == ["picture, diffusers_eager: OutOfMemoryError('got 139 GiB'). It is not timed."]


@pytest.mark.slow
def test_what_is_no_picture_is_not_timed(drawn: Drawn, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose networks overflow."""
    nothing = torch.full((2, 3, 96, 64), torch.nan)
    monkeypatch.setattr(latency_pipelines._Pipeline, "checked", lambda self: nothing)
    with drawn() as found:
        assert not found
    assert said[0].startswith(f"picture, diffusers_eager: got {nothing.numel()} numbers that are not finite")


def test_pictures_are_judged_by_pytorchs_own_half() -> None:
    """By the rms: a pixel may be further off."""
    exact = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    error = 0.01 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    pixel = torch.zeros_like(exact)
    pixel[0, 0, 0, 0] = 1.0
    assert picture_error(exact + 1.9 * error, exact, exact + error, fp32=False)[1] == []
    assert picture_error(exact + error + pixel, exact, exact + error, fp32=False)[1] == []
    assert picture_error(exact + 2.1 * error, exact, exact + error, fp32=False)[1]
    assert picture_error(exact + 1e-6 * error, exact, exact, fp32=True)[1] == []  # there PyTorch's own may be none
    with pytest.raises(ParityError, match="expected"):
        picture_error(exact[..., 1:], exact, exact, fp32=False)


def test_types_are_those_that_users_have() -> None:
    work = Work(component="picture", width=64, height=64, batch=1, steps=1)
    made = latency_pipelines._Pipeline(tiny(), load(tiny()), work, torch.float16, "cpu", None)._pipeline
    assert (made.transformer.dtype, made.vae.dtype, made.text_encoder.dtype) == (torch.float16, torch.bfloat16, torch.bfloat16)
    assert not made.vae.use_tiling


def test_they_need_diffusers_layout(drawn: Drawn, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no model_index"), drawn(tmp_path, tiny()):
        pass
    with drawn(tmp_path, tiny(), modes=()) as found:
        assert found == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler, about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs a C++ compiler on a CPU")
def test_compiled_pipelines_draw_the_same(drawn: Drawn, said: list[str]) -> None:
    with drawn(modes=("eager", "reduce-overhead")) as found:
        assert list(found) == [PEERS["eager"], PEERS["reduce-overhead"]], said


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # as above
def test_compiled_pipelines_on_a_gpu(said: list[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    work = Work(component="picture", width=64, height=64, batch=1, steps=2)
    arguments = (tiny(), load(tiny()), work, ("eager", "reduce-overhead"))
    with checked_pipelines(*arguments, dtype=torch.float16, device="cuda", say=said.append) as found:
        assert list(found) == [PEERS["eager"], PEERS["reduce-overhead"]], said
        assert all(peer.task.sample().ms > 0 for peer in found.values())
