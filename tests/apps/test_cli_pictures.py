"""`sana generate` and `sana replay` on a bundle of trivial graphs."""

from pathlib import Path

import numpy as np
import pytest
from fakes import write_fake_bundle
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from apps.cli.generate import picture_paths
from apps.cli.main import main
from apps.cli.replay import compare
from engines.errors import RequestError
from runtime.image import read_picture, read_picture_info, save_png


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "b").path


@pytest.fixture
def picture(bundle, tmp_path, capsys) -> Path:
    assert main(["generate", str(bundle), "a red apple", "--seed", "7", "--out", str(tmp_path / "x.png")]) == 0
    capsys.readouterr()
    return tmp_path / "x.png"


def test_everything_that_can_be_asked_for_arrives(bundle, tmp_path, capsys):
    options = (
        "--negative blue --seed 5 --steps 3 --guidance 2.5 --width 96 --height 64 --scheduler flow_dpm_solver --backend onnxruntime"
    )
    assert (
        main(
            [
                "generate",
                str(bundle),
                "a Cat!",
                "a Cat?",
                *options.split(),
                "--count",
                "2",
                "--batch",
                "3",
                "--out",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    paths = capsys.readouterr().out.split()
    assert [Path(path).name for path in paths] == ["a-cat-5.png", "a-cat-6.png", "a-cat-7.png", "a-cat-8.png"]
    infos = [read_picture_info(path) for path in paths]
    assert [info.prompt for info in infos] == ["a Cat!", "a Cat!", "a Cat?", "a Cat?"]
    assert [info.seed for info in infos] == [5, 6, 7, 8]
    for info in infos:
        assert (info.negative_prompt, info.guidance, info.width, info.height) == ("blue", 2.5, 96, 64)
        assert (info.schedule.scheduler, info.schedule.num_steps) == ("flow_dpm_solver", 3)
    assert read_picture(paths[0])[0].size == (96, 64)


def test_a_schedule_from_a_file(bundle, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("scheduler: flow_euler\nspacing: [1.0, 0.6, 0.2]\n")
    assert main(["generate", str(bundle), "x", "--schedule", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "x.png")]) == 0
    assert read_picture_info(tmp_path / "x.png").schedule.spacing == (1.0, 0.6, 0.2)
    assert main(["generate", str(bundle), "x", "--schedule", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: cannot be read" in capsys.readouterr().err


def test_flags_lie_over_a_configuration_and_that_over_the_bundle(bundle, tmp_path, capsys):
    text = "defaults:\n  - runtime\n  - _self_\nwidth: 96\nsteps: 2\nscheduler: flow_dpm_solver\nnegative: blue\nbatch: 1\n"
    (tmp_path / "runtime_small.yaml").write_text(text)
    given = ["generate", str(bundle), "x", "--config", "runtime_small", "--config-dir", str(tmp_path)]
    assert main([*given, "--count", "2", "--steps", "3", "--out", str(tmp_path)]) == 0
    info = read_picture_info(tmp_path / "x-1.png")
    assert (info.width, info.schedule.num_steps, info.schedule.scheduler) == (96, 3, "flow_dpm_solver")
    assert (info.negative_prompt, info.batch_size) == ("blue", 1)
    assert main([*given, "--negative", "", "--schedule", "euler", "--steps", "4", "--out", str(tmp_path / "y.png")]) == 0
    info = read_picture_info(tmp_path / "y.png")
    assert (info.negative_prompt, info.schedule.scheduler, info.schedule.num_steps) == ("", "flow_euler", 4)
    capsys.readouterr()
    assert main(["generate", str(bundle), "x", "--config", "runtme"]) == 2
    assert "configuration: got 'runtme'; did you mean 'runtime'?" in capsys.readouterr().err


def test_the_file_of_defaults_changes_nothing(bundle, tmp_path):
    for name, options in (("a", []), ("b", ["--config", "runtime"])):
        assert main(["generate", str(bundle), "x", "--out", str(tmp_path / f"{name}.png"), *options]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "100"], "100"),
        (["--scheduler", "euler"], "did you mean 'flow_euler'"),
        (["--backend", "onnx"], "did you mean 'onnxruntime'"),
        (["--seed", "-1"], "seed"),
        (["--count", "0"], "--count: got 0; expected 1 or more"),
        (["--batch", "0"], "--batch: got 0"),
        (["--out", "x.jpg"], "expected a .png file, which can say how it was drawn"),
        (["--count", "2", "--out", "x.png"], "got one file, 'x.png', for 2 pictures; expected a folder"),
    ],
)
def test_bad_requests_are_one_message(bundle, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(bundle), "x", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_a_cut_prompt_is_a_warning(bundle, tmp_path, capsys):
    assert main(["generate", str(bundle), "apple " * 50, "--out", str(tmp_path / "x.png")]) == 0
    assert any(line.startswith("sana: warning: ") and "cut" in line for line in capsys.readouterr().err.splitlines())


def test_a_damaged_bundle_is_not_used(tmp_path, capsys):
    bundle = write_fake_bundle(tmp_path / "b").path
    with open(bundle / "denoiser" / "model.onnx.data", "r+b") as file:
        file.write(b"\xff")
    assert main(["generate", str(bundle), "x", "--out", str(tmp_path / "x.png")]) == 2
    assert "model.onnx.data was changed" in capsys.readouterr().err


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_names_of_pictures_are_safe_and_apart(prompts):
    paths = picture_paths(Path("out"), prompts, range(len(prompts)))
    assert len(set(paths)) == len(prompts)
    for path in paths:
        assert path.parent == Path("out")
        assert not path.name.startswith((".", "-"))
        assert len(path.name.encode()) <= 255
        assert not set(path.name) & set('\\/:*?"<>|\0\n\r\t ')


def test_long_names_are_cut_between_characters(tmp_path):
    path = picture_paths(tmp_path, ["ж" * 5000], [0])[0]
    path.touch()
    assert len(path.name.encode()) < 255


def test_replay_draws_the_same_pixels(bundle, picture, capsys):
    assert main(["replay", str(picture), "--bundle", str(bundle)]) == 0
    assert "identical, all 64x64 px (seed 7)" in capsys.readouterr().out


def test_replay_finds_the_bundle_by_its_digest(picture, bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["replay", "x.png"]) == 2
    assert "no bundle with the digest" in capsys.readouterr().err
    write_fake_bundle(tmp_path / "another", seed=2)
    (tmp_path / "again").symlink_to(bundle)
    assert main(["replay", "x.png"]) == 0


def test_replay_of_a_picture_that_was_changed(bundle, picture, tmp_path, capsys):
    image, _ = read_picture(picture)
    pixels = np.array(image)
    pixels[3, 4, 0] ^= 8
    changed = Image.fromarray(pixels)
    changed.info = image.info
    save_png(changed, picture)
    assert main(["replay", str(picture), "--bundle", str(bundle), "--out", str(tmp_path / "again.png")]) == 1
    printed = capsys.readouterr().out
    assert "different: 0.02% of the pixels, by at most 8 of 255" in printed
    assert "changed after it was drawn" in printed
    np.testing.assert_array_equal(np.array(read_picture(tmp_path / "again.png")[0]), np.array(image))


def test_replay_with_another_bundle(picture, tmp_path, capsys):
    other = write_fake_bundle(tmp_path / "other", seed=2).path
    assert main(["replay", str(picture), "--bundle", str(other)]) == 2
    assert "Use the bundle that it was drawn with" in capsys.readouterr().err


def test_replay_of_what_sana_did_not_draw(bundle, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    assert main(["replay", str(tmp_path / "plain.png"), "--bundle", str(bundle)]) == 2
    assert "without metadata of sana" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "nothing.png"), "--bundle", str(bundle)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_replay_with_a_back_end_that_is_not_here(bundle, picture, capsys):
    image, info = read_picture(picture)
    image.info["sana"] = info.model_copy(update={"backend": "tensorrt", "device": "\x1b[31mGPU", "batch_size": 4}).model_dump_json()
    save_png(image, picture)
    assert main(["replay", str(picture), "--bundle", str(bundle)]) == 2  # its own back end, which this machine has no GPU for
    assert main(["replay", str(picture), "--bundle", str(bundle), "--backend", "onnxruntime"]) == 0  # asked for by name
    assert "identical" in capsys.readouterr().out


def test_compare():
    first = Image.new("RGB", (4, 2))
    assert compare(first, first.copy()) is None
    second = first.copy()
    second.putpixel((0, 0), (255, 0, 0))
    found = compare(first, second)
    assert (found.share, found.largest, found.mean) == (1 / 8, 255, 255 / 24)
    assert found.psnr_db == pytest.approx(10 * np.log10(24))
    with pytest.raises(RequestError, match="it was resized after"):
        compare(first, Image.new("RGB", (8, 2)))
