"""What the TensorRT backend in C++ says where something fails or is not there, by the fakes of test_pictures.py."""

import json
import shutil

import pytest
from cpp_trt import REQUEST

from engines.bundle import Bundle
from engines.errors import TensorRTVersionError


def test_out_of_memory(sana) -> None:
    drawn = sana("a cat", *REQUEST, FAKE_GPU_MEMORY="90000")
    assert drawn.code == 2
    assert "error: GPU memory: got 1.0 kB free of 2.0 MB; expected " in drawn.error
    assert ". Draw smaller pictures, or fewer at a time, or close other programs that use the GPU." in drawn.error


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("load", "cannot load on NVIDIA Fake (none given). TensorRT says:\n  the fake does not want this engine"),
        ("context", "TensorRT made no execution context for it."),
        ("run", "TensorRT could not run the engine."),
    ],
)
def test_what_fails_says_why(sana, what, message) -> None:
    drawn = sana("a cat", *REQUEST, FAKE_TENSORRT_FAILS=what)
    assert drawn.code == 2
    assert message in drawn.error


def test_of_several_errors_the_first_is_python_s(sana, bundle, tmp_path) -> None:
    """Whichever thread is slow: of engines that fail that of the first component, and the GPU before a file that was changed."""
    for slow in ("text_encoder", "decoder"):
        failed = sana("a cat", *REQUEST, FAKE_TENSORRT_FAILS="load", FAKE_TENSORRT_SLOW=slow)
        assert failed.code == 2
        assert f"{bundle}/text_encoder/sm89.engine: got an engine that TensorRT" in failed.error
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    engine = changed / "decoder" / "sm89.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    named = ["a cat", *REQUEST, "--backend", "tensorrt"]
    refused = sana(*named, of=changed, FAKE_CUDA_SLOW="0.2")
    assert "decoder/sm89.engine was changed: got SHA-256" in refused.error
    assert refused.pictures == []
    assert refused.count("load") == 0
    assert "cuDeviceGetCount: got CUDA_ERROR_OF_SOME_KIND" in sana(*named, of=changed, FAKE_CUDA_FAILS="cuDeviceGetCount").error
    context = sana(*named, of=changed, FAKE_CUDA_FAILS="cuDevicePrimaryCtxRetain").error
    assert "CUDA, cuDevicePrimaryCtxRetain: some kind." in context


def test_a_tensorrt_that_is_not_there_or_too_old(sana, tmp_path) -> None:
    missing = sana("a cat", "--backend", "tensorrt", SANA_TENSORRT=str(tmp_path / "none.so"))
    assert "error: got no TensorRT (" in missing.error
    old = sana("a cat", "--backend", "tensorrt", FAKE_TENSORRT_OLD="1")
    assert "and expected that or a newer 1.x" in old.error
    auto = sana("a cat", *REQUEST, SANA_TENSORRT=str(tmp_path / "none.so"))
    assert "onnxruntime" in auto.error
    assert "because TensorRT cannot run this bundle here: got no TensorRT (" in auto.error


def test_plugins_that_are_not_there(sana, bundle, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    document = json.loads((other / "manifest.json").read_bytes())
    document["plugins"]["denoiser"] = {"Linear": 1}
    (other / "manifest.json").write_text(json.dumps(document))
    missing = tmp_path / "none.so"
    said = sana("a", "--backend", "tensorrt", of=other, SANA_PLUGINS=str(missing)).error
    assert said.startswith(
        f"sana: error: {missing}: TensorRT cannot load the plugins; expected the library that plugins/cpp builds."
    )
    assert "There is no such file." in said
    assert "cannot load the plugins" in sana("a", of=other, SANA_PLUGINS=str(missing)).error  # "auto" does not hide it


def test_engines_of_another_tensorrt(sana, bundle, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    path = other / "manifest.json"
    document = json.loads(path.read_bytes())
    document["tensorrt"]["version"] = "1.2.3"
    path.write_text(json.dumps(document))
    found = Bundle.open(bundle, verify=False).manifest.tensorrt
    assert found is not None
    with pytest.raises(TensorRTVersionError) as caught:
        Bundle.open(other, verify=False).check_tensorrt(flavor=found.flavor, version=found.version)
    said = sana("a", "--backend", "tensorrt", of=other).error
    assert said == f"sana: error: {caught.value}\n"
