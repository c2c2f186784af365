"""The TensorRT backend in C++ on a GPU that is not there: fake_gpu.cpp, fake_tensorrt.cpp. As tests/runtime/test_trt_backend.py for
Python's: the same pixels as ONNX Runtime, and what is queued, shared, kept and captured on the way.

The engines of the bundle are the fake's description of the portable graph beside them.
"""

import functools
import json
import re
import shutil
from itertools import pairwise

import pytest
from cpp_bundles import letters_bundle, sprint_bundle
from cpp_trt import ACTIVATIONS, REQUEST, WORDS
from fakes import HOST_TABLE, only

from benchmarks import cpp_runtime
from engines.bundle import Bundle
from engines.errors import MissingFileError, ParityError, SanaError
from engines.spec import COMPONENTS
from engines.token_table import TABLE_NAME
from runtime import SanaEngine
from runtime.image import read_picture, save_png
from runtime.kernel_cache import KernelCache
from runtime.trt_backend import ALIGNMENT


def test_same_pixels_as_python(sana, expected) -> None:
    """The first picture launch by launch, the second captured, the third and fourth as that graph again."""
    drawn = sana("a cat", *REQUEST, "--count", 4, "--backend", "tensorrt")
    assert drawn.code == 0, drawn.error
    assert "backend: tensorrt on NVIDIA Fake, because it was asked for" in drawn.error
    found = [read_picture(path) for path in drawn.pictures]
    assert [picture.tobytes() for picture, _ in found] == expected
    assert {(info.backend, info.device) for _, info in found} == {("tensorrt", "NVIDIA Fake")}
    assert (drawn.count("capture"), drawn.count("graph"), drawn.count("run denoiser")) == (1, 3, 10)


def test_engines_with_and_without_levels(sana, engines, bundle, expected, tmp_path) -> None:
    """Of those that make them floats stay on the GPU: the same pixels, and whether they are numbers is the engine's word."""
    before = engines(letters_bundle, tmp_path / "before", levels=False)
    for of in (bundle, before):
        drawn = sana("a cat", *REQUEST, "--count", 3, of=of)
        assert drawn.code == 0, drawn.error
        pictures = [read_picture(path)[0] for path in drawn.pictures]
        assert [picture.tobytes() for picture in pictures] == expected[:3]
        assert ("levels" in drawn.runs("decoder")[0]) == (of == bundle)
        failed = sana("a cat", *REQUEST, of=of, FAKE_TENSORRT_FAILS="finite")
        said = f"decoder: got {len(expected[0])} pixels that are not finite numbers; expected none."
        assert (said in failed.error, failed.code != 0) == (of == bundle, of == bundle)


def test_fresh_noise_and_a_scale_that_the_network_takes(sana, engines, tmp_path) -> None:
    sprint = engines(sprint_bundle, tmp_path / "sprint")
    drawn = sana("a cat", "--seed", 3, "--count", 3, of=sprint)
    assert drawn.code == 0, drawn.error
    with SanaEngine(sprint, backend="onnxruntime") as engine:
        expected = [engine.generate("a cat", seed=3 + i)[0].tobytes() for i in range(3)]
    assert [read_picture(path)[0].tobytes() for path in drawn.pictures] == expected


@pytest.mark.parametrize("options", [[], ["--low-memory"]])
def test_a_table_on_the_host(sana, engines, expected, tmp_path, options) -> None:
    """Rows go to the GPU in bf16; the picture is that of the same table in the engine."""
    host = engines(functools.partial(letters_bundle, **HOST_TABLE), tmp_path / "host")
    drawn = sana("a cat", *REQUEST, "--count", 3, *options, of=host)
    assert drawn.code == 0, drawn.error
    assert [read_picture(path)[0].tobytes() for path in drawn.pictures] == expected[:3]
    assert {"inputs_embeds", "attention_mask"} < drawn.runs("text_encoder")[0].keys()
    table = host / TABLE_NAME
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    assert "token_table.safetensors was changed" in sana("a cat", of=host).error


def test_replay_of_a_picture_of_a_batch(sana, bundle, tmp_path) -> None:
    """It is drawn in a batch as large as it was; more than the bundle's are refused."""
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        (picture,) = engine.generate("a cat", **WORDS)
    for size, index in ((3, 1), (5, 1)):
        info = json.loads(picture.info["sana"]) | {"backend": "tensorrt", "batch_size": size, "batch_index": index}
        picture.info["sana"] = json.dumps(info)
        save_png(picture, tmp_path / "p.png")
        ran = sana(tmp_path / "p.png", "--bundle", bundle, command=("sana", "replay"))
        if size == 3:
            assert ran.code == 0, ran.error
            assert "identical" in ran.output, ran.output
        else:
            assert "batch: got picture 1 of 5; expected one of at most 4." in ran.error


def test_cancelling_leaves_nothing_behind(sana, bundle, tmp_path) -> None:
    larger = tmp_path / "larger"  # sana_example draws 256 px
    shutil.copytree(bundle, larger)
    document = json.loads((larger / "manifest.json").read_bytes())
    document["ranges"] |= {"max_side": 256}
    (larger / "manifest.json").write_text(json.dumps(document))
    cancelled = sana(larger, "a cat", 9, tmp_path / "none.png", 2, command=("sana_example",))
    assert cancelled.code == 1
    assert "Cancelled: cancelled after step 2 of 3." in cancelled.error
    assert len(cancelled.runs("denoiser")) == 2
    assert not (tmp_path / "none.png").exists()


def test_auto_takes_the_gpu(sana, expected) -> None:
    drawn = sana("a cat", *REQUEST)
    assert "backend: tensorrt on NVIDIA Fake, because the bundle has engines for this GPU" in drawn.error
    assert read_picture(drawn.pictures[0])[0].tobytes() == expected[0]


@pytest.mark.parametrize("option", ["--no-cuda-graphs", "--low-memory"])
def test_options_change_no_pixel(sana, expected, option) -> None:
    drawn = sana("a cat", *REQUEST, "--count", 3, option)
    assert [read_picture(path)[0].tobytes() for path in drawn.pictures] == expected[:3]
    if option == "--low-memory":  # the text is known from the first one on
        assert next(line for line in drawn.log if line.startswith("load")) == "load text_encoder"
        assert drawn.count("load text_encoder") == 1
    else:
        assert drawn.count("capture") == 0


def test_for_a_new_text_the_others_make_room(sana) -> None:
    prompts = ["a cat", "a dog", "an owl", "a fox", "a bee"]
    plain, low = sana(*prompts, *REQUEST), sana(*prompts, *REQUEST, "--low-memory")
    assert [read_picture(path)[0].tobytes() for path in low.pictures] == [
        read_picture(path)[0].tobytes() for path in plain.pictures
    ]
    assert len(low.pictures) == 5
    loads = [line.split()[1] for line in low.log if line.startswith("load ")]
    others = ["decoder", "denoiser", "text_projection"]
    rounds = [loads[start : start + 4] for start in range(0, len(loads), 4)]
    assert len(rounds) > 1
    assert [(first, sorted(rest)) for first, *rest in rounds] == [("text_encoder", others)] * len(rounds)
    assert plain.count("load ") == 4


def test_steps_differ_in_addresses_alone(sana) -> None:
    drawn = sana("a cat", *REQUEST)
    launches = drawn.runs("denoiser")
    rows = [each["coefficients"] for each in launches]
    assert [b - a for a, b in pairwise(rows)] == [ALIGNMENT] * 4
    for before, after in pairwise(launches):
        assert (after["latents"], after["previous"]) == (before["next_latents"], before["prediction"])
    (projected,) = drawn.runs("text_projection")
    for name in ("guidance_weights", "text_keys", "text_values", "prompt_mask"):
        assert len({each[name] for each in launches}) == 1
        assert projected.get(name, launches[0][name]) == launches[0][name]


def test_nobody_waits_between_the_first_step_and_the_pixels(sana) -> None:
    log = sana("a cat", *REQUEST).log
    work = [line.split()[0] for line in log[log.index(next(line for line in log if line.startswith("run text_projection"))) :]]
    runs = [place for place, word in enumerate(work) if word == "run"]
    assert len(runs) == 1 + 5 + 1
    assert "wait" not in work[: runs[-1]]
    assert [line.split()[1] for line in log if line.startswith("run")][-6:] == ["denoiser"] * 5 + ["decoder"]


def test_engines_share_one_arena_as_large_as_the_largest_need(sana) -> None:
    drawn = sana("a cat", *REQUEST)
    sizes = {each["arena"] for component in ("denoiser", "decoder") for each in drawn.runs(component)}
    assert sizes == {max(ACTIVATIONS.values())}


def test_the_second_picture_allocates_nothing(sana) -> None:
    one, three = sana("a cat", *REQUEST), sana("a cat", *REQUEST, "--count", 3)
    assert one.count("allocate") == three.count("allocate") > 0


def test_no_graph_is_launched_whose_memory_was_freed(sana, bundle, tmp_path) -> None:
    """A longer schedule needs a larger table, which gets the address of the one that was freed for it."""
    steps = [3, 3, 9, 3, 3, 9, 9, 3]
    ran = sana(bundle, tmp_path, *steps, command=("sana_schedules",))
    assert ran.code == 0, ran.error
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        wanted = {count: engine.generate("a cat", seed=3, steps=count, width=96)[0].tobytes() for count in set(steps)}
    for number, count in enumerate(steps):
        assert read_picture(tmp_path / f"{number}.png")[0].tobytes() == wanted[count]


def test_a_bundle_of_one_component(sana, bundle, tmp_path) -> None:
    """What development builds: it opens, and draws nothing, for the reason that Python gives."""
    alone = only("decoder", bundle, tmp_path / "decoder")
    with pytest.raises(MissingFileError) as caught:
        Bundle.open(alone).require_engine(COMPONENTS[0], "sm89")
    for options in ([], ["--low-memory"]):
        ran = sana("a cat", "--backend", "tensorrt", *options, of=alone)
        assert (ran.code, ran.error.splitlines()[-1]) == (2, f"sana: error: {caught.value}")


def test_kernels_are_kept_for_the_next_start_and_for_python(sana, bundle, tmp_path) -> None:
    first, second = sana("a cat", *REQUEST), sana("a cat", *REQUEST)
    assert (first.count("compile"), second.count("compile")) == (5, 0)  # the text encoder sees two lengths
    assert sana("a cat", *REQUEST, "--no-kernel-cache").count("compile") == 5
    manifest = Bundle.open(bundle, verify=False).manifest
    assert manifest.tensorrt is not None
    machine = {"gpu": "NVIDIA Fake", "sm": "sm89", "driver": "13.0", "tensorrt": f"rtx {manifest.tensorrt.version}"}
    cache = KernelCache(tmp_path / "cache" / "kernels", machine=machine)
    for component in COMPONENTS:
        kernels = cache.kernels(manifest.files[f"{component}/sm89.engine"].sha256)
        content = cache.read(kernels._key)
        assert content is not None
        assert content.startswith(b"kernels\n")
    (damaged, *_) = sorted((tmp_path / "cache" / "kernels").glob("*.kernels"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = sana("a cat", *REQUEST)
    assert again.count("compile") > 0
    assert f"kernel cache: {damaged} is damaged or another engine's" in again.error


def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(sana, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    drawn = sana("a cat", *REQUEST, "--kernel-cache", tmp_path / "file" / "x")
    assert drawn.code == 0
    assert drawn.error.count("cannot be written, so the next start compiles kernels again") == 1


def parts(error: str) -> list[str]:
    """Of the start, in the order in which they were over."""
    return re.findall(r"sana: (.+) after \d+\.\d{6} s\n", error)


def test_a_start_does_what_it_can_at_the_same_time(sana, expected) -> None:
    """The linker works while the driver looks for GPUs, files are compared while CUDA's context is made, and the text is encoded
    while other engines load."""
    slow = sana("a cat", *REQUEST, "--count", 2, "--timings", FAKE_CUDA_SLOW="0.5", FAKE_TENSORRT_SLOW="decoder")
    assert [read_picture(path)[0].tobytes() for path in slow.pictures] == expected[:2]
    found = [part for part in parts(slow.error) if not re.match(r"engine of (?!decoder)", part)]
    found.remove("tokenizer read")  # before or after the library is mapped
    assert parts(slow.error).index("tokenizer read") < parts(slow.error).index("GPU found")
    start = ["TensorRT's library mapped", "GPU found", "files compared", "CUDA's context made", "opened", "asked"]
    first = ["text encoded", "engine of decoder loaded", "shapes set", "work queued", "pixels read", "kernels kept", "drawn"]
    assert found == [*start, *first, "asked", "drawn"]
    memory = re.findall(
        r"sana: memory, (.+): (\d+\.\d) MB of its own, (\d+\.\d) MB of mapped files; the most until now (\d+\.\d) MB", slow.error
    )
    assert [when for when, *_ in memory] == ["opened", "first picture", "end"]
    for _, own, files, most in memory:
        assert 1 < float(own) + float(files) <= float(most) + 1
    assert parts(sana("a cat", *REQUEST).error) == []


def test_the_benchmark(cpp, bundle, environment, monkeypatch) -> None:
    """Python draws with ONNX Runtime here."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpp_runtime, "PYTHON", cpp_runtime.PYTHON.replace('"tensorrt"', '"onnxruntime"'))
    sizes = {"rounds": 1, "count": 3, "steps": 2, "side": 64}
    found = cpp_runtime.compare(bundle, cpp / "sana", **sizes)
    (ours,), (theirs,) = found["cpp"], found["python"]
    for each in (ours, theirs):
        assert 0 < each.open_s < each.start_s
        assert 0 < each.picture_s
        assert len(each.pictures) == 3
        assert tuple(each.resident) == cpp_runtime.WHEN
        assert all(1 < resident.total_mb <= each.peak_mb + 1 for resident in each.resident.values()), each
    order = ["GPU found", "CUDA's context made", "opened", "text encoded", "pixels read", "drawn"]
    assert sorted(ours.parts[part] for part in order) == [ours.parts[part] for part in order]
    assert ours.parts["drawn"] == ours.start_s, "that of the first picture"
    monkeypatch.setattr(cpp_runtime, "PYTHON", cpp_runtime.PYTHON.replace("seed=seed", "seed=seed + 1"))
    with pytest.raises(ParityError, match="got 2 different sets of pictures"):
        cpp_runtime.compare(bundle, cpp / "sana", **sizes)
    with pytest.raises(SanaError, match="expected the folder of a bundle"):
        cpp_runtime.compare(bundle.parent / "none", cpp / "sana", **sizes)
