"""Sana-Sprint's way through both backends: one text, the guidance scale as an input, fresh noise between steps."""

import functools
from pathlib import Path

import fakes
import numpy as np
import pytest
from fake_tensorrt import FakeCuda, fake_backend

import runtime.trt_backend
from engines.bundle import Bundle, ScheduleInfo
from engines.spec import Target
from runtime import SanaEngine
from runtime.noise import normal
from runtime.request import check_request
from runtime.schedule import make_schedule


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    text, shapes = fakes.GRAPHS["denoiser"]
    sprint = (
        text.replace("prompt_mask)", f"prompt_mask, float[1] guidance_scale, float[B, {fakes.LATENT_CHANNELS}, h, w] noise)")
        .replace(
            "v = ReduceSum <keepdims = 0> (weighted, zero)",
            "v0 = ReduceSum <keepdims = 0> (weighted, zero)\n v = Mul (v0, guidance_scale)",
        )
        .replace("next_latents = Add (ab, c)", "n = Mul (c_noise, noise)\n abc = Add (ab, c)\n next_latents = Add (abc, n)")
    )
    plain = fakes.fake_inputs

    def fake_inputs(component, **kwargs):
        inputs = plain(component, **kwargs)
        if component != "denoiser":
            return inputs
        return inputs | {"guidance_scale": np.ones(1, np.float32), "noise": inputs["previous"]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fakes.GRAPHS, "denoiser", (sprint, shapes))
        patch.setattr(fakes, "fake_inputs", fake_inputs)
        schedule = ScheduleInfo(
            scheduler="scm",
            num_inference_steps=2,
            guidance_scale=4.5,
            max_timestep=1.5708,
            intermediate_timestep=1.3,
        )
        path: Path = tmp_path_factory.mktemp("sprint") / "bundle"
        return fakes.write_fake_bundle(path, schedule=schedule, guidance_embeds=True, targets=[Target.SM89])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_both_backends_draw_what_the_table_says(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", functools.partial(fake_backend, cuda=cuda))
    pictures, seen = [], []
    for backend in ("onnxruntime", "tensorrt"):
        with SanaEngine(bundle, backend=backend) as engine:
            latents: list[np.ndarray] = []
            pictures += engine.generate("a cat", seed=4, steps=steps, on_step=lambda *each, keep=latents: keep.append(each[2]))
            seen.append(latents)
    assert pictures[0].tobytes() == pictures[1].tobytes()
    np.testing.assert_array_equal(seen[0], seen[1])

    shape, schedule = (fakes.LATENT_CHANNELS, 2, 2), make_schedule("scm", steps)
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        (text,) = engine._texts(check_request(engine.manifest, prompts="a cat"))
        with engine.session("text_encoder") as encoder:
            embeds = encoder.run({"input_ids": text[0].ids[None], "attention_mask": text[0].mask[None]})["prompt_embeds"]
        x, previous = normal(4, shape)[None], np.zeros((1, *shape), np.float32)
        with engine.session("text_projection") as projection:
            keys_values = projection.run({"prompt_embeds": embeds[None]})
        with engine.session("denoiser") as denoiser:
            for i, row in enumerate(schedule.table):
                inputs = {
                    "latents": x,
                    "previous": previous,
                    "coefficients": row,
                    "guidance_weights": np.ones(1, np.float32),
                    "guidance_scale": np.array([4.5], np.float32),
                    "noise": normal(4, shape, stream=i + 1)[None],  # the last row multiplies it with 0
                    **keys_values,
                    "prompt_mask": text[0].selected_mask[None, None],
                }
                outputs = denoiser.run(inputs)
                x, previous = outputs["next_latents"], outputs["prediction"]
                np.testing.assert_array_equal(seen[0][i], x)


def test_the_scale_matters_and_noise_follows_the_seed(bundle: Bundle) -> None:
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        pictures = [
            engine.generate("a cat", seed=seed, guidance=guidance)[0].tobytes() for seed, guidance in ((1, 4.5), (1, 2.0), (2, 4.5))
        ]
        assert len(set(pictures)) == 3
        assert engine.generate("a cat", seed=1)[0].tobytes() == pictures[0]
