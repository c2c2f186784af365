"""latency.py beside a checkpoint: a bundle of the smallest one, peers, kernels, figures. Engines where there is a GPU."""

from __future__ import annotations

import argparse
import functools
import json
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_tensorrt import fake_backend
from fakes import write_fake_bundle
from latency_records import record
from tiny_build import quiet, request, tiny

from benchmarks import figures, latency, latency_figures, latency_run, latency_session
from benchmarks.latency_energy import EnergyMeter
from benchmarks.latency_figures import record_figures, record_step_ratios
from benchmarks.latency_floor import PRODUCTS, Floor
from benchmarks.latency_history import History
from benchmarks.latency_parity import engine_errors, golden_complaints
from benchmarks.latency_peers import PEERS, Peer
from benchmarks.latency_run import Bench, Plan, measure
from benchmarks.latency_timing import Task, cpu_clock
from benchmarks.latency_work import Work, component_inputs, graph_inputs
from benchmarks.latency_yardstick import cpu_gemm
from engines.gpu import current_target
from engines.parity_report import ErrorStats, bound_from, check_size
from engines.spec import Precision, Target
from export.build import build
from export.request import targets_of
from runtime import SanaEngine
from sana_ref.checkpoint import load
from sana_ref.components import DecoderForExport
from sana_ref.fused_decoder import FusedDecoder
from sana_ref.quantized_convs import MARGINS, ConvRanges, QuantizedConvs, conv_plan

SETTINGS = ["--model", str(tiny()), "--sizes", "64,128", "--rounds", "5", "--pictures", "3", "--steps", "2", "--kernels"]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where figures go."""
    path = tmp_path / "figures.jsonl"
    monkeypatch.setattr(latency_figures, "record", functools.partial(figures.record, path=path))
    return path


@pytest.mark.slow
def test_portable_graphs_beside_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_session, "has_gpu", lambda: False)
    bundle = build(request(tmp_path / "bundle"), quiet()).bundle
    history, report = tmp_path / "history", tmp_path / "report.html"
    arguments = ["--bundle", str(bundle.path), "--history", str(history), *SETTINGS, "--peers", "eager", "--report", str(report)]
    assert latency.main(arguments) == 0
    found = History(history).read()
    assert len(found) == 7  # a text encoder, and three works of two sizes
    for each in found:
        assert "diffusers_eager" in each.references
        assert each.references["diffusers_eager"].clock == ("wall" if each.component == "picture" else "device")
        assert (each.kernels is None) == (each.component == "picture")
    assert "diffusers_eager" in report.read_text()
    with SanaEngine(bundle.path, backend="onnxruntime") as engine:
        for component in ("denoiser", "decoder"):
            inputs = graph_inputs(engine, Work(component=component, width=64, height=64, batch=2))
            errors = engine_errors(engine, component, load(tiny()), inputs, device="cpu")
            assert not check_size(errors["engine"], bound_from(errors["pytorch"]))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler, and of a prompt that is cut: a token a byte here
@pytest.mark.skipif(current_target() is None, reason="this machine has no GPU")
def test_engines_beside_diffusers(tmp_path: Path, recorded: Path) -> None:
    bundle = build(request(tmp_path / "bundle", precision=Precision.FP16, targets=targets_of("current")), quiet()).bundle
    history, report = tmp_path / "history", tmp_path / "report.html"
    arguments = ["--bundle", str(bundle.path), "--history", str(history), *SETTINGS, "--check"]
    parts = ["--components", "text_encoder,denoiser,decoder", "--peers", ",".join(PEERS)]
    assert latency.main([*arguments, *parts, "--record", "--report", str(report)]) == 0
    assert recorded.read_text().count("\n") == 3
    picture = ["--components", "picture", "--peers", "eager,reduce-overhead"]  # tuning takes minutes, and is of the parts alone
    assert latency.main([*arguments, *picture]) == 0
    for each in History(history).read():
        assert each.backend == "tensorrt"
        assert each.device.p50 <= each.wall.p99
        assert each.memory_bytes  # known, for no other program uses the GPU
        assert each.energy_j or each.energy_note or each.component
        drawn = each.component == "picture"
        modes = ("eager", "reduce-overhead") if drawn else tuple(PEERS)
        assert {PEERS[mode] for mode in modes} <= each.references.keys()
        if not drawn:
            assert each.kernels is not None
            assert each.kernels.kernels, each.kernels.why


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SanaEngine]:
    """Its TensorRT and GPU are fakes."""
    bundle = write_fake_bundle(tmp_path / "fake", targets=(Target.SM89,))
    monkeypatch.setattr("runtime.engine.make_backend", lambda *_, **__: (fake_backend(bundle), "a test"))
    monkeypatch.setattr("benchmarks.latency_figures.device_info", lambda: SimpleNamespace(capability=(9, 0)))
    with SanaEngine(bundle) as made:
        yield made


@pytest.mark.parametrize(
    ("parameters", "step_name", "precision"),
    [(1_600_000_000, "step_1600m_64px", "fp8"), (30_000_000, "step_tiny_64px", "bf16")],
)
def test_figures_have_the_peers_beside_them(
    engine: SanaEngine, recorded: Path, parameters: int, step_name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.latency_figures.floor_beside", lambda *_: ({"floor": 0.875}, "floor: in words"))
    stats = ErrorStats(rms=1e-3, max=1e-2, mean=0.0)
    errors = {name: {"engine": stats, "pytorch": stats} for name in ("denoiser", "decoder")}
    size = {"width": 64, "height": 64}
    records = [
        record(component="text_encoder", width=0, height=0),
        record(peers={"diffusers_eager": 30.0, "torch_compile_max_autotune": 15.0}, clock_mhz=1755.0, **size),
        record(component="decoder", precision=precision, peers={"diffusers_eager": 50.0}, **size),
    ]
    checkpoint = SimpleNamespace(sources={"transformer": SimpleNamespace(shapes={"weight": (parameters,)})})
    assert record_figures(engine, checkpoint, records, errors, steps=2, pictures=2, note="random weights")  # type: ignore[arg-type]
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    found = {line["figure"]: line for line in lines}
    step = found[f"{step_name}_fp16_ms"]
    assert step["peer"] == {"diffusers_eager": 30.0, "torch_compile_max_autotune": 15.0, "floor": 0.875}
    assert step["value"] == pytest.approx(1.0)  # the fake's events are a millisecond apart
    assert step["note"].startswith("rms error 1.00 x PyTorch's; floor: in words; GPU at 1755 MHz; random weights; TensorRT for ")
    decode = {name for name in found if name.startswith("decode")}
    assert decode == {f"decode_{'tiny_' if parameters < 100_000_000 else ''}64px_{precision}_ms"}
    assert ("tiny_picture_gpu_ms" in found) == (parameters < 100_000_000)
    assert len(lines) == (3 if parameters < 100_000_000 else 2)


@pytest.mark.parametrize(("sprint", "steps"), [(False, 20), (True, 1)])
def test_figures_of_pictures_have_the_peers_that_drew_them(engine: SanaEngine, recorded: Path, sprint: bool, steps: int) -> None:
    """Beside the wall clock's times, of which theirs are."""
    peers = {"diffusers_eager": 900.0, "torch_compile_reduce_overhead": 600.0}
    found = record(component="picture", precision="fp8", width=1024, height=1024, steps=steps, peers=peers)
    for number, peer in enumerate(peers):
        found.references[peer] = found.references[peer].model_copy(update={"note": f"PNG by Pillow {200 + number} ms"})
    checkpoint = model_of(1_600_000_000)
    checkpoint.transformer_config = SimpleNamespace(guidance_embeds=sprint)
    for given in (found, record(component="picture", precision="fp8", width=1024, height=1024, steps=steps)):
        assert record_figures(engine, checkpoint, [given], {}, steps=steps, pictures=2, note="random weights")
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert all(line["note"].count("random weights") == 1 for line in lines)
    both = "diffusers_eager: PNG by Pillow 200 ms; torch_compile_reduce_overhead: PNG by Pillow 201 ms"
    rows = [(line["figure"], line["peer"], both in line["note"]) for line in lines]
    assert sum("Pillow" in line["note"] for line in lines) == 1
    if sprint:
        name = "sprint_1600m_1024px_1step"
        assert rows == [
            (f"{name}_gpu_ms", {}, False),
            (f"{name}_wall_ms", peers, True),
            (f"{name}_gpu_ms", {}, False),
            (f"{name}_wall_ms", {}, False),
        ]
    else:
        assert rows == [("picture_1600m_1024px_20step_fp8_ms", given, bool(given)) for given in (peers, {})]


def test_on_a_gpu_pipelines_have_half_the_bits(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser's half, or fp16 beside a quantised one."""
    asked: list[tuple[object, ...]] = []

    def pipelines(*arguments: object, **options: object) -> Any:
        asked.append((arguments[3], options["dtype"], options["device"]))
        return nullcontext({})

    monkeypatch.setattr("benchmarks.latency_pipelines.checked_pipelines", pipelines)
    monkeypatch.setattr(latency_run, "gpu_memory_used", lambda: 1)
    bench = Bench(gpu=True, run="1" * 12, yardstick=cpu_gemm((64, 64, 64)), meter=EnergyMeter(None))
    work = Work(component="picture", width=64, height=64, batch=1, steps=1)
    plan = Plan(pictures=3, peers=("eager", "reduce-overhead"), model=tiny())
    for precision in (Precision.BF16, Precision.FP8):
        monkeypatch.setitem(engine.manifest.precision, "denoiser", precision)
        measure(engine, work, bench, plan, model_of(1))
    assert asked == [(plan.peers, torch.bfloat16, "cuda"), (plan.peers, torch.float16, "cuda")]


def test_a_bundle_that_draws_nothing_is_timed_by_itself(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.latency_figures.device_info", lambda: SimpleNamespace(capability=(9, 0)))
    monkeypatch.setattr("benchmarks.latency_figures.floor_beside", lambda *_: ({}, ""))
    alone = SimpleNamespace(manifest=SimpleNamespace(components=("decoder",)))
    checkpoint = SimpleNamespace(sources={"transformer": SimpleNamespace(shapes={"weight": (1_600_000_000,)})})
    stats = ErrorStats(rms=1e-3, max=1e-2, mean=0.0)
    found = record(component="decoder", precision="fp8", width=1024, height=1024)
    errors = {"decoder": {"engine": stats, "pytorch": stats}}
    assert record_figures(alone, checkpoint, [found], errors, steps=2, pictures=2, note="")  # type: ignore[arg-type]
    (line,) = map(json.loads, recorded.read_text().splitlines())
    assert (line["figure"], line["value"]) == ("decode_1024px_fp8_ms", found.device.p50)
    assert "by itself, in one CUDA graph" in line["note"]


def model_of(parameters: int) -> Any:
    return SimpleNamespace(sources={"transformer": SimpleNamespace(shapes={"weight": (parameters,)})})


@pytest.mark.parametrize(("parameters", "name"), [(1_600_000_000, "step_ratio_512px"), (30_000_000, "step_ratio_tiny_512px")])
def test_a_quantised_step_by_fp16_s(recorded: Path, monkeypatch: pytest.MonkeyPatch, parameters: int, name: str) -> None:
    """Whichever bundle came first; the first size, one picture, and nothing of another model or run."""
    monkeypatch.setattr("benchmarks.latency_figures.device_info", lambda: SimpleNamespace(capability=(9, 0)))
    versions = {"python": "3.11", "tensorrt": "rtx 1.6.1"}
    found = [
        record(ratio=6.0, precision="fp8", versions=versions),
        record(ratio=30.0, precision="fp8", width=1024),
        record(ratio=7.0, precision="int8", batch=2),
        record(ratio=8.0, precision="int8", versions=versions),
        record(ratio=10.0),
        record(ratio=40.0, width=1024),
        record(ratio=20.0, batch=2),
        record(ratio=50.0, component="decoder"),
        record(ratio=1.0, precision="nvfp4", model="another"),
        record(ratio=1.0, precision="nvfp4", run="1" * 12),
    ]
    record_step_ratios(model_of(parameters), found, note="random weights")
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert [(line["figure"], line["value"], line["unit"]) for line in lines] == [
        (f"{name}_fp8", 0.6, "ratio"),
        (f"{name}_int8", 0.8, "ratio"),
    ]
    note = "sana-tiny, 512 x 512 px, batch 1; 12.00 ms of 20.00; random weights; TensorRT for RTX on compute capability 9.0"
    assert lines[0]["note"].startswith(note)
    assert lines[0]["versions"]["tensorrt"] == "rtx 1.6.1"


def test_1024_px_is_what_a_name_without_a_size_means(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.latency_figures.device_info", lambda: SimpleNamespace(capability=(8, 9)))
    found = [record(precision=each, width=1024, height=1024) for each in ("fp16", "fp8")]
    record_step_ratios(model_of(1_600_000_000), found, note="")
    found = [record(precision=each, width=2048, height=1024) for each in ("fp16", "fp8")]
    record_step_ratios(model_of(600_000_000), found, note="")
    names = [json.loads(line)["figure"] for line in recorded.read_text().splitlines()]
    assert names == ["step_ratio_fp8", "step_ratio_600m_2048x1024px_fp8"]


def test_clocks_of_both_are_said(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio of times at two clocks is not one of work."""
    monkeypatch.setattr("benchmarks.latency_figures.device_info", lambda: SimpleNamespace(capability=(8, 9)))
    found = [record(clock_mhz=1680.0), record(ratio=6.0, precision="fp8", clock_mhz=1710.0), record(ratio=8.0, precision="int8")]
    record_step_ratios(model_of(30_000_000), found, note="")
    fp8, int8 = (json.loads(line)["note"] for line in recorded.read_text().splitlines())
    assert "12.00 ms of 20.00, GPU at 1710 MHz and 1680" in fp8
    assert "MHz" not in int8


def test_no_ratio_without_both(recorded: Path) -> None:
    record_step_ratios(model_of(30_000_000), [record(), record(component="decoder", precision="fp8")], note="")
    assert not recorded.exists()


def test_two_bundles_of_one_call(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--record hands on what both sessions measured, unless one of them failed."""
    given: list[list[str]] = []

    class Planted:
        def __init__(self, options: argparse.Namespace, bundle: Path, run: str) -> None:
            self.checkpoint, self.records, self.bundle = model_of(30_000_000), [record(precision=bundle.name)], bundle

        def __call__(self) -> int:
            return int(self.bundle.name == "int8")

    monkeypatch.setattr(latency_session, "Session", Planted)
    monkeypatch.setattr(latency_session, "has_gpu", lambda: False)
    monkeypatch.setattr(latency, "prepare_torch", lambda gpu, threads: None)
    monkeypatch.setattr(latency_figures, "record_step_ratios", lambda _, found, note: given.append([r.precision for r in found]))
    common = ["--model", "x", "--peers", "none", "--record", "--bundle"]
    assert latency.main([*common, "fp16", "fp8"]) == 0
    assert latency.main([*common, "fp16", "int8"]) == 1
    assert given == [["fp16", "fp8"]]


def test_a_floor_is_what_took_turns_and_traffic(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def floor(checkpoint: object, work: Work, precision: str, tokens: int) -> Floor:
        counted.append(tokens)
        return Floor(products=(), traffic_bytes=3_000_000_000)

    monkeypatch.setattr(latency_figures, "floor_of", floor)
    monkeypatch.setattr(latency_figures, "copy_rate", lambda gpu: 4e12)
    beside = record()
    references = beside.references | {PRODUCTS: next(iter(beside.references.values())).model_copy(update={"ms": 6.0})}
    found = beside.model_copy(update={"references": references})
    words = "floor: products 6.00 ms, traffic 0.75"
    assert latency_figures.floor_beside(engine, model_of(1), found) == ({"floor": 6.75}, words)
    assert latency_figures.floor_beside(engine, model_of(1), beside) == ({}, "")  # none was measured
    text = found.model_copy(update={"component": "text_encoder", "width": 0, "height": 0})
    assert latency_figures.floor_beside(engine, model_of(1), text) == ({"floor": 6.75}, words)
    ids = component_inputs(engine, Work(component="text_encoder", width=0, height=0, batch=1))["input_ids"]
    assert counted == [0, ids.shape[1]]


def test_a_floor_takes_turns_with_the_work(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one and it was asked for."""
    made = []
    products = Floor(products=(), traffic_bytes=1)
    monkeypatch.setattr(
        "benchmarks.latency_floor.floor_of", lambda _, work, precision, tokens: made.append((work.component, tokens)) or products
    )
    monkeypatch.setattr(Floor, "task", lambda self: Task(PRODUCTS, lambda: time.sleep(1e-4), cpu_clock))
    monkeypatch.setattr(latency_run, "gpu_memory_used", lambda: 1)
    bench = Bench(gpu=True, run="1" * 12, yardstick=cpu_gemm((64, 64, 64)), meter=EnergyMeter(None))
    works = (("denoiser", True, True), ("denoiser", False, False), ("picture", True, False), ("text_encoder", True, True))
    for component, asked, there in works:
        size = {"width": 0, "height": 0} if component == "text_encoder" else {"width": 64, "height": 64}
        work = Work(component=component, batch=1, steps=1, **size)
        found = measure(engine, work, bench, Plan(rounds=3, pictures=3, floor=asked), model_of(1))
        assert (PRODUCTS in found.references) == there
        assert all(other.rms_error is None for other in found.references.values())
    text = component_inputs(engine, Work(component="text_encoder", width=0, height=0, batch=1))["input_ids"]
    assert made == [("denoiser", 0), ("text_encoder", text.shape[1])]


def test_nothing_holds_a_peer_when_its_memory_is_freed(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []

    class Weights:
        def __call__(self) -> None:
            time.sleep(1e-4)

    @contextmanager
    def held() -> Iterator[dict[str, Peer]]:
        weights = Weights()
        alive, found = weakref.ref(weights), {"diffusers_eager": Peer(Task("diffusers_eager", weights, cpu_clock), 0.0)}
        del weights
        yield found
        found.clear()
        freed.append(alive() is None)

    monkeypatch.setattr(latency_run, "_peers", lambda stack, *_: stack.enter_context(held()))
    bench = Bench(gpu=False, run="1" * 12, yardstick=cpu_gemm((64, 64, 64)), meter=EnergyMeter(None))
    for component in ("denoiser", "picture"):
        work = Work(component=component, width=64, height=64, batch=1, steps=1)
        found = measure(engine, work, bench, Plan(rounds=3, pictures=3, peers=["eager"]), model_of(1))
        assert found.references["diffusers_eager"].rms_error == 0.0
    assert freed == [True, True]


@pytest.mark.slow
def test_the_golden_inputs_of_a_decoder_alone(tmp_path: Path) -> None:
    bundle = build(request(tmp_path / "bundle", components=("decoder",)), quiet()).bundle
    with SanaEngine(bundle.path, backend="onnxruntime") as engine:
        assert golden_complaints(engine) == []


@pytest.mark.slow
def test_an_fp8_decoder_is_held_to_the_simulation() -> None:
    """Of its convolutions. With other scales, within a factor of 2, it is within the bound; with coarse ones it is not."""
    checkpoint = load(tiny())
    vae = checkpoint.vae(torch.bfloat16)
    decoder = DecoderForExport(vae, FusedDecoder(vae.decoder))
    inputs = {"latents": np.random.default_rng(1).standard_normal((1, 32, 2, 3)).astype(np.float32)}
    latents = torch.from_numpy(inputs["latents"])
    with torch.inference_mode(), ConvRanges(decoder) as ranges:
        decoder(latents)
    largest = ranges.largest()

    def errors(factor: float, precision: Precision = Precision.FP8) -> dict[str, ErrorStats]:
        """Of the fused decoder in FP8, in place of an engine that says it has `precision`. factor: of the scales."""
        plan = conv_plan("fp8", {group: factor * each for group, each in largest.items()}, MARGINS["fp8"])

        def run(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.inference_mode(), QuantizedConvs(decoder, plan):
                return {"images": decoder(torch.from_numpy(given["latents"])).numpy()}

        session, manifest = nullcontext(SimpleNamespace(run=run)), SimpleNamespace(precision={"decoder": precision})
        fake = SimpleNamespace(session=lambda _: session, manifest=manifest, bundle=SimpleNamespace(manifest=manifest))
        return engine_errors(fake, "decoder", checkpoint, inputs, device="cpu")  # type: ignore[arg-type]

    for factor, fits in ((0.7, True), (2**14, False)):
        found = errors(factor)
        assert bool(check_size(found["engine"], bound_from(found["pytorch"]))) != fits
    assert errors(1.0, Precision.BF16)["pytorch"] != errors(1.0)["pytorch"]
