"""Peers of the smallest checkpoint, on a CPU: they are as exact as PyTorch is, or they are not timed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import LENGTH
from tiny_build import tiny

from benchmarks import latency_peers
from benchmarks.latency_parity import network_output, peer_error, wider
from benchmarks.latency_peers import PEERS, checked_peers, parse_peers
from engines.errors import RequestError
from engines.spec import ComponentName
from sana_ref.checkpoint import Checkpoint, load

COMPONENTS = ("text_encoder", "denoiser", "decoder")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load(tiny())


def inputs(checkpoint: Checkpoint, component: ComponentName) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    length, channels = checkpoint.prompt.max_sequence_length, checkpoint.transformer_config.caption_channels
    latents = rng.standard_normal((1, checkpoint.transformer_config.in_channels, 4, 4)).astype(np.float32)
    if component == "text_encoder":
        return {"input_ids": rng.integers(4, 100, (1, length)), "attention_mask": np.ones((1, length), np.int64)}
    if component == "decoder":
        return {"latents": latents}
    return {
        "latents": latents,
        "previous": latents,
        "coefficients": np.array([500, 1, 1, -0.05, 0.1, 0, 1, -0.5], np.float32),
        "guidance_weights": np.array([-3.5, 4.5], np.float32),
        "prompt_embeds": rng.standard_normal((2, 1, length, channels)).astype(np.float32),
        "prompt_mask": (np.arange(length) < LENGTH).astype(np.float32) * np.ones((2, 1, 1), np.float32),
    }


@pytest.fixture
def said() -> list[str]:
    return []


def peers(checkpoint: Checkpoint, component: ComponentName, modes: list[str], said: list[str], folder: Path | None = None) -> Any:
    return checked_peers(
        component,
        folder or tiny(),
        checkpoint,
        inputs(checkpoint, component),
        modes,
        dtype=torch.float32,
        device="cpu",
        say=said.append,
    )


@pytest.mark.slow
@pytest.mark.parametrize("component", COMPONENTS)
def test_diffusers_is_as_exact_as_pytorch(checkpoint: Checkpoint, component: ComponentName, said: list[str]) -> None:
    with peers(checkpoint, component, ["eager"], said) as found:
        assert found.keys() == {"diffusers_eager"}
        assert found["diffusers_eager"].rms_error < 1e-5
        assert found["diffusers_eager"].task.sample().ms > 0
    assert said == []


@pytest.mark.slow
def test_a_wrong_peer_is_not_timed(checkpoint: Checkpoint, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = latency_peers.MAKERS["decoder"]

    def scaled(*arguments: Any) -> Any:
        forward = real(*arguments)
        return lambda: 1.001 * forward()

    monkeypatch.setitem(latency_peers.MAKERS, "decoder", scaled)
    with peers(checkpoint, "decoder", ["eager"], said) as found:
        assert not found
    assert "decoder, diffusers_eager: rms error" in said[0]
    assert said[0].endswith("It is not timed.")


@pytest.mark.slow
def test_a_peer_that_fails_is_left_out(checkpoint: Checkpoint, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are timed, and so is what they are beside."""
    real = latency_peers.MAKERS["decoder"]

    def without_memory(*arguments: Any) -> Any:
        if not said:
            raise torch.OutOfMemoryError("got 139 GiB")
        return real(*arguments)

    monkeypatch.setitem(latency_peers.MAKERS, "decoder", without_memory)
    with peers(checkpoint, "decoder", ["eager"], said) as found:
        assert not found
    assert "decoder, diffusers_eager: OutOfMemoryError('got 139 GiB'). It is not timed." in said
    with peers(checkpoint, "decoder", ["eager"], said) as found:
        assert list(found) == ["diffusers_eager"]


def test_peers_need_diffusers_layout(checkpoint: Checkpoint, said: list[str], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no model_index"), peers(checkpoint, "decoder", ["eager"], said, tmp_path):
        pass
    with peers(checkpoint, "decoder", [], said, tmp_path) as found:
        assert found == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler, about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    ("component", "mode"), [("text_encoder", "reduce-overhead"), ("denoiser", "reduce-overhead"), ("decoder", "max-autotune")]
)
def test_compiled_peers_are_as_exact(checkpoint: Checkpoint, component: ComponentName, mode: str, said: list[str]) -> None:
    """Each component and each mode once: a mode decides how the compiler searches, and compiling takes long."""
    with peers(checkpoint, component, ["eager", mode], said) as found:
        assert list(found) == [PEERS["eager"], PEERS[mode]], said


def test_a_half_is_judged_by_pytorchs_own_half(checkpoint: Checkpoint) -> None:
    x = inputs(checkpoint, "denoiser")
    exact = network_output("denoiser", checkpoint, x, wider(torch.bfloat16), "cpu")
    same = network_output("denoiser", checkpoint, x, torch.bfloat16, "cpu")
    rms, wrong = peer_error(same, exact, same, fp32=False)
    assert 1e-4 < rms < 0.1
    assert not wrong
    assert peer_error(exact + 3 * (same - exact), exact, same, fp32=False)[1]


def test_words_for_peers() -> None:
    assert parse_peers("eager, max-autotune,eager") == ["eager", "max-autotune"]
    assert parse_peers("none") == []
    with pytest.raises(RequestError, match="got eagr; did you mean 'eager'"):
        parse_peers("eager,eagr")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # as above
def test_compiled_peers_on_a_gpu(checkpoint: Checkpoint, said: list[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    arguments = ("denoiser", tiny(), checkpoint, inputs(checkpoint, "denoiser"), list(PEERS))
    with checked_peers(*arguments, dtype=torch.float16, device="cuda", say=said.append) as found:
        assert list(found) == list(PEERS.values()), said
        assert all(peer.task.sample().ms > 0 for peer in found.values())
