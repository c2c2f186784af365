"""`sana inspect` and `sana verify` on a bundle of trivial graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import fake_info, fill_fake_bundle, write_fake_bundle

from apps.cli.inspect import GPUS
from apps.cli.main import main
from engines.bundle_writer import write_bundle
from engines.golden import Golden, golden_name, load_golden, save_golden
from engines.parity_report import parse_report
from engines.spec import PX_PER_LATENT, Target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_fake_bundle(
        tmp_path_factory.mktemp("bundle") / "b", targets=(Target.SM80, Target.SM120), tensorrt_version="1.7.1.116"
    ).path


def test_inspect_says_what_is_inside(bundle, capsys):
    assert main(["inspect", str(bundle)]) == 0
    printed = capsys.readouterr()
    for words in (
        "fake (variant custom)",
        "sm80 (A100, A30); sm120 (RTX 50",
        "TensorRT for RTX 1.7.1.116",
        "32 to 128 px, 64 unless asked",
    ):
        assert words in printed.out
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["denoiser", "fp16"] in [row[:2] for row in rows]
    assert ["decoder", "bf16"] in [row[:2] for row in rows]
    assert "not measured" in printed.out  # no GPU ran the engines
    assert not printed.err


def test_inspect_as_json(bundle, capsys):
    assert main(["inspect", str(bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["manifest"]["targets"] == ["sm80", "sm120"]
    assert document["size"] == sum(entry["size"] for entry in document["manifest"]["files"].values())
    assert document["parity"]["components"]["denoiser"]["outputs"]["prediction"]["bound"]["mean_share"] == 0.25


def test_inspect_of_a_bundle_without_engines_and_without_report(tmp_path, capsys):
    with write_bundle(tmp_path / "b") as writer:
        fill_fake_bundle(writer.path, fake_info())
        (writer.path / "parity.json").unlink()
        writer.finish(fake_info(model="\x1b[31m[bold]red", licence="first\nsecond"))
    assert main(["inspect", str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "any CPU by ONNX Runtime; no engines for GPUs" in printed
    assert "nobody has compared this bundle" in printed
    assert "\\x1b[31m[bold]red" in printed  # the words of a bundle do not steer the terminal
    assert "\x1b" not in printed


def test_every_architecture_has_names():
    assert set(GPUS) == set(Target)


def test_verify_a_good_bundle(bundle, capsys):
    assert main(["verify", str(bundle), "--backend", "onnxruntime"]) == 0
    printed = capsys.readouterr().out
    assert "18 files have the digests of the manifest" in printed
    assert "all within their bounds" in printed
    assert printed.count(" ok ") == 12  # each output of the one case, and of all cases together


@pytest.mark.parametrize(
    ("weight", "component"), [("to_keys", "text_projection"), ("mix", "denoiser"), ("project", "denoiser"), ("to_rgb", "decoder")]
)
def test_verify_sees_one_channel_that_is_five_percent_off(tmp_path, weight, component, capsys):
    bundle = write_fake_bundle(tmp_path / "b", wrong_weight=weight).path
    assert main(["verify", str(bundle)]) == 1
    printed = capsys.readouterr().out
    assert f"{component}, " in printed
    assert "rms error: got" in printed
    assert "Do not use the bundle with it" in printed
    over = [line.split()[0] for line in printed.splitlines() if " over " in line]
    assert set(over) == {component}


def test_verify_sees_a_changed_byte(tmp_path, capsys):
    bundle = write_fake_bundle(tmp_path / "b").path
    with open(bundle / "decoder" / "model.onnx.data", "r+b") as file:
        file.write(b"\xff\xff")
    for options in ([], ["--digests-only"]):
        assert main(["verify", str(bundle), *options]) == 2
        assert "decoder/model.onnx.data was changed: got SHA-256" in capsys.readouterr().err


def test_verify_digests_only_runs_nothing(bundle, capsys, monkeypatch):
    monkeypatch.setattr("runtime.engine.SanaEngine.__init__", lambda *_, **__: 1 / 0)
    assert main(["verify", str(bundle), "--digests-only"]) == 0
    assert "have the digests" in capsys.readouterr().out


def rewrite(out: Path, edit) -> Path:
    """A bundle whose contents were edited before it was sealed: its digests are right."""
    with write_bundle(out) as writer:
        fill_fake_bundle(writer.path, fake_info())
        edit(writer.path)
        writer.finish(fake_info())
    return out


def edit_golden(change):
    def edit(folder: Path) -> None:
        path = folder / golden_name("decoder")
        case = load_golden(path)["small"]
        save_golden(path, {"small": change(case)})

    return edit


def edit_report(folder: Path, change) -> None:
    document = json.loads((folder / "parity.json").read_bytes())
    change(document["components"])
    data = json.dumps(document).encode()
    parse_report(data, source="the test")
    (folder / "parity.json").write_bytes(data)


NAN = np.full((1, 3, 4 * PX_PER_LATENT, 6 * PX_PER_LATENT), np.nan, np.float32)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: (folder / "parity.json").unlink(), "no parity.json, so there are no bounds"),
        (lambda folder: (folder / golden_name("decoder")).unlink(), "has no 'parity/decoder.safetensors'"),
        (lambda folder: edit_report(folder, lambda c: c.pop("decoder")), "no bounds for decoder"),
        (lambda folder: edit_report(folder, lambda c: c["denoiser"]["outputs"].pop("prediction")), "has bounds for next_latents"),
        (lambda folder: edit_report(folder, lambda c: c["decoder"].update(outputs={})), "has bounds for none"),
        (edit_golden(lambda g: Golden(inputs=g.inputs, outputs=g.outputs | {"more": NAN})), "got the outputs images, more"),
        (edit_golden(lambda g: Golden(inputs={"other": g.inputs["latents"]}, outputs=g.outputs)), "the graph wants latents"),
    ],
    ids=["no report", "no golden file", "no component", "no output", "no outputs", "more outputs", "other inputs"],
)
def test_a_check_of_nothing_does_not_pass(tmp_path, edit, words, capsys):
    assert main(["verify", str(rewrite(tmp_path / "b", edit))]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outputs", "words"),
    [({"images": NAN}, "not finite"), ({"images": NAN[:, :2]}, "expected (1, 2, 128, 192)"), ({"images": NAN * 0}, "not finite")],
)
def test_outputs_that_cannot_be_compared_do_not_pass(tmp_path, outputs, words, capsys):
    bundle = rewrite(tmp_path / "b", edit_golden(lambda g: Golden(inputs=g.inputs, outputs=outputs)))
    assert main(["verify", str(bundle)]) == 1
    assert words in capsys.readouterr().out


def test_verify_on_a_gpu_that_is_not_there(bundle, capsys):
    assert main(["verify", str(bundle), "--backend", "tensorrt"]) == 2
    assert capsys.readouterr().err.startswith("sana: error: ")


def test_the_portable_graph_is_held_to_its_own_bound(tmp_path, capsys):
    """Where the report has one: twice PyTorch's 16-bit error would hide a lot from a graph that computes in fp32."""

    def narrow(components: dict) -> None:
        errors = components["decoder"]["outputs"]["images"]
        errors["portable_bound"] = {"rms": errors["pytorch"]["rms"] / 100, "max": errors["pytorch"]["max"] / 100}

    bundle = rewrite(tmp_path / "b", lambda folder: edit_report(folder, narrow))
    assert main(["verify", str(bundle), "--backend", "onnxruntime"]) == 1
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if " over " in line} == {"decoder"}
