"""The TensorRT backend on a real GPU, with engines of a fake bundle built there."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from fakes import fake_info, fake_inputs, fill_fake_bundle
from trt_profiles import profiles

from engines import tensorrt
from engines.bundle import Bundle, TensorRTInfo
from engines.bundle_writer import write_bundle
from engines.errors import NoGpuError
from engines.spec import COMPONENTS, LEVELS, NOT_FINITE, Precision, Target
from export.level_nodes import add_levels
from export.parity import without_levels
from runtime import SanaEngine


def build(out: Path, target: Target) -> Bundle:
    """A fake bundle whose engines are real, for one architecture."""
    built_by = TensorRTInfo(flavor=tensorrt.flavor(), version=tensorrt.version())
    info = fake_info(targets=[target], precision=Precision.FP32).model_copy(update={"tensorrt": built_by})
    with write_bundle(out) as writer:
        fill_fake_bundle(writer.path, info)
        for component in COMPONENTS:
            graph = writer.path / component / "model.onnx"
            if component == "decoder":
                model = onnx.load(graph)
                add_levels(model)
                graph = out.with_name("decoder.onnx")
                onnx.save(model, graph)
            engine = tensorrt.build_engine(graph, profiles=profiles(component), targets=[target], expected_plugins={})
            (writer.path / component / f"{target}.engine").write_bytes(engine)
        return writer.finish(info)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    try:
        target = tensorrt.current_target()
    except NoGpuError as error:
        pytest.skip(str(error))
    if target is None:
        pytest.skip("no GPU")
    return build(tmp_path_factory.mktemp("gpu") / "bundle", target)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[SanaEngine]:
    with SanaEngine(bundle, kernel_cache=False) as made:
        yield made


def sha(image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.gpu
def test_components_agree_with_onnxruntime(engine: SanaEngine, bundle: Bundle) -> None:
    assert engine.backend == "tensorrt"
    if tensorrt.current_target() == Target.SM90 and tensorrt.version().startswith("1.6."):
        pytest.xfail("TensorRT for RTX 1.6 computes fp32 products in TF32 on SM 9.0, whatever the flag says")
    with SanaEngine(bundle, backend="onnxruntime") as other:
        for component in COMPONENTS:
            for batch in (1, 3, 4):
                inputs = fake_inputs(component, batch=batch, height=2, width=3)
                with engine.session(component) as ours, other.session(component) as theirs:
                    got, expected = ours.run(inputs), theirs.run(inputs)
                for name in expected:
                    np.testing.assert_allclose(got[name], expected[name], atol=2e-5, err_msg=f"{component} {name} {batch}")


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_levels_are_those_of_the_images(engine: SanaEngine, scale: float) -> None:
    """To the bit, and whatever is no number is counted."""
    latents = scale * fake_inputs("decoder", batch=2, height=3, width=4)["latents"]
    with engine.session("decoder") as session:
        assert without_levels("test", session.run({"latents": latents})).keys() == {"images"}
        latents[1, 0, 2, 3] = np.nan
        found = session.run({"latents": latents})
        assert without_levels("test", found).keys() == {"images"}
    assert found[NOT_FINITE].tolist() == [0, 3 * 32 * 32]
    assert found[LEVELS].dtype == np.uint8


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"guidance": 1.0}, {"scheduler": "flow_dpm_solver", "steps": 7}, {"steps": 1}])
def test_pictures_agree_with_onnxruntime(engine: SanaEngine, bundle: Bundle, changes: dict) -> None:
    with SanaEngine(bundle, backend="onnxruntime") as other:
        for width, height in ((64, 64), (128, 32)):
            ours = engine.generate("a red apple", seed=3, width=width, height=height, **changes)[0]
            theirs = other.generate("a red apple", seed=3, width=width, height=height, **changes)[0]
            assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.gpu
def test_ten_runs_give_one_digest(engine: SanaEngine, bundle: Bundle) -> None:
    digests = []
    for neighbours in (["a dog"], [""], ["a red apple"], ["blue"]):
        digests.append(sha(engine.generate(["a cat", *neighbours], seed=[5, 8], width=96)[0]))
        engine.generate("blue", steps=3, width=128, height=32)
        digests.append(sha(engine.generate([*neighbours, "a cat"], seed=[1, 5], width=96)[1]))
    with SanaEngine(bundle) as other:
        digests += [sha(other.generate(["a cat", "a house"], seed=5, width=96)[0]) for _ in range(2)]
    assert len(digests) == 10
    assert len(set(digests)) == 1


@pytest.mark.gpu
def test_kernels_from_the_cache_draw_the_same_pixels(engine: SanaEngine, bundle: Bundle, tmp_path: Path) -> None:
    request = {"seed": 5, "width": 96, "height": 64}
    digests = [sha(engine.generate("a cat", **request)[0])]
    seen = []
    for _ in range(3):
        with SanaEngine(bundle, kernel_cache=tmp_path / "kernels") as other:
            digests += [sha(other.generate("a cat", **request)[0]) for _ in range(3)]  # the second and third are graphs
        seen.append({path.name: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "kernels").iterdir()})
    assert len(set(digests)) == 1
    if tensorrt.flavor() == "rtx":
        assert len(seen[0]) == len(COMPONENTS)
        assert seen[1] == seen[2]  # nothing was compiled, and nothing written


@pytest.mark.gpu
def test_replay_and_cancel(engine: SanaEngine) -> None:
    from runtime.image import INFO_KEY
    from runtime.picture_info import parse_picture_info

    def cancel(step: int, *_: object) -> None:
        raise KeyboardInterrupt

    for picture in engine.generate(["a cat", "a dog", "a house", "", "blue"], seed=7):
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a dog", on_step=cancel)
        info = parse_picture_info(picture.info[INFO_KEY], source="test")
        assert engine.replay(info).tobytes() == picture.tobytes()
    assert all(seconds > 0 for timings in engine.last_timings for seconds in (*timings.steps_s, timings.decode_s))


@pytest.mark.slow
def test_engines_of_a_fake_bundle_build_without_a_gpu(tmp_path: Path) -> None:
    bundle = build(tmp_path / "bundle", Target.SM89)
    assert all(bundle.require_engine(component, "sm89").stat().st_size > 1000 for component in COMPONENTS)
