"""SanaEngine on a fake bundle: what it draws, that it draws it the same every time, and how it behaves when things go wrong."""

import hashlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from fakes import LATENT_CHANNELS, fake_inputs, write_fake_bundle
from PIL import Image

import runtime.engine
from engines.errors import BundleError, DigestError, RequestError, SanaError
from runtime import SanaEngine
from runtime.image import INFO_KEY, read_picture, save_png
from runtime.noise import normal
from runtime.picture_info import parse_picture_info
from runtime.prompt import PromptCutWarning
from runtime.schedule import apply_row, make_schedule


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake").path


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[SanaEngine]:
    with SanaEngine(bundle) as made:
        yield made


def sha(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def info_of(image: Image.Image):
    return parse_picture_info(image.info[INFO_KEY], source="test")


# --- what is drawn ---


def test_sizes_and_order(engine: SanaEngine) -> None:
    pictures = engine.generate(["a red apple", "a cat", ""], width=96, height=32)
    assert [(p.size, p.mode) for p in pictures] == [((96, 32), "RGB")] * 3
    assert len({sha(p) for p in pictures}) == 3
    assert engine.generate("a red apple")[0].size == (64, 64)


def test_equals_the_components_run_by_hand(engine: SanaEngine) -> None:
    """Tokens, guidance, noise, schedule and pixels, put together once more from the sessions."""
    latents, tokens = [], []
    for prompt, negative in (("a red apple", False), ("blue", True)):
        tokens.append(engine._tokenizer.encode([prompt], negative=negative))
    embeds = []
    with engine.session("text_encoder") as encoder:
        for each in reversed(tokens):
            embeds.append(encoder.run({"input_ids": each.ids, "attention_mask": each.mask})["prompt_embeds"])
    x = normal(11, (LATENT_CHANNELS, 2, 3))[None]
    previous = np.zeros_like(x)
    schedule = make_schedule("flow_dpm_solver", 5)
    with engine.session("text_projection") as projection:
        text = projection.run({"prompt_embeds": np.stack(embeds)})
    with engine.session("denoiser") as denoiser:
        for row in schedule.table:
            outputs = denoiser.run(
                {
                    "latents": x,
                    "previous": previous,
                    "coefficients": row,
                    "guidance_weights": np.array([-1.0, 2.0], np.float32),
                    **text,
                    "prompt_mask": np.stack([each.selected_mask for each in reversed(tokens)]),
                }
            )
            v = (outputs["prediction"] - row[6] * x) / row[7]
            np.testing.assert_allclose(outputs["next_latents"], apply_row(row, x, v, previous)[0], atol=1e-4)
            x, previous = outputs["next_latents"], outputs["prediction"]
    picture = engine.generate(
        "a red apple",
        "blue",
        seed=11,
        steps=5,
        guidance=2.0,
        width=96,
        height=64,
        scheduler="flow_dpm_solver",
        on_step=lambda step, total, each: latents.append(each),
    )[0]
    assert len(latents) == 5
    np.testing.assert_array_equal(latents[-1], x)
    with engine.session("decoder") as decoder:
        decoded = decoder.run({"latents": x})["images"][0]
    expected = np.round(np.clip(decoded / 2 + 0.5, 0, 1) * 255).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(picture), expected)


def test_seeds_count_up_or_are_listed(engine: SanaEngine) -> None:
    counted = engine.generate(["a cat"] * 3, seed=2**64 - 3)
    listed = engine.generate(["a cat"] * 3, seed=[2**64 - 1, 2**64 - 2, 2**64 - 3])
    assert [sha(p) for p in counted] == [sha(p) for p in listed[::-1]]
    assert [info_of(p).seed for p in counted] == [2**64 - 3, 2**64 - 2, 2**64 - 1]


def test_arguments_change_the_picture(engine: SanaEngine) -> None:
    base = {"prompts": "a red apple", "seed": 1}
    changes: list[dict] = [{}, {"seed": 2}, {"steps": 3}, {"guidance": 2.0}, {"guidance": 1.0}, {"negative_prompts": "blue"}]
    changes += [{"scheduler": "flow_dpm_solver"}, {"scheduler": make_schedule("flow_euler", 4, 6.0)}]
    assert len({sha(engine.generate(**(base | change))[0]) for change in changes}) == len(changes)


def test_defaults_come_from_the_bundle(engine: SanaEngine) -> None:
    named = engine.generate("a cat", steps=4, guidance=4.5, width=64, height=64, scheduler="flow_euler")
    assert sha(named[0]) == sha(engine.generate("a cat")[0])


def test_negative_prompts_one_for_all_or_one_each(engine: SanaEngine) -> None:
    one = engine.generate(["a cat", "a dog"], "blue")
    each = engine.generate(["a cat", "a dog"], ["blue", "red"])
    assert sha(one[0]) == sha(each[0])
    assert sha(one[1]) != sha(each[1])


# --- determinism ---


def test_ten_runs_give_one_digest(engine: SanaEngine, bundle: Path) -> None:
    request = {"seed": 5, "width": 96, "height": 64, "negative_prompts": "blue"}

    def alone(engine: SanaEngine = engine) -> str:
        return sha(engine.generate("a red apple", **request)[0])

    digests = [alone(), alone()]
    engine.generate(["a dog"] * 3, width=128, height=128, steps=9)  # other sizes, steps and prompts before
    digests.append(alone())
    engine.generate("a cat", guidance=1.0, scheduler="flow_dpm_solver")
    digests.append(alone())
    for neighbours in (["a cat", "a dog"], ["a red apple"] * 3, ["", "a house"]):  # next to others
        at = len(neighbours) // 2
        prompts = [*neighbours[:at], "a red apple", *neighbours[at:]]
        seeds = [100] * len(prompts)
        seeds[at] = 5
        digests.append(sha(engine.generate(prompts, **(request | {"seed": seeds}))[at]))
    with SanaEngine(bundle, verify=False) as other:
        digests += [alone(other), alone(other)]
    with SanaEngine(bundle, num_threads=1) as single:
        digests.append(alone(single))
    assert len(digests) == 10
    assert len(set(digests)) == 1


def test_requests_from_threads_wait_for_one_another(engine: SanaEngine) -> None:
    expected = [sha(engine.generate("a cat", seed=seed)[0]) for seed in range(6)]
    inside, most, found = 0, 0, {}

    def watch(*_: object) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.001)
        inside -= 1

    def work(seed: int) -> None:
        found[seed] = sha(engine.generate("a cat", seed=seed, on_step=watch)[0])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(6)] == expected
    assert most == 1


# --- metadata and replay ---


def test_replay_from_the_file(engine: SanaEngine, tmp_path: Path) -> None:
    schedule = make_schedule("flow_euler", None, 2.0, [1.0, 0.7, 0.3])
    pictures = engine.generate(
        ["a red apple", "a ☃ dog"], ["", "blue"], seed=[9, 2**63], guidance=3.3, scheduler=schedule, width=96
    )
    for number, picture in enumerate(pictures):
        path = save_png(picture, tmp_path / f"{number}.png")
        image, info = read_picture(path)
        assert image.tobytes() == picture.tobytes()
        assert info.bundle_digest == engine.bundle.digest
        again = engine.replay(info)
        assert again.tobytes() == picture.tobytes()
        assert again.info[INFO_KEY] == picture.info[INFO_KEY]


def test_replay_with_other_means_is_refused(engine: SanaEngine) -> None:
    info = info_of(engine.generate("a cat")[0])
    for change, message in (
        ({"bundle_digest": "1" * 64}, "Use the bundle that it was drawn with"),
        ({"backend": "tensorrt"}, "backend='tensorrt'"),
        ({"batch_size": 2}, "at most 1"),
        ({"batch_index": 1}, "picture 1 of 1"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.replay(info.model_copy(update=change))


# --- callbacks, errors, life and death ---


def test_on_step_counts_over_all_batches(engine: SanaEngine) -> None:
    seen = []
    engine.generate(["a cat", "a dog"], steps=2, on_step=lambda step, total, latents: seen.append((step, total, latents.shape)))
    assert seen == [(step, 4, (1, LATENT_CHANNELS, 2, 2)) for step in (1, 2, 3, 4)]


def test_what_on_step_does_to_its_latents_does_not_reach_the_picture(engine: SanaEngine) -> None:
    def spoil(step: int, total: int, latents: np.ndarray) -> None:
        latents[:] = np.nan

    assert sha(engine.generate("a cat", on_step=spoil)[0]) == sha(engine.generate("a cat")[0])


def test_raising_in_on_step_cancels(engine: SanaEngine) -> None:
    seen = []

    def cancel(step: int, *_: object) -> None:
        seen.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate("a cat", steps=5, on_step=cancel)
    assert seen == [1, 2]
    assert engine.generate("a cat")


def test_what_goes_wrong_in_the_thread_that_makes_noise_comes_out(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(seeds: list[int], shape: tuple[int, ...]) -> NoReturn:
        raise MemoryError(f"{len(seeds)} x {shape}")

    expected = sha(engine.generate("a cat")[0])
    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine, "normal_batch", none_left)
        with pytest.raises(MemoryError, match="1 x "):
            engine.generate("a cat")
    assert sha(engine.generate("a cat")[0]) == expected


def test_calling_the_engine_from_on_step_does_not_hang(engine: SanaEngine) -> None:
    with pytest.raises(SanaError, match="its own on_step"):
        engine.generate("a cat", on_step=lambda *_: engine.generate("a dog"))
    assert engine.generate("a cat")


def test_a_cut_prompt_warns_and_is_drawn(engine: SanaEngine) -> None:
    with pytest.warns(PromptCutWarning, match="cut: 'cat dog house on'"):
        assert engine.generate("a red green blue and a the cat dog house on")


def test_closed(bundle: Path) -> None:
    engine = SanaEngine(bundle)
    engine.generate("a cat")
    engine.close()
    engine.close()
    with pytest.raises(SanaError, match="closed"):
        engine.generate("a cat")


def test_timings(engine: SanaEngine) -> None:
    engine.generate(["a cat", "a dog"], steps=3)
    assert [len(each.steps_s) for each in engine.last_timings] == [3, 3]
    assert all(each.total_s > 0 for each in engine.last_timings)


PATIENCE = "runtime.progress.PATIENCE_S"


def test_quiet_without_a_terminal(engine: SanaEngine, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATIENCE, 0.01)
    engine.generate("a cat", on_step=lambda *_: time.sleep(0.1))
    assert capfd.readouterr() == ("", "")


def test_a_bar_for_what_lasts(bundle: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with SanaEngine(bundle, progress=True) as engine:
        monkeypatch.setattr(PATIENCE, 1000)  # longer than this lasts, however busy the machine is
        engine.generate("a cat")
        assert capfd.readouterr() == ("", "")
        monkeypatch.setattr(PATIENCE, 0.01)
        engine.generate("a cat", on_step=lambda *_: time.sleep(0.2))
    out, err = capfd.readouterr()
    assert out == ""
    assert "drawing" in err


# --- backends ---


def test_portable_bundle_uses_onnxruntime(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="runtime"), SanaEngine(bundle) as engine:
        assert (engine.backend, engine.backend_reason) == ("onnxruntime", "the bundle has portable graphs only")
    assert caplog.messages == [f"backend: onnxruntime on {engine.device}, because the bundle has portable graphs only"]
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        assert engine.backend_reason == "it was asked for"


def test_unknown_backend(bundle: Path) -> None:
    with pytest.raises(RequestError, match="did you mean 'tensorrt'"):
        SanaEngine(bundle, backend="tensort")


@pytest.mark.parametrize("session", ["text_encodr", "", "vae"])
def test_unknown_component(engine: SanaEngine, session: str) -> None:
    with (
        pytest.raises(RequestError, match="expected one of text_encoder, text_projection, denoiser, decoder"),
        engine.session(session),
    ):
        pass


def test_golden_inputs_run(engine: SanaEngine) -> None:
    with engine.session("denoiser") as denoiser:
        assert set(denoiser.run(fake_inputs("denoiser", batch=3))) == {"next_latents", "prediction"}
        with pytest.raises(SanaError, match="the graph wants latents"):
            denoiser.run({"previous": np.zeros(1, np.float32)})
        with pytest.raises(SanaError, match="ONNX Runtime failed"):
            denoiser.run(fake_inputs("denoiser") | {"coefficients": np.zeros(7, np.float32)})


# --- bundles that are not well ---


def test_changed_byte(tmp_path: Path) -> None:
    path = write_fake_bundle(tmp_path / "fake").path
    data = bytearray((path / "denoiser/model.onnx.data").read_bytes())
    data[5] ^= 1
    (path / "denoiser/model.onnx.data").write_bytes(data)
    with pytest.raises(DigestError, match=r"denoiser/model\.onnx\.data"):
        SanaEngine(path)


def test_a_graph_that_is_no_graph(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "fake")
    graph = bundle.onnx_path("decoder")
    graph.write_bytes(b"\x08\x0a" * (graph.stat().st_size // 2) + b"\x08\x0a"[: graph.stat().st_size % 2])
    with SanaEngine(bundle) as engine, pytest.raises(BundleError, match="ONNX Runtime"):
        engine.generate("a cat")


def test_weights_of_the_wrong_size_are_refused(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "fake")
    (bundle.path / "decoder/model.onnx.data").write_bytes(b"")
    with SanaEngine(bundle) as engine, pytest.raises(BundleError, match="ONNX Runtime"):
        engine.generate("a cat")


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected the folder of a bundle"):
        SanaEngine(tmp_path / "none")


def test_metadata_is_one_json_object(engine: SanaEngine) -> None:
    document = json.loads(engine.generate("a cat")[0].info[INFO_KEY])
    assert {"prompt", "seed", "schedule", "model", "bundle_digest", "backend", "device"} <= document.keys()


def test_no_warnings_on_the_usual_way(engine: SanaEngine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate("a cat")
