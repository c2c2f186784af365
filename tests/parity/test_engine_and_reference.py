"""The whole line once: an exported fp32 bundle in SanaEngine draws what the reference draws, at every step."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_build import PARTS, cache
from tiny_checkpoint import DPM_SOLVER, SCM, TRANSFORMER, write_checkpoint

from engines.spec import Precision
from export.build import build
from export.progress import Progress
from export.request import BuildRequest
from export.stages import Runner
from runtime import SanaEngine
from runtime.schedule import make_schedule
from sana_ref.pipeline import SanaReference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::runtime.prompt.PromptCutWarning"),
    pytest.mark.usefixtures("without_quality"),
]
BOUND = 1e-5  # of the largest latent: float32 sums in another order, carried through all steps
SANA_TINY = Path(__file__).parents[2] / "models" / "sana-tiny"
SPRINT = replace(TRANSFORMER, guidance_embeds=True, qk_norm="rms_norm_across_heads")


@pytest.fixture
def without_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build draws pictures of its own, to say how far they are from PyTorch's. Here they are compared step by step."""
    monkeypatch.setattr(Runner, "quality", lambda *_: None)


def drawn_apart(checkpoint: Path, bundle: Path, requests: list[dict], bound: float = BOUND) -> None:
    reference = SanaReference(checkpoint)
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        for request in requests:
            theirs: list[np.ndarray] = []
            expected = reference.generate(
                ["a red apple", "two cats"], seed=3, on_step=lambda *step, keep=theirs: keep.append(step[2].numpy()), **request
            )
            for number, prompt in enumerate(("a red apple", "two cats")):
                ours: list[np.ndarray] = []
                picture = engine.generate(
                    prompt, seed=3 + number, on_step=lambda *step, keep=ours: keep.append(step[2]), **request
                )[0]
                for step, (got, wanted) in enumerate(zip(ours, theirs, strict=True)):
                    error = np.abs(got[0] - wanted[number]).max() / np.abs(wanted[number]).max()
                    assert error <= bound, f"{request}, {prompt!r}, step {step}: {error:.1e}"
                assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected[number])).max() <= 1


def make(checkpoint: Path, folder: Path, side: int = 128) -> Path:
    """The bundle."""
    request = BuildRequest(
        model=str(checkpoint),
        out=folder / "bundle",
        precision=Precision.FP32,
        targets=(),
        opt_side=side,
        cache=cache(),
    )
    return build(request, Progress()).bundle.path


def test_sana(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", scheduler=DPM_SOLVER, **PARTS | {"transformer": TRANSFORMER})
    size = {"width": 128, "height": 64}
    requests: list[dict] = [{"steps": 20}, {"scheduler": "flow_euler", "steps": 5, "negative_prompts": "blue"}]
    requests += [{"steps": 3, "guidance": 1.0}, {"scheduler": make_schedule("flow_dpm_solver", 6, 2.0, "karras")}]
    drawn_apart(checkpoint, make(checkpoint, tmp_path), [size | request for request in requests])


def test_sprint(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", scheduler=SCM, **PARTS | {"transformer": SPRINT})
    drawn_apart(checkpoint, make(checkpoint, tmp_path), [{"width": 64, "height": 128, "steps": steps} for steps in (1, 2, 4)])


def test_sana_tiny(tmp_path: Path) -> None:
    """Trained weights: eight blocks, each with its own keys and values. Errors of four times as many blocks add up to twice."""
    drawn_apart(SANA_TINY, make(SANA_TINY, tmp_path, side=512), [{"width": 256, "height": 384, "steps": 4}], bound=2 * BOUND)
