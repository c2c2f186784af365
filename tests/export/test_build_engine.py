import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_build import cache, tiny

from export.build_engine import main

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = shutil.which("nvidia-smi") is None


def answer(capsys, *options: str) -> tuple[int, str]:
    code = main(["--out", "/nonexistent/bundle", "--model", str(tiny()), "--target", "onnx", *options])
    return code, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--precision", "fp8", "--target", "sm86"), 2, ["got fp8 for sm86", "expected sm89 or later", "--precision int8"]),
        (("--precision", "nvfp4", "--target", "sm89"), 2, ["got nvfp4 for sm89", "expected sm120 or sm121", "--precision fp8"]),
        (("--precision", "nvfp4", "--target", "sm90"), 2, ["got nvfp4 for sm90", "expected sm120 or sm121", "--precision fp8"]),
        (("--precision", "fp8", "--target", "sm90"), 2, ["got 'sm90'", "Build on that GPU"]),
        (("--decoder-precision", "fp8"), 2, ["decoder-precision: got fp8 for onnx", "sm89", "Use bf16 there"]),
        (("decoder_precision=int4",), 2, ["decoder_precision: got 'int4'", "Valid: fp32, bf16, fp8, int8"]),
        (("--plan", "/no/such/plan"), 2, ["got /no/such/plan with --precision fp16", "int8, fp8, nvfp4"]),
        (("--precision", "int8", "--plan", "/no/such/plan"), 2, ["/no/such/plan: got no plan of a quantization"]),
        (("--precision", "fp61"), 2, ["got 'fp61'", "did you mean"]),
        (("--target", "sm90"), 2, ["sm90", "--target current", "on that GPU"][:1]),
        (("--target", "sm98"), 2, ["got 'sm98'", "did you mean"]),
        (("--components", "decodr"), 2, ["got 'decodr'", "did you mean 'decoder'"]),
        (("--default-side", "100"), 2, ["--default-side: got 100 px", "Use 96 or 128"]),
        (("--min-side", "256", "--max-side", "128"), 2, ["got 256 (min), 128 (default) and 128 px (max)"]),
        (("--max-batch", "0"), 2, ["--max-batch: got 0"]),
        (("--model", "/no/such/folder"), 1, ["/no/such/folder", "no such file or folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input(capsys, options, code, words):
    got, said = answer(capsys, *options)
    assert got == code, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
@pytest.mark.parametrize(("precision", "names"), [("fp16", "sm80,sm86,sm89,sm120,sm121"), ("nvfp4", "sm120,sm121")])
def test_current_without_a_gpu(capsys, precision, names):
    code, said = answer(capsys, "--target", "current", "--precision", precision)
    assert code == 1
    assert "--target current: got no NVIDIA driver" in said
    assert f"name architectures ({names})" in said


def test_half_a_download(capsys, tmp_path):
    shutil.copytree(tiny(), tmp_path / "half")
    weights = tmp_path / "half/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, said = answer(capsys, "--model", str(tmp_path / "half"))
    assert code == 1
    assert "The download broke off" in said


def test_a_wrong_word_is_answered_without_loading_torch():
    program = (
        "import sys; from export.build_engine import main; "
        "code = main(['--model', 'm', '--out', 'o', '--precision', 'int9']); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [[str(ROOT / "export/build_engine.py")], ["-m", "export.build_engine"]], ids=["file", "module"])
def test_it_starts_as_a_file_and_as_a_module(start, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT) if start[0] == "-m" else ""}
    done = subprocess.run(
        [sys.executable, *start, "--model", "/no/such/folder", "--target", "onnx", "--out", str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "/no/such/folder: no such file or folder" in done.stderr


@pytest.mark.slow
def test_a_build_prints_plain_lines_when_nobody_watches(tmp_path, capsys):
    report = tmp_path / "report.json"
    options = ["--out", str(tmp_path / "b"), "--cache", str(cache()), "--report", str(report)]
    code = main(["--model", str(tiny()), "--target", "onnx", *options])
    assert {"stage", "seconds", "peak_bytes", "cached"} == set(json.loads(report.read_text())[-1])
    lines = capsys.readouterr().err.splitlines()
    assert code == 0
    assert [line.split("  ")[0] for line in lines if not line.startswith("  ")][:3] == [
        "read checkpoint",
        "export text_encoder",
        "export text_projection",
    ]
    assert any("fp16 is the denoiser's alone" in line for line in lines)
    assert "b: done, " in lines[-1]
