"""Training of autoencoders, minuscule ones on a CPU: losses, what moves and what does not, sources, exact resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from runtime.config import ConfigError
from sana_ref.autoencoder import AutoencoderDCConfig
from train import tasks
from train.autoencoder import losses, run, weights
from train.autoencoder.pictures import FileSource, SceneSource
from train.autoencoder.settings import ArchitectureSettings, AutoencoderExperiment, FileSettings, SceneSettings
from train.autoencoder.task import AutoencoderTask, architecture
from train.data.errors import DataError, TooManyBroken
from train.objective.place import Place
from train.parallel.processes import Processes
from train.trainer.errors import TrainingError

CPU = Processes(device=torch.device("cpu"))
EXPERIMENTS = {
    "sana_tiny_dcae": "all",
    "sana_tiny_dcae_lite": "decoder",
    "dcae_phase1_256px": "all",
    "dcae_phase2_1024px": "middle",
    "dcae_phase3_256px": "head",
    "dcae_lite": "decoder",
}
MINUSCULE = {
    "encoder_block_out_channels": [8, 8, 8, 8, 32, 32],
    "decoder_block_out_channels": [8, 8, 8, 8, 32, 32],
    "decoder_layers_per_block": [0, 1, 1, 1, 1, 1],
}


def quiet(line: str) -> None: ...


@pytest.fixture
def settings(sprite_file, tmp_path):
    """settings(key=value, …) of a minuscule run in tmp_path."""

    def make(*overrides: str, experiment: str = "sana_tiny_dcae", name: str = "run") -> AutoencoderExperiment:
        torch.set_num_threads(1)
        architecture = ", ".join(f"{key}: {value}" for key, value in MINUSCULE.items())
        found, _ = tasks.load(
            experiment,
            [
                "env=ci",
                f"pictures.path={sprite_file}",
                "pictures.sizes=[[64, 64], [96, 64]]",
                "pictures.weights=[1.0, 1.0]",
                "pictures.num_scenes=50",
                f"autoencoder.architecture={{{architecture}}}",
                f"trainer.folder={tmp_path / name}",
                "trainer.batch=4",
                "trainer.micro_batch=2",
                "trainer.schedule.warm_up_steps=0",
                "validation.every=1000",
                *overrides,
            ],
        )
        return found

    return make


def trained(settings: AutoencoderExperiment, **options) -> run.Trainer:
    trainer = run.make_trainer(settings, processes=CPU, log=options.get("log", quiet))
    trainer.resume()
    trainer.run()
    return trainer


def state(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_fits(name):
    found, make = tasks.load(name)
    assert (found.name, found.autoencoder.train, make) == (name, EXPERIMENTS[name], run.make_trainer)
    assert found.trainer.batch % found.trainer.micro_batch == 0
    AutoencoderExperiment.model_validate_json(found.model_dump_json())  # what a checkpoint keeps
    with torch.device("meta"):
        AutoencoderTask(architecture(found.autoencoder))


def test_the_fields_of_an_architecture_are_those_of_the_reference():
    assert AutoencoderDCConfig(**ArchitectureSettings().model_dump()) == AutoencoderDCConfig()
    fields = {field.name for field in dataclasses.fields(AutoencoderDCConfig)}
    assert set(ArchitectureSettings.model_fields) == fields - {"scaling_factor"}


@pytest.mark.slow
def test_the_sizes_of_sana_tiny():
    full, lite = (AutoencoderTask(architecture(tasks.load(name)[0].autoencoder)).autoencoder for name in list(EXPERIMENTS)[:2])
    assert sum(p.numel() for p in full.parameters()) * 2 < 10.7e6  # bytes in bf16
    assert sum(p.numel() for p in lite.decoder.parameters()) * 2 < 3e6
    assert not any("attn" in name for name, _ in lite.decoder.named_parameters())
    assert {n: p.shape for n, p in lite.encoder.named_parameters()} == {n: p.shape for n, p in full.encoder.named_parameters()}
    pictures = torch.zeros(1, 3, 64, 96)
    assert full(pictures).shape == lite(pictures).shape == pictures.shape


@pytest.mark.slow
def test_unknown_keys_and_contradictions_are_named():
    for override, said in (
        ("objective.l2=1", "did you mean 'l1'"),
        ("+objective.adversarial.wieght=1", "objective.adversarial.wieght: unknown key; did you mean 'weight'"),
        ("autoencoder.variant=dc_ae", "got both of variant and architecture"),
        ("autoencoder.train=head", "got train: head without a checkpoint"),
        ("autoencoder.encoder_from=x", "got encoder_from with train: all"),
        ("pictures.sizes=[[500, 512]]", "expected one weight for each size"),
        ("objective.perceptual=1.0", "without a perceptual_network"),
        ("parallel.strategy=fsdp2", "expected single or ddp"),
        ("pictures.kind=shards", "got 'shards'"),
    ):
        with pytest.raises(ConfigError) as caught:
            tasks.load("sana_tiny_dcae", [override])
        assert said in str(caught.value)


def test_the_losses_of_known_pictures_and_latents():
    wanted = torch.zeros(1, 3, 8, 8)
    assert losses.picture_losses(wanted + 0.5, wanted) == {"l1": 0.5, "edges": 0.0, "coarse": 1.0}
    columns = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 8, 8)
    assert losses.picture_losses(columns, wanted) == {"l1": 1.0, "edges": 2.0, "coarse": 0.0}
    torch.manual_seed(0)
    latent = torch.randn(1000, 4, 3, 3)
    assert all(value < 1e-3 for value in losses.covariance_penalties(latent).values())
    twice = losses.covariance_penalties(torch.cat([2 * latent[:, :1], 2 * latent[:, :1]], dim=1) + 3)
    assert float(twice["spread"]) == pytest.approx(10, rel=0.05)  # (2 - 1)^2 + 3^2
    assert float(twice["decorrelate"]) == pytest.approx(8, rel=0.05)  # 4^2, over two channels


@pytest.mark.slow
def test_the_loss_falls_and_the_validation_is_logged(settings):
    lines: list[str] = []
    few = ["pictures.num_scenes=4", "pictures.sizes=[[64, 64]]", "pictures.weights=[1.0]", "trainer.batch=2"]
    found = settings(*few, "trainer.steps=40", "trainer.log_steps=1", "trainer.optimizer.lr=1e-2", "validation.every=20")
    trained(found, log=lines.append)
    l1 = [float(line.split(" l1 ")[1].split()[0]) for line in lines if " l1 " in line]
    assert np.mean(l1[-5:]) < 0.8 * np.mean(l1[:3])
    assert sum("validation psnr_db" in line for line in lines) == 2


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_with_its_discriminator(settings):
    adversarial = "objective.adversarial={weight: 0.1, start: 1, width: 8, num_layers: 2}"
    whole = trained(settings(adversarial, "trainer.steps=4", name="whole"))
    trained(settings(adversarial, "trainer.steps=4", "trainer.checkpoint_steps=2", name="cut"))
    cut = settings(adversarial, "trainer.steps=4", "trainer.checkpoint_steps=2", name="cut")
    last = cut.trainer.folder / "step_00000004"
    last.rename(cut.trainer.folder / "gone")  # as if it had been killed after step 2
    again = trained(cut)
    assert again.resumed
    assert any(name.startswith("discriminator.") for name in state(again))
    assert not changed(state(whole), state(again))
    assert not changed(load_file(last / "ema.safetensors"), load_file(cut.trainer.folder / "gone" / "ema.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "moving"),
    [
        ("all", ("",)),
        ("decoder", ("decoder.",)),
        ("middle", ("encoder.down_blocks.5.", "encoder.conv_out.", "decoder.conv_in.", "decoder.up_blocks.5.")),
        ("head", ("decoder.up_blocks.1.", "decoder.norm_out.", "decoder.conv_out.")),  # stage 0 has no layers
    ],
)
def test_what_is_not_trained_does_not_move(settings, tmp_path, train, moving):
    start = AutoencoderTask(architecture(settings().autoencoder)).autoencoder
    weights.save_vae(start, tmp_path / "vae", scaling_factor=1.0, dtype=torch.float32)
    found = settings(f"autoencoder.train={train}", f"autoencoder.checkpoint={tmp_path / 'vae'}", "trainer.steps=2")
    after = trained(found).model.autoencoder.state_dict()
    expected = {name for name in after if name.startswith(moving)}
    moved = changed(start.state_dict(), after)
    assert moved <= expected
    assert {name for name, p in start.named_parameters() if p.ndim > 1 and name in expected} <= moved


@pytest.mark.slow
def test_a_lite_decoder_keeps_the_encoder_that_it_is_given(settings, tmp_path):
    full = AutoencoderTask(architecture(settings().autoencoder)).autoencoder
    weights.save_vae(full, tmp_path / "full", scaling_factor=1.0, dtype=torch.float32)
    lite = settings(
        f"autoencoder.encoder_from={tmp_path / 'full'}",
        "autoencoder.architecture.decoder_block_types=ResBlock",
        "autoencoder.architecture.decoder_layers_per_block=[0, 1, 1, 1, 1, 1]",
        "trainer.steps=2",
        experiment="sana_tiny_dcae_lite",
    )
    trainer = trained(lite)
    assert not changed(full.encoder.state_dict(), trainer.model.autoencoder.encoder.state_dict())
    assert trainer.ema is not None
    assert all(name.startswith("autoencoder.decoder.") for name in trainer.ema.average)
    with pytest.raises(TrainingError, match=r"autoencoder.checkpoint: got .*, whose decoder.* has shape"):
        run.make_trainer(
            settings(
                f"autoencoder.checkpoint={tmp_path / 'full'}",
                "autoencoder.architecture.decoder_layers_per_block=[0, 1, 1, 1, 1, 2]",
            ),
            processes=CPU,
        )


def test_generator_and_discriminator_do_not_move_each_other(settings):
    found = settings("objective.adversarial={weight: 0.5, width: 8, num_layers: 2}")
    task = run.make_task(found)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    made = task(pictures)
    generator = dict(task.named_parameters())
    grads = torch.autograd.grad(losses.generator_loss(made.scores.made), list(generator.values()), allow_unused=True)
    reached = {name for name, grad in zip(generator, grads, strict=True) if grad is not None}
    assert reached
    assert all(name.startswith("autoencoder.") for name in reached)
    made = task(pictures)
    discriminator = losses.discriminator_loss(made.scores.real, made.scores.detached)
    grads = torch.autograd.grad(discriminator, list(generator.values()), allow_unused=True)
    reached = {name for name, grad in zip(generator, grads, strict=True) if grad is not None}
    assert reached
    assert all(name.startswith("discriminator.") for name in reached)


def test_the_adversarial_loss_counts_from_its_start(settings):
    found = settings("objective.adversarial={weight: 0.5, start: 3, width: 8, num_layers: 2}")
    task = run.make_task(found)
    objective = losses.AutoencoderObjective(found.objective, latent_channels=32, px_per_latent=32)
    batch = {"pictures": torch.rand(2, 3, 64, 64) * 2 - 1}
    before, after = (objective(task, batch, Place(seed=0, step=step)) for step in (2, 3))
    reconstruction = sum(
        getattr(found.objective, name) * before[name] for name in ("l1", "edges", "coarse", "spread", "decorrelate")
    )
    torch.testing.assert_close(before["loss"], reconstruction)
    assert abs((after["loss"] - before["loss"]).item()) > 0.1  # the discriminator's begins near 1


def test_the_noise_is_a_function_of_the_place():
    objective = losses.AutoencoderObjective(tasks.load("sana_tiny_dcae")[0].objective, latent_channels=4, px_per_latent=32)
    pictures, place = torch.zeros(64, 3, 64, 96), Place(seed=1, step=5)
    noise = objective._noise(pictures, place)
    assert noise.shape == (64, 4, 2, 3)
    assert torch.equal(noise, objective._noise(pictures, place))
    assert not torch.equal(noise, objective._noise(pictures, Place(seed=1, step=6)))
    assert 0.25 < float((noise == 0).all(dim=(1, 2, 3)).float().mean()) < 0.75


def scenes(sprite_file: Path, **changes) -> SceneSettings:
    return SceneSettings(
        **{"kind": "scenes", "path": sprite_file, "sizes": ((64, 64), (96, 64)), "weights": (0.5, 0.5), "num_scenes": 40} | changes
    )


def test_scenes_are_a_function_of_the_number(sprite_file):
    source = SceneSource(scenes(sprite_file), micro_batch=3, processes=CPU)
    there = iter(source)
    first = [next(there)["pictures"] for _ in range(8)]
    assert {tuple(each.shape) for each in first} == {(3, 3, 64, 64), (3, 3, 64, 96)}
    assert all(-1 <= each.min() and each.max() <= 1 for each in first)
    other = SceneSource(scenes(sprite_file), micro_batch=3, processes=CPU)
    other.load_state_dict({"batches": 5})
    rest = iter(other)
    assert all(torch.equal(next(rest)["pictures"], each) for each in first[5:])
    assert other.state_dict() == source.state_dict() == {"batches": 8}
    second = SceneSource(scenes(sprite_file), micro_batch=3, processes=Processes(device=CPU.device, rank=1, world_size=2))
    second.load_state_dict({"batches": 4})
    theirs = iter(second)
    assert all(torch.equal(next(theirs)["pictures"], first[number]) for number in (5, 7))
    assert second.state_dict() == {"batches": 8}
    with pytest.raises(DataError, match=r"prepare_sprites"):
        SceneSource(scenes(Path("nowhere")), micro_batch=1, processes=CPU)


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(8):
        pixels = rng.integers(0, 255, size=(40 + 8 * index, 90, 3), dtype=np.uint8)
        (tmp_path / "pictures" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / str(index % 2) / f"{index}.png")
    return tmp_path / "pictures"


def test_crops_of_files_are_a_function_of_the_number(folder):
    found = FileSettings(kind="files", path=folder, side=64, max_shrink=1.5, max_broken_share=0.2)
    source = FileSource(found, micro_batch=4, processes=CPU)
    there = iter(source)
    first = [next(there)["pictures"] for _ in range(4)]
    assert all(each.shape == (4, 3, 64, 64) and -1 <= each.min() and each.max() <= 1 for each in first)
    threads = FileSource(found, micro_batch=4, processes=CPU, num_workers=2)
    threads.load_state_dict({"batches": 1})
    rest = iter(threads)
    assert all(torch.equal(next(rest)["pictures"], each) for each in first[1:])
    assert threads.state_dict() == source.state_dict()
    rest.close()
    seen = [item.key for number in (0, 1) for _, item in source._samples(number)]
    assert sorted(seen) == sorted(item.key for item in source.items)  # an epoch
    halves = [FileSource(found, micro_batch=2, processes=Processes(device=CPU.device, rank=r, world_size=2)) for r in (0, 1)]
    assert torch.equal(torch.cat([half.batch(half.number + 2) for half in halves]), first[1])


def test_broken_files_are_counted_and_replaced(folder):
    (folder / "0" / "0.png").write_bytes(b"no picture")
    found = FileSettings(kind="files", path=folder, side=32, max_broken_share=0.2)
    said: list[str] = []
    source = FileSource(found, micro_batch=8, processes=CPU, log=said.append)
    assert source.batch(0).shape == source.batch(1).shape == (8, 3, 32, 32)
    assert [broken.name for broken in source.report.broken] == ["0/0.png"]
    (line,) = said
    assert line.startswith("pictures: left out 0/0.png: ")
    strict = FileSource(found.model_copy(update={"max_broken_share": 0.0}), micro_batch=8, processes=CPU)
    with pytest.raises(TooManyBroken, match=r"0/0.png"):
        strict.batch(0)
    with pytest.raises(DataError, match="no such file or folder"):
        FileSource(found.model_copy(update={"path": folder / "x"}), micro_batch=1, processes=CPU)
