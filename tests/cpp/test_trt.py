"""The TensorRT backend in C++ on a GPU that is not there: fake_gpu.cpp, fake_tensorrt.cpp. As tests/runtime/test_trt_backend.py for
Python's: the same pixels as ONNX Runtime, and what is queued, shared, kept and captured on the way.

The engines of the bundle are the fake's description of the portable graph beside them.
"""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
from cpp_bundles import letters_bundle, sprint_bundle
from cpp_pictures import onnxruntime_library
from fakes import HOST_TABLE, only

from benchmarks import cpp_runtime
from engines.bundle import Bundle, TensorRTInfo
from engines.digest import file_sha256
from engines.errors import MissingFileError, ParityError, SanaError, TensorRTVersionError
from engines.spec import COMPONENTS, Target
from engines.token_table import TABLE_NAME
from runtime import SanaEngine
from runtime.image import read_picture, save_png
from runtime.kernel_cache import KernelCache
from runtime.trt_backend import ALIGNMENT

ACTIVATIONS = {"text_encoder": 5000, "text_projection": 6000, "denoiser": 70_000, "decoder": 30_000}  # bytes
TYPES = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}


@pytest.fixture(scope="module")
def fake(cpp: Path) -> Path:
    """The folder with both libraries."""
    folder = cpp / "fake"
    if not (folder / "libtensorrt_rtx.so.1").exists():
        pytest.skip("set TENSORRT_ROOT to an SDK of TensorRT for RTX: the fake is built from its headers")
    return folder


LEVELS_LINES = ["out levels uint8 4", "out not_finite int32 1"]


def write_engine(folder: Path, component: str, target: Target, levels: bool = True) -> str:
    """levels: it is not of before, when decoders' engines had none."""
    graph = folder / component / "model.onnx"
    model = onnx.load(graph, load_external_data=False).graph
    lines = [f"graph {graph}", f"activations {ACTIVATIONS[component]}"]
    for word, tensors in (("in", model.input), ("out", model.output)):
        for each in tensors:
            kind = each.type.tensor_type
            name = "bfloat16" if each.name == "inputs_embeds" else TYPES[kind.elem_type]  # as a table on the host has them
            lines.append(f"{word} {each.name} {name} {len(kind.shape.dim)}")
    lines += LEVELS_LINES if levels and component == "decoder" else []
    name = f"{component}/{target}.engine"
    (folder / name).write_text("\n".join(lines))
    return name


@pytest.fixture(scope="module")
def engines(cpp: Path, fake: Path) -> Callable[[Callable[..., Path], Path], Path]:
    """A fake bundle with the fake's engines."""
    said = subprocess.run([cpp / "sana", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"RTX (\d+\.\d+)", said)
    assert version is not None
    built_by = TensorRTInfo(flavor="rtx", version=f"{version[1]}.0.0")

    def make(write: Callable[..., Path], folder: Path, levels: bool = True) -> Path:
        write(folder, targets=(Target.SM89,), tensorrt=built_by)
        path = folder / "manifest.json"
        document = json.loads(path.read_bytes())
        for component in COMPONENTS:
            name = write_engine(folder, component, Target.SM89, levels)
            document["files"][name] |= {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
        path.write_text(json.dumps(document))
        return folder

    return make


@pytest.fixture(scope="module")
def bundle(engines, tmp_path_factory) -> Path:
    return engines(letters_bundle, tmp_path_factory.mktemp("trt") / "b")


class Ran:
    def __init__(self, done: subprocess.CompletedProcess[str], log: Path) -> None:
        self.code, self.output, self.error = done.returncode, done.stdout, done.stderr
        self.pictures = [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]
        self.log = log.read_text().splitlines() if log.exists() else []

    def count(self, word: str) -> int:
        return sum(line.startswith(word) for line in self.log)

    def runs(self, component: str) -> list[dict[str, int]]:
        """The addresses of each launch, and the arena's size as "arena"."""
        found = []
        for line in self.log:
            if line.startswith(f"run {component} arena "):
                size, *addresses = line.split()[3:]
                found.append({"arena": int(size)} | {name: int(at) for name, at in (each.split("=") for each in addresses)})
        return found


@pytest.fixture
def environment(fake: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "LD_LIBRARY_PATH": str(fake),
        "SANA_TENSORRT": str(fake / "libtensorrt_rtx.so.1"),
        "SANA_ONNXRUNTIME": str(onnxruntime_library()),
        "SANA_CACHE_DIR": str(tmp_path / "cache"),
        "FAKE_CUDA_SM": "89",
    }


@pytest.fixture
def sana(cpp: Path, environment: dict[str, str], bundle: Path, tmp_path: Path) -> Callable[..., Ran]:
    numbers = iter(range(100))

    def call(*arguments: object, command: tuple[str, ...] = ("sana", "generate"), of: Path = bundle, **changes: str) -> Ran:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        more = {**os.environ, **environment, "FAKE_GPU_LOG": str(folder / "log"), **changes}
        program, *words = command
        words += [str(of), *map(str, arguments), "--out", str(folder)] if words == ["generate"] else map(str, arguments)
        done = subprocess.run([cpp / program, *words], capture_output=True, text=True, env=more, check=False)
        return Ran(done, folder / "log")

    return call


REQUEST = ["--seed", 3, "--steps", 5, "--scheduler", "flow_dpm_solver", "--width", 96, "--negative", "blue"]
WORDS = {"seed": 3, "steps": 5, "scheduler": "flow_dpm_solver", "width": 96, "negative_prompts": "blue"}


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[bytes]:
    """Pictures of "a cat" in Python, of the seeds 3, 4, …"""
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        return [engine.generate("a cat", **(WORDS | {"seed": 3 + i}))[0].tobytes() for i in range(4)]


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
