"""What a finished autoencoder's run becomes, and how it is measured; perceptual distances."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from train import tasks
from train.autoencoder import measure, perceptual, run, weights
from train.autoencoder.__main__ import main
from train.autoencoder.export import export, settings_of
from train.autoencoder.settings import PerceptualSettings, SceneSettings
from train.autoencoder.task import AutoencoderTask, architecture
from train.parallel.processes import Processes
from train.tiny.recogniser import RECOGNISER, Recogniser
from train.trainer.errors import TrainingCheckpointError, TrainingError

CPU = torch.device("cpu")
MINUSCULE = (
    "{encoder_block_out_channels: [8, 8, 8, 8, 32, 32], decoder_block_out_channels: [8, 8, 8, 8, 32, 32], "
    "decoder_layers_per_block: [0, 1, 1, 1, 1, 1]}"
)


def quiet(line: str) -> None: ...


@pytest.fixture(scope="module")
def finished(sprite_file, tmp_path_factory):
    """Settings of a run that is done."""
    torch.set_num_threads(1)
    settings, make = tasks.load(
        "sana_tiny_dcae",
        [
            "env=ci",
            f"pictures.path={sprite_file}",
            "pictures.sizes=[[64, 64], [96, 64]]",
            "pictures.weights=[1.0, 1.0]",
            "pictures.num_scenes=50",
            f"autoencoder.architecture={MINUSCULE}",
            f"trainer.folder={tmp_path_factory.mktemp('run')}",
            "trainer.batch=2",
            "trainer.micro_batch=2",
            "objective.adversarial.weight=0.1",
            "objective.adversarial.width=8",
        ],
    )
    make(settings, processes=Processes(device=CPU), log=quiet).run()
    return settings


def test_the_folder_is_one_of_diffusers_with_the_average_and_its_factor(finished, tmp_path):
    from diffusers import AutoencoderDC

    found = export(finished.trainer.folder, tmp_path / "vae", num_pictures=8, dtype=torch.float32, device=CPU, log=quiet)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["scaling_factor"] == pytest.approx(1 / found["latent_std"], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae"]  # nothing half written beside it
    ours = weights.load_vae(tmp_path / "vae")
    theirs, said = AutoencoderDC.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pictures = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        latent = ours.encode(pictures)
        torch.testing.assert_close(theirs.encode(pictures).latent, latent, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(theirs.decode(latent).sample, ours.decode(latent), atol=1e-5, rtol=1e-4)
    average = load_file(finished.trainer.folder / "step_00000002" / "ema.safetensors")
    last = load_file(finished.trainer.folder / "step_00000002" / "model.safetensors")
    stored = ours.state_dict()
    assert all(torch.equal(average[f"autoencoder.{name}"], stored[name]) for name in stored if f"autoencoder.{name}" in average)
    assert any(not torch.equal(last[f"autoencoder.{name}"], tensor) for name, tensor in stored.items())


@pytest.mark.slow
def test_a_frozen_encoder_keeps_its_scaling_factor(finished, tmp_path):
    full = run.make_task(finished).autoencoder
    weights.save_vae(full, tmp_path / "full", scaling_factor=0.75, dtype=torch.float32)
    frozen = finished.autoencoder.model_copy(update={"train": "decoder", "encoder_from": tmp_path / "full"})
    trainer = finished.trainer.model_copy(update={"folder": tmp_path / "run", "steps": 1})
    lite = finished.model_copy(update={"autoencoder": frozen, "trainer": trainer})
    run.make_trainer(lite, processes=Processes(device=CPU), log=quiet).run()
    export(lite, tmp_path / "lite", num_pictures=2, device=CPU, log=quiet)
    assert weights.read_config(tmp_path / "lite").scaling_factor == 0.75
    encoder = weights.load_vae(tmp_path / "lite").encoder.state_dict()
    assert all(torch.equal(tensor.bfloat16().float(), encoder[name]) for name, tensor in full.encoder.state_dict().items())


def test_the_settings_that_a_run_keeps(finished):
    again = settings_of(finished.trainer.folder)
    assert (again.autoencoder, again.pictures, again.objective) == (finished.autoencoder, finished.pictures, finished.objective)
    assert again.trainer.folder == finished.trainer.folder


def test_what_cannot_be_exported_is_said(finished, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(TrainingError, match="is there already; expected a new folder"):
        export(finished, tmp_path / "there", num_pictures=2, device=CPU, log=quiet)
    with pytest.raises(TrainingCheckpointError, match="got no checkpoint"):
        export(tmp_path, tmp_path / "out", log=quiet)
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "state.json").write_text('{"config": {"trainer": {}}}')
    with pytest.raises(TrainingCheckpointError, match="not those of an autoencoder's run"):
        export(tmp_path, tmp_path / "out", log=quiet)


def test_the_program_exports_in_bf16_and_measures(finished, tmp_path, sprite_file, capsys):
    out = tmp_path / "vae"
    assert main(["export", str(finished.trainer.folder), str(out), "--num-pictures", "4"]) == 0
    assert {tensor.dtype for tensor in load_file(out / "diffusion_pytorch_model.safetensors").values()} == {torch.bfloat16}
    capsys.readouterr()
    assert main(["measure", str(out), "--pictures", str(sprite_file), "--side", "64", "--num-pictures", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_pictures"] >= 4
    assert len(found["channel_std"]) == 32
    assert main(["export", str(tmp_path), str(out)]) == 2
    assert "got no checkpoint" in capsys.readouterr().err


def test_psnr_of_known_pictures():
    wanted = torch.zeros(2, 3, 8, 8)
    got = torch.stack([wanted[0] + 0.2, wanted[1] + 5])  # clamped to 1
    torch.testing.assert_close(measure.psnr(got, wanted), torch.tensor([20.0, 6.0206]), atol=1e-3, rtol=0)


def test_measured_pictures_are_not_those_of_training(sprite_file):
    settings = SceneSettings(kind="scenes", path=sprite_file, sizes=((64, 64),), weights=(1.0,), num_scenes=16)
    held = measure.held_out(settings, 8, micro_batch=4, device=CPU)
    assert [each.shape for each in held] == [(4, 3, 64, 64)] * 2
    own = run.make_source(settings, micro_batch=4, processes=Processes(device=CPU)).batch(0)
    assert not any(torch.equal(a, b) for a in own for each in held for b in each)
    vae = AutoencoderTask(architecture(tasks.load("sana_tiny_dcae", [f"autoencoder.architecture={MINUSCULE}"])[0].autoencoder))
    found = measure.measure(vae.autoencoder, held)
    assert found["num_pictures"] == 8
    assert -1 <= found["ssim"] <= 1
    assert found == measure.measure(vae.autoencoder, held)  # the noise is the same each time


@pytest.fixture
def recogniser(tmp_path):
    torch.manual_seed(0)
    sizes = RECOGNISER | {"widths": [8, 16]}
    config = {**sizes, "classes": ["cat", "owl"], "colours": ["red", "blue"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(Recogniser(2, 2, **sizes).state_dict(), tmp_path / "model.safetensors")
    return PerceptualSettings(kind="recogniser", path=tmp_path)


def test_the_recognisers_distance(recogniser):
    distance = perceptual.make_perceptual(recogniser, CPU)
    wanted = torch.rand(2, 3, 64, 64) * 2 - 1
    assert distance(wanted, wanted).item() == 0
    near, far = (wanted + noise * torch.randn_like(wanted) for noise in (0.05, 0.5))
    assert 0 < distance(near, wanted).item() < distance(far, wanted).item()
    far.requires_grad_()
    (grad,) = torch.autograd.grad(distance(far, wanted), far)
    assert grad.abs().sum() > 0


def test_a_network_that_cannot_be_had_is_said(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match=r"perceptual_network.path: got .*expected the folder of a trained recogniser"):
        perceptual.make_perceptual(PerceptualSettings(kind="recogniser", path=tmp_path), CPU)
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.lpip", None)
    with pytest.raises(TrainingError, match=r"got lpips, and VGG cannot be had .*pip install torchvision"):
        perceptual.make_perceptual(PerceptualSettings(kind="lpips"), CPU)
