"""The page and its charts, kernels and their floors: on records that are made up, and on a fake bundle's graphs."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import MODULE, FakeContext, FakeCuda, FakeEngine, fake_backend
from fakes import HOST_TABLE, fake_inputs, write_fake_bundle
from latency_records import record

from benchmarks import latency_kernels, latency_report
from benchmarks.latency_history import HISTORY, History, Kernel, Kernels, Times
from benchmarks.latency_kernels import Profiler, layer_cost, node_cost, ort_kernels, trt_kernels
from benchmarks.latency_report import floor_ms, page, write_report
from benchmarks.latency_work import Work
from benchmarks.latency_yardstick import copy_rate, gemm_flops, gemm_rate
from benchmarks.plots import Axis, Series, chart
from engines.errors import RequestError
from engines.spec import Target
from runtime import SanaEngine

LAYERS = Kernels(
    why="layers, by TensorRT's profiler",
    peak_flops=1e12,
    peak_bytes=1e11,
    kernels=(
        Kernel(name="a <product>", kind="gemm", ms=2.0, flops=1e9, bytes=1e6),  # floor: 1 ms of arithmetic
        Kernel(name="a copy", kind="", ms=0.5, flops=0, bytes=2e7),  # floor: 0.2 ms of traffic
        Kernel(name="unknown", kind="", ms=0.1, flops=0, bytes=0),
    ),
)


def charts(text: str) -> list[ET.Element]:
    return [ET.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_the_page_shows_history_sizes_and_kernels() -> None:
    records = [
        record(accepted=True, run="1" * 12, peers={"diffusers_eager": 30.0}),
        record(width=1024, height=1024, ratio=40, accepted=True, run="1" * 12, peers={"diffusers_eager": 120.0}),
        record(ratio=11, run="2" * 12, peers={"diffusers_eager": 30.0}, kernels=LAYERS, note="<random> weights", energy_j=0.5),
    ]
    text = page(records, ["<h2>More</h2>"])
    assert len(charts(text)) == 3  # the history of both sizes, latency by size, one roofline
    assert "<random>" not in text
    assert "&lt;random&gt; weights" in text
    assert "&lt;product&gt;" in text
    assert re.search(r"\+1?\d\.\d%", text)  # since accepted
    assert "diffusers_eager 30.000 ms (1.36 x)" in text
    assert "Kernels were not timed" in text  # of the larger size
    assert text.rstrip().endswith("<h2>More</h2>")
    history = charts(text)[0]
    assert sum("run 1" in (title.text or "") or "run 2" in (title.text or "") for title in history.iter("title")) == 3


def test_pictures_and_their_peers_are_drawn_by_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[float]]] = []

    def planted(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
        drawn.append((y.label, [each.points[0][1] for each in series]))
        return "<svg></svg>"

    monkeypatch.setattr(latency_report, "chart", planted)
    found = record(component="picture", peers={"diffusers_eager": 90.0}, wall=Times(p50=33.0, p90=33.0, p99=33.0))
    peer = found.references["diffusers_eager"].model_copy(update={"clock": "wall"})
    page([found])
    page([found.model_copy(update={"references": found.references | {"diffusers_eager": peer}})])
    assert [each for each in drawn if each[0].startswith("ms")] == [("ms", [20.0, 90.0]), ("ms, wall clock", [33.0, 90.0])]


def test_runs_of_one_day_are_told_apart_by_their_times() -> None:
    dates = ("2026-11-24T19:50:38+00:00", "2026-11-24T20:10:00+00:00", "2026-11-25T08:00:00+00:00")
    records = [record(run=f"{number}" * 12).model_copy(update={"date": date}) for number, date in enumerate(dates)]
    words = [text.strip() for text in charts(page(records))[0].itertext()]
    assert [word for word in words if word in ("2026-11-24", "20:10", "2026-11-25")] == ["2026-11-24", "20:10", "2026-11-25"]


def test_products_in_8_bits_have_a_roof_of_their_own() -> None:
    fast = Kernel(name="nvjet", kind="Fp8Linear", ms=1.0, flops=1.5e9, bytes=1e6)
    found = LAYERS.model_copy(update={"peak_narrow_flops": 2e12, "kernels": (*LAYERS.kernels, fast)})
    assert floor_ms(fast, found) == pytest.approx(0.75)
    assert floor_ms(LAYERS.kernels[0], found) == pytest.approx(1.0)
    (roofline,) = [each for each in charts(page([record(kernels=found)])) if "FLOP/s" in "".join(each.itertext())]
    assert "roof, 8 bits" in "".join(roofline.itertext())
    assert "roof, 8 bits" not in page([record(kernels=LAYERS)])


def test_a_run_without_kernels_hides_no_roofline() -> None:
    """Most runs, such as those of --check, time no kernels."""
    text = page([record(run="1" * 12, kernels=LAYERS, commit="a" * 12), record(run="2" * 12, commit="b" * 12)])
    assert f"2026-01-02, commit {'a' * 12}: {html.escape(LAYERS.why)}" in text
    assert "Kernels were not timed" not in text


def test_no_kernels_are_said_plainly() -> None:
    text = page([record(kernels=Kernels(why="not there: TensorRT's profiler said nothing, and PyTorch sees no GPU"))])
    assert "No kernels: not there: TensorRT&#x27;s profiler said nothing" in text


def test_a_text_has_no_pixels() -> None:
    """Nor a place among the sizes."""
    texts = [record(component="text_encoder", width=tokens, height=0, run=str(n) * 12) for n, tokens in enumerate((0, 300))]
    found = page([*texts, record()])
    assert found.count("<svg") == 2 + 1  # a history of each component, a denoiser's sizes
    assert "300 tokens, batch 1" in found
    assert " x 0 px" not in found


def test_the_history_that_ships_is_drawn(tmp_path: Path) -> None:
    records = History(HISTORY).read()
    assert records
    text = write_report(tmp_path / "report.html", records, []).read_text(encoding="utf-8")
    assert all(html.escape(model) in text for model in {each.model for each in records})


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = write_report(tmp_path / "deep" / "page.html", [record()])
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(RequestError, match="expected at least one run"):
        write_report(path, [])


def test_floors() -> None:
    assert [floor_ms(kernel, LAYERS) for kernel in LAYERS.kernels] == pytest.approx([1.0, 0.2, 0.0])


def test_a_point_is_where_it_should_be() -> None:
    series = Series(name="a & b", points=[(1, 1), (10, 100), (100, 10_000)], words=["x", "y", "z"], filled=[True, False, True])
    text = chart("t", Axis(label="n", log=True), Axis(label="ms", log=True), [series])
    circles = [each for each in ET.fromstring(text).iter("circle") if each.find("title") is not None]
    across, up = ([float(circle.attrib[name]) for circle in circles] for name in ("cx", "cy"))
    assert across[1] == pytest.approx((across[0] + across[2]) / 2, abs=0.2)  # logarithmic
    assert up[0] > up[1] > up[2]
    assert [circle.attrib["fill"].startswith("#") for circle in circles] == [True, False, True]


@pytest.mark.parametrize("points", [[(1.0, 1.0)], [(0.0, 5.0), (1.0, 5.0)], [(0.0, 0.0), (1e6, 1e-3)]])
def test_charts_of_few_or_equal_points(points: list[tuple[float, float]]) -> None:
    ET.fromstring(chart("t", Axis(label="x"), Axis(label="y"), [Series(name="s", points=points)]))


@pytest.mark.parametrize("values", [[745.0], [119.2, 159.2], [1267.0], [0.03], [1.0, 2.0], [3.0, 70_000.0]])
def test_a_logarithmic_axis_has_numbers(values: list[float]) -> None:
    series = Series(name="s", points=[(1.0, value) for value in values])
    text = chart("t", Axis(label="x"), Axis(label="ms", log=True), [series])
    found = [each.text or "" for each in ET.fromstring(text).iter("text") if each.attrib.get("text-anchor") == "end"]
    assert 2 <= len(found) <= 10
    assert len({*found}) == len(found)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(RequestError, match="expected at least one"):
        chart("t", Axis(label="x"), Axis(label="y"), [])
    with pytest.raises(RequestError, match="expected positive values"):
        chart("t", Axis(label="x", log=True), Axis(label="y"), [Series(name="s", points=[(0, 1)])])


@pytest.mark.parametrize(
    ("kind", "inputs", "output", "flops", "size"),
    [
        ("MatMul", [[2, 3, 5], [5, 7]], [2, 3, 7], 2 * 2 * 3 * 5 * 7, 4 * (30 + 35 + 42)),
        ("MatMul", [[2, 3, 5]], [2, 3, 7], 2 * 2 * 3 * 5 * 7, 4 * (30 + 35 + 42)),  # packed weights count all the same
        ("Conv", [[1, 4, 8, 8], [6, 2, 3, 3]], [1, 6, 8, 8], 2 * 6 * 64 * 2 * 9, 4 * (256 + 108 + 384)),
        ("Softmax", [[2, 3]], [2, 3], 0, 48),
        ("Constant", [], [2], 0, 8),
    ],
)
def test_cost_of_a_node(kind: str, inputs: list[list[int]], output: list[int], flops: int, size: int) -> None:
    assert node_cost(kind, [("float", shape) for shape in inputs], [("float", output)]) == (flops, size)


@pytest.mark.parametrize(
    ("layer", "flops", "size"),
    [
        ({}, 0, 0),
        ({"Inputs": [{"Dimensions": [2, 8], "Format/Datatype": "Half"}], "Outputs": [{"Dimensions": [2, 4]}]}, 0, 32 + 32),
        (
            {
                "LayerType": "gemm",
                "Inputs": [{"Dimensions": [10, 8], "Format/Datatype": "FP16"}],
                "Outputs": [{"Dimensions": [10, 4], "Format/Datatype": "FP16"}],
                "Weights": {"Type": "Half", "Count": 32},
            },
            2 * 10 * 8 * 4,
            2 * (80 + 40 + 32),
        ),
    ],
)
def test_cost_of_a_layer(layer: Mapping[str, Any], flops: int, size: int) -> None:
    assert layer_cost(layer) == (flops, size)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> SanaEngine:
    return SanaEngine(write_fake_bundle(tmp_path_factory.mktemp("report") / "fake", targets=(Target.SM89,)), backend="onnxruntime")


def test_kernels_of_a_graph(engine: SanaEngine) -> None:
    found = ort_kernels(engine.bundle.onnx_path("denoiser"), fake_inputs("denoiser"), runs=2)
    product = next(kernel for kernel in found if kernel.kind == "MatMul")
    assert product.flops == 2 * 2 * 6 * 4  # (k, B, channels) @ (channels, latent channels)
    assert all(kernel.ms >= 0 for kernel in found)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_kernels_of_a_text_encoder_with_its_table_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Its graph and engines take rows, where the work has token ids."""
    monkeypatch.setattr("benchmarks.latency_kernels.copy_rate", lambda gpu: 1.0)
    monkeypatch.setattr("benchmarks.latency_kernels.gemm_rate", lambda size, **how: 1.0)
    monkeypatch.setattr("runtime.trt_backend.open_tensorrt", fake_backend)
    bundle = write_fake_bundle(tmp_path / "host", targets=[Target.SM89], **HOST_TABLE)
    with SanaEngine(bundle, backend=backend) as opened:
        found = Profiler(gpu=False)(opened, Work(component="text_encoder", width=8, height=0, batch=1))
    assert found is not None
    assert ("nodes, by ONNX Runtime's profiler" if backend == "onnxruntime" else "PyTorch sees no GPU") in found.why
    assert bool(found.kernels) == (backend == "onnxruntime")


def test_the_profiler_knows_what_the_machine_can_do(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.latency_kernels.copy_rate", lambda gpu: copy_rate(gpu=gpu, size=1 << 20))
    monkeypatch.setattr("benchmarks.latency_kernels.CPU_GEMMS", ((8, 8, 8), (64, 64, 64), (16, 16, 16)))
    rates: dict[tuple[int, ...], float] = {}

    def rate(size: tuple[int, int, int], **how: Any) -> float:
        rates[size] = gemm_rate(size, **how)
        return rates[size]

    monkeypatch.setattr("benchmarks.latency_kernels.gemm_rate", rate)
    profiler = Profiler(gpu=False)
    assert len(rates) == 3
    assert profiler.peak_flops == max(rates.values()) > 0
    found = profiler(engine, Work(component="denoiser", width=64, height=64, batch=1))
    assert found is not None
    assert "nodes, by ONNX Runtime's profiler; the" in found.why
    assert found.peak_bytes > 1e8
    assert [kernel.ms for kernel in found.kernels] == sorted((kernel.ms for kernel in found.kernels), reverse=True)
    assert profiler(engine, Work(component="picture", width=64, height=64, batch=1)) is None
    assert gemm_flops((2, 3, 5)) == 60


class Inspector:
    execution_context: object = None

    def get_engine_information(self, kind: str) -> str:
        assert self.execution_context is not None
        return '{"Layers": [{"Name": "mix", "LayerType": "Convolution", "Outputs": [{"Dimensions": [1, 2]}]}, "nameless"]}'


def test_layers_by_tensorrts_profiler(engine: SanaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second context is profiled, behind what keeps the GPU waiting: the first is not, and nothing of the second stays."""
    order: list[str] = []
    monkeypatch.setattr(
        latency_kernels, "_hold", lambda stream, seconds: order.append(f"held {stream == cuda.stream}, {seconds > 0}")
    )

    class IProfiler:
        pass

    class Context(FakeContext):
        profiler: Any = None

        def execute_async_v3(self, stream: int) -> bool:
            order.append("run" if self.profiler is None else "profiled")
            if self.profiler is not None:
                self.profiler.report_layer_time("mix", 0.5)
                self.profiler.report_layer_time("tanh", 0.25)
            return super().execute_async_v3(stream)

    def make_context(self: FakeEngine, config: object) -> Context:
        self.contexts.append(Context(self, None))
        return self.contexts[-1]

    cuda = FakeCuda()
    backend = fake_backend(engine.bundle, cuda=cuda)
    session = backend.session("denoiser")
    held = len(cuda.allocations)
    module = SimpleNamespace(**vars(MODULE), IProfiler=IProfiler, LayerInformationFormat=SimpleNamespace(JSON="json"))
    monkeypatch.setattr(FakeEngine, "create_execution_context", make_context)
    monkeypatch.setattr(FakeEngine, "create_engine_inspector", lambda self: Inspector(), raising=False)
    object.__setattr__(session._tensorrt, "module", module)
    monkeypatch.setattr(
        latency_kernels, "_cupti", lambda call, runs: [Kernel(name="mix_kernel", kind="", ms=1.0, flops=0, bytes=8)]
    )
    found, why = trt_kernels(session, fake_inputs("denoiser"), runs=2)
    assert why == "layers, by TensorRT's profiler"
    assert order == ["run", "run", *2 * ["held True, True", "profiled"]]
    assert [(kernel.name, kernel.kind, kernel.ms, kernel.bytes) for kernel in found] == [
        ("mix", "Convolution", 0.5, 8),
        ("tanh", "", 0.25, 0),
    ]
    own = Kernel(name="mix_kernel", kind="Mix", ms=0.4, flops=8, bytes=8)
    monkeypatch.setattr(latency_kernels, "_cupti", lambda call, runs: [own])
    found, why = trt_kernels(session, fake_inputs("denoiser"), runs=2)
    assert (found, why) == ([own], "kernels, by CUPTI through torch.profiler")  # the one that knows FLOPs
    assert len(cuda.allocations) == held
    np.testing.assert_equal(session.run(fake_inputs("denoiser"))["prediction"].shape, (1, 4, 4, 6))


def test_a_tensorrt_without_a_profiler_and_no_gpu(engine: SanaEngine) -> None:
    session = fake_backend(engine.bundle).session("decoder")
    assert trt_kernels(session, fake_inputs("decoder")) == (
        [],
        "not there: TensorRT's profiler said nothing, and PyTorch sees no GPU",
    )
