"""The TensorRT backend on a GPU that is not there (tests/fake_tensorrt.py): what goes where, when anybody waits, what is shared."""

import functools
import hashlib
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tensorrt import ACTIVATIONS, FakeCuda, fake_backend
from fakes import fake_inputs, only, write_fake_bundle

import runtime.trt_backend
from engines.bundle import Bundle
from engines.errors import ArchitectureError, MissingFileError, NoGpuError, RequestError, SanaError, TensorRTVersionError
from engines.spec import COMPONENTS, LEVELS, NOT_FINITE
from plugins import shell
from runtime import SanaEngine
from runtime.cuda import ALIGNMENT, Cuda
from runtime.image import INFO_KEY
from runtime.picture_info import parse_picture_info


@pytest.fixture
def engine(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[SanaEngine]:
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", functools.partial(fake_backend, cuda=cuda))
    with SanaEngine(bundle, backend="tensorrt") as made:
        yield made
        assert cuda.settled or made._backend is None


def sha(image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def graphs(engine: SanaEngine) -> dict:
    return engine._backend.engines  # type: ignore[union-attr]


REQUEST = {"seed": 3, "steps": 5, "scheduler": "flow_dpm_solver", "width": 96, "negative_prompts": "blue"}


def test_same_pixels_as_onnxruntime(engine: SanaEngine, bundle: Bundle) -> None:
    with SanaEngine(bundle, backend="onnxruntime") as other:
        for changes in ({}, {"guidance": 1.0, "negative_prompts": ""}, {"steps": 4}, {"steps": 1}, {"height": 128}):
            request = REQUEST | changes
            expected = other.generate("a red apple", **request)[0]
            assert engine.generate("a red apple", **request)[0].tobytes() == expected.tobytes()


def test_floats_of_pixels_stay_on_the_gpu(engine: SanaEngine, cuda: FakeCuda) -> None:
    first = engine.generate("a red apple", **REQUEST)[0]
    before = first.tobytes()
    slots = engine._backend._slots  # type: ignore[union-attr]
    assert not slots["images"]._host
    assert slots[LEVELS]._size == 3 * first.width * first.height
    assert engine.generate("a dog", **REQUEST)[0].tobytes() != before
    assert first.tobytes() == before  # a picture has its pixels to itself


@pytest.mark.parametrize("levels", [True, False])
def test_engines_with_and_without_levels(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, levels: bool) -> None:
    monkeypatch.setattr(
        runtime.trt_backend, "open_tensorrt", lambda bundle, **options: fake_backend(bundle, levels=levels, **options)
    )
    with SanaEngine(bundle, backend="tensorrt") as engine, SanaEngine(bundle, backend="onnxruntime") as other:
        for _ in range(3):  # of a CUDA graph too
            ours, theirs = (each.generate(["a cat", "a dog"], **REQUEST) for each in (engine, other))
            assert [picture.tobytes() for picture in ours] == [picture.tobytes() for picture in theirs]
        context = engine._backend.engines["decoder"].contexts[0]  # type: ignore[union-attr]
        assert (LEVELS in context.addresses) == levels
        session = context.engine.session
        broken = {"images": np.nan, NOT_FINITE: 7}

        def run(names: list[str], feeds: dict) -> list[np.ndarray]:
            found = session.run(names, feeds)
            return [
                np.full_like(array, broken[name]) if name in broken else array for name, array in zip(names, found, strict=True)
            ]

        context.engine.session = SimpleNamespace(run=run)
        bad = 7 if levels else 3 * 96 * 64
        with pytest.raises(SanaError, match=f"got {bad} pixels that are not finite"):
            engine.generate("a cat", **REQUEST)


def test_on_step_sees_the_same_latents(engine: SanaEngine, bundle: Bundle) -> None:
    seen: dict[str, list] = {}
    for name, each in (("trt", engine), ("ort", SanaEngine(bundle, backend="onnxruntime"))):
        each.generate("a cat", on_step=lambda step, total, latents, name=name: seen.setdefault(name, []).append(latents), **REQUEST)
    np.testing.assert_array_equal(np.stack(seen["trt"]), np.stack(seen["ort"]))


def test_nobody_waits_between_the_first_step_and_the_pixels(engine: SanaEngine, cuda: FakeCuda) -> None:
    engine.generate("a cat", **REQUEST)
    waits = []
    context = graphs(engine)["denoiser"].contexts[0]
    execute = context.execute_async_v3
    context.execute_async_v3 = lambda stream: (waits.append(cuda.waits), execute(stream))[1]
    decoder = graphs(engine)["decoder"].contexts[0]
    execute_decoder = decoder.execute_async_v3
    decoder.execute_async_v3 = lambda stream: (waits.append(cuda.waits), execute_decoder(stream))[1]
    engine.generate("a cat", **REQUEST)
    assert len(waits) == 6
    assert len(set(waits)) == 1


def test_steps_differ_in_addresses_alone(engine: SanaEngine) -> None:
    engine.generate("a cat", **REQUEST)
    launches = graphs(engine)["denoiser"].contexts[0].launches
    rows = [launch["coefficients"] for launch in launches]
    assert np.diff(rows).tolist() == [ALIGNMENT] * 4
    for before, after in pairwise(launches):
        assert (after["latents"], after["previous"]) == (before["next_latents"], before["prediction"])
    for name in ("guidance_weights", "text_keys", "text_values", "prompt_mask"):
        assert len({launch[name] for launch in launches}) == 1


def test_the_text_is_projected_once_and_stays_on_the_gpu(engine: SanaEngine) -> None:
    engine.generate("a cat", **REQUEST)
    (projected,) = graphs(engine)["text_projection"].contexts[0].launches
    for launch in graphs(engine)["denoiser"].contexts[0].launches:
        assert {name: launch[name] for name in ("text_keys", "text_values")} == {
            name: projected[name] for name in ("text_keys", "text_values")
        }


@pytest.mark.parametrize(("narrow", "error"), [(np.float16, 2**-11), ("bf16", 2**-8)])
def test_keys_and_values_of_16_bits(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, narrow: object, error: float) -> None:
    """A session by hand takes and gives float32, and what is on the device is half as large."""
    cuda = FakeCuda()
    monkeypatch.setattr(
        runtime.trt_backend, "open_tensorrt", lambda bundle, **options: fake_backend(bundle, cuda=cuda, narrow=narrow, **options)
    )
    with SanaEngine(bundle, backend="tensorrt") as engine, SanaEngine(bundle, backend="onnxruntime") as other:
        inputs = fake_inputs("text_projection")
        with engine.session("text_projection") as ours, other.session("text_projection") as theirs:
            got, expected = ours.run(inputs), theirs.run(inputs)
        for name, array in got.items():
            assert array.dtype == np.float32
            assert 0 < np.abs(array - expected[name]).max() <= error * np.abs(expected[name]).max()
        inputs = fake_inputs("denoiser") | got
        with engine.session("denoiser") as ours, other.session("denoiser") as theirs:
            for name, array in ours.run(inputs).items():  # 16 bits already: nothing is rounded on the way
                np.testing.assert_array_equal(array, theirs.run(inputs)[name])
            with pytest.raises(SanaError, match="input 'text_keys': got float16; expected float32"):
                ours.run(inputs | {"text_keys": inputs["text_keys"].astype(np.float16)})
        latents: list[np.ndarray] = []
        for each in (engine, other):
            each.generate("a cat", on_step=lambda step, total, x: latents.append(x), **REQUEST)
        ours_, theirs_ = np.split(np.stack(latents), 2)
        assert np.abs(ours_ - theirs_).max() <= 10 * error * np.abs(theirs_).max()
        text_keys = engine._backend._slots["text_keys"]  # type: ignore[union-attr]
        assert text_keys._size == 2 * got["text_keys"].size


def test_the_second_picture_allocates_nothing(engine: SanaEngine, cuda: FakeCuda) -> None:
    first = engine.generate("a cat", **REQUEST)[0]
    count = cuda.total_allocations
    second = engine.generate("a cat", **REQUEST)[0]
    assert engine.generate("a dog", **(REQUEST | {"width": 32, "steps": 3}))  # smaller: fits in what is there
    assert cuda.total_allocations == count
    assert first.tobytes() == second.tobytes()


def test_engines_share_one_arena_as_large_as_the_largest_need(engine: SanaEngine) -> None:
    engine.generate("a cat", **REQUEST)
    memories = {name: graph.contexts[0].memory for name, graph in graphs(engine).items()}
    assert memories["denoiser"] == memories["decoder"]
    assert memories["denoiser"][1] == max(ACTIVATIONS.values())


def test_more_prompts_than_the_batch(engine: SanaEngine) -> None:
    steps = []
    pictures = engine.generate(
        ["a cat", "a dog", "a house", "a red apple", ""], seed=7, on_step=lambda *seen: steps.append((*seen[:2], len(seen[2])))
    )
    infos = [parse_picture_info(each.info[INFO_KEY], source="test") for each in pictures]
    assert [(info.batch_size, info.batch_index) for info in infos] == [(4, 0), (4, 1), (4, 2), (4, 3), (1, 0)]
    assert steps == [(i + 1, 8, 4 if i < 4 else 1) for i in range(8)]
    for picture, info in zip(pictures, infos, strict=True):
        again = engine.replay(info)
        assert again.tobytes() == picture.tobytes()
        assert again.info == picture.info


def test_ten_runs_give_one_digest(engine: SanaEngine) -> None:
    digests = []
    for neighbours in (["a dog", "a house"], ["", ""], ["a red apple", "blue"], ["a cat", "a cat"], ["red", "green"]):
        digests.append(sha(engine.generate(["a cat", *neighbours], seed=[5, 8, 9], width=64, height=96)[0]))
        engine.generate("blue", steps=3)
        digests.append(sha(engine.generate([*neighbours, "a cat"], seed=[1, 2, 5], width=64, height=96)[2]))
        engine.generate(neighbours, width=128, height=32)
    assert len(digests) == 10
    assert len(set(digests)) == 1


def test_texts_are_encoded_once(engine: SanaEngine, cuda: FakeCuda) -> None:
    engine.generate(["a cat", "a cat", "a dog"])
    encoder = graphs(engine)["text_encoder"].contexts[0]
    texts = cuda.graphs[0]
    for _ in range(2):
        assert len(encoder.launches) == 3  # of "" and "a cat", and when "a dog" was captured
        assert texts.launches == 1
        engine.generate("a dog", seed=9)


def test_cancelling_leaves_nothing_behind(engine: SanaEngine, cuda: FakeCuda) -> None:
    expected = sha(engine.generate("a cat", **REQUEST)[0])

    def cancel(step: int, *_: object) -> None:
        if step == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        engine.generate("a dog", on_step=cancel)
    assert cuda.settled
    assert sha(engine.generate("a cat", **REQUEST)[0]) == expected


def test_timings_come_from_the_stream(engine: SanaEngine) -> None:
    engine.generate("a cat", **REQUEST)
    (timings,) = engine.last_timings
    assert timings.steps_s == pytest.approx((0.001,) * 5)
    assert timings.decode_s == pytest.approx(0.001)


def test_close_frees_everything(engine: SanaEngine, cuda: FakeCuda) -> None:
    engine.generate("a cat")
    with engine.session("denoiser") as denoiser:
        denoiser.run(fake_inputs("denoiser", batch=2))
    engine.close()
    assert not cuda.allocations
    assert not cuda.pinned
    assert cuda.closed


def test_a_session_by_hand(engine: SanaEngine, bundle: Bundle) -> None:
    with SanaEngine(bundle, backend="onnxruntime") as other:
        for component in COMPONENTS:
            inputs = fake_inputs(component, batch=3)
            with engine.session(component) as ours, other.session(component) as theirs:
                got, expected = ours.run(inputs), theirs.run(inputs)
            assert set(got) == set(expected) | ({LEVELS, NOT_FINITE} if component == "decoder" else set())
            for name in expected:
                np.testing.assert_array_equal(got[name], expected[name])


def test_a_bundle_of_one_component(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What development builds: it runs by hand, and draws nothing."""
    folder = only("decoder", bundle.path, tmp_path / "decoder")
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", functools.partial(fake_backend, cuda=cuda))
    for backend in ("tensorrt", "onnxruntime"):
        with SanaEngine(folder, backend=backend) as alone:
            with alone.session("decoder") as session:
                assert "images" in session.run(fake_inputs("decoder"))
            with pytest.raises(MissingFileError, match=r"has no '.*/model\.onnx'"):
                alone.generate("a cat")


def test_a_session_refuses_what_the_engine_does_not_serve(engine: SanaEngine) -> None:
    with engine.session("denoiser") as denoiser:
        with pytest.raises(RequestError, match=r"input 'latents': got shape \(17, 4, 4, 6\); the engine serves \(1, 1, 1, 1\) to"):
            denoiser.run(fake_inputs("denoiser", batch=17))
        with pytest.raises(SanaError, match="got float64; expected float32"):
            denoiser.run(fake_inputs("denoiser") | {"coefficients": np.zeros(8)})
        with pytest.raises(SanaError, match="the engine wants latents"):
            denoiser.run({name: array for name, array in fake_inputs("denoiser").items() if name != "latents"})
        assert denoiser.run(fake_inputs("denoiser"))


def test_a_failing_engine_says_why(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sha(engine.generate("a cat")[0])
    context = graphs(engine)["denoiser"].contexts[0]
    context.fails = True
    monkeypatch.setattr(shell, "failures", [ValueError("no cubin")])
    with pytest.raises(SanaError, match=r"could not run the engine\. TensorRT says: no\. A plugin said: no cubin"):
        engine.generate("a cat")
    context.fails = False
    assert sha(engine.generate("a cat")[0]) == expected


def test_out_of_memory_comes_out_and_the_next_request_works(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(memory=250_000)
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", functools.partial(fake_backend, cuda=cuda))
    with SanaEngine(bundle, backend="tensorrt") as engine:
        with pytest.raises(SanaError, match="GPU memory"):
            engine.generate("a cat", width=128, height=128)
        assert engine.generate("a cat", width=32, height=32)


def test_memory_message() -> None:
    driver = SimpleNamespace(
        CUresult=SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2),
        cuMemAlloc=lambda size: (2, 0),
        cuMemGetInfo=lambda: (0, 3_000_000_000, 8_000_000_000),
    )
    cuda = object.__new__(Cuda)
    cuda._driver = driver
    with pytest.raises(SanaError, match=r"got 3\.0 GB free of 8\.0 GB; expected 5\.0 GB\. Draw smaller pictures"):
        cuda.allocate(5_000_000_000)


# --- which backend, and why ---


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (NoGpuError("no NVIDIA driver"), logging.INFO),
        (ArchitectureError("this GPU is sm90"), logging.WARNING),
        (TensorRTVersionError("compiled by 1.2.3"), logging.WARNING),
    ],
)
def test_auto_says_why_it_took_onnxruntime(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: SanaError, level: int
) -> None:
    def fail(bundle: Bundle, **options: bool) -> None:
        raise error

    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", fail)
    with caplog.at_level(logging.INFO, logger="runtime"), SanaEngine(bundle) as engine:
        assert engine.backend == "onnxruntime"
        assert str(error) in engine.backend_reason
    assert [(record.levelno, str(error) in record.message) for record in caplog.records] == [(level, True)]
    with pytest.raises(type(error)):
        SanaEngine(bundle, backend="tensorrt")


def test_auto_takes_the_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", fake_backend)
    with SanaEngine(bundle) as engine:
        assert (engine.backend, engine.device) == ("tensorrt", "a fake GPU")
        assert engine.backend_reason == "the bundle has engines for this GPU"


def test_other_errors_are_not_hidden_by_auto(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bundle: Bundle, **options: bool) -> None:
        raise SanaError("CUDA: unspecified launch failure")

    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", fail)
    with pytest.raises(SanaError, match="launch failure"):
        SanaEngine(bundle)


def device(monkeypatch: pytest.MonkeyPatch, sm: str) -> None:
    monkeypatch.setattr("engines.tensorrt.device_info", lambda: SimpleNamespace(sm=sm, name="GPU"))


def test_an_engine_for_another_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "sm90")
    with pytest.raises(ArchitectureError, match="this GPU is sm90, and the bundle has engines for sm89"):
        SanaEngine(bundle, backend="tensorrt")


def test_an_engine_of_another_tensorrt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "sm89")
    with pytest.raises(TensorRTVersionError, match=r"compiled by TensorRT for RTX 1\.2\.3"):
        SanaEngine(bundle, backend="tensorrt")


def test_portable_bundle_has_nothing_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, "sm89")
    with pytest.raises(ArchitectureError, match="no engines, only portable graphs"):
        SanaEngine(write_fake_bundle(tmp_path / "fake"), backend="tensorrt")
