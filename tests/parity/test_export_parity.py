"""The parity check must be able to fail: small errors are planted where they could happen, and it sees each of them."""

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from parity.interpreter import interpret
from safetensors.torch import load_file, save_file
from tiny_build import RANGES, runner, shared, tiny

from engines.errors import ParityError
from engines.golden import Golden
from engines.parity_report import OutputParity, bound_from, check, measure
from engines.spec import COMPONENTS, ComponentName, Precision, component_precision
from export.components import TORCH_DTYPES, Component, components
from export.parity import bounds, measured, run_onnxruntime
from export.reference import loaded, run_module
from export.references import make_references
from export.stages import golden_of, pytorch_of
from sana_ref import ops
from sana_ref.checkpoint import Checkpoint, load

NV_EPS = 1e-8  # what NVlabs/Sana adds to the denominator; diffusers, and this project, add 1e-15
FAINT = 2e-4  # queries and keys this small make the difference visible


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An exported component, the reference's answers, and what it is held to."""

    checkpoint: Checkpoint
    component: Component
    folder: Path
    golden: Mapping[str, Golden]
    bounds: Mapping[str, OutputParity]

    def hold(self, folder: Path) -> None:
        """The check as a build makes it."""
        got = run_onnxruntime(folder / "model.onnx", self.golden, frugal=False)
        measured(self.component.name, "onnxruntime", got, self.golden, self.bounds)


@functools.cache
def faint() -> Path:
    """The tiny checkpoint with queries and keys near zero, as a model with strong weight decay might have."""
    folder = shared() / "faint"
    shutil.copytree(tiny(), folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in ("to_q", "to_k"):
        weights[f"transformer_blocks.0.attn1.{name}.weight"] *= FAINT
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@functools.cache
def subject(name: ComponentName, folder: Callable[[], Path] = tiny) -> Subject:
    checkpoint = load(folder())
    everything = components(checkpoint, component_precision(Precision.FP16))
    run = runner(checkpoint)
    reference = make_references(run, everything, (name,), RANGES)[name]
    return Subject(
        checkpoint=checkpoint,
        component=everything[name],
        folder=run.export(everything[name]).folder,
        golden=golden_of(reference),
        bounds=bounds(pytorch_of(reference)),
    )


def changed_weight(subject: Subject, parameter: str, change: Callable[[np.ndarray], None], out: Path) -> Path:
    """A copy of the export where `change` was made to one stored weight."""
    shutil.copytree(subject.folder, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == parameter)
    place = {entry.key: entry.value for entry in tensor.external_data}
    kind = {onnx.TensorProto.FLOAT16: torch.float16, onnx.TensorProto.BFLOAT16: torch.bfloat16}[tensor.data_type]
    data = np.memmap(out / place["location"], np.uint8, "r+", int(place["offset"]), (int(place["length"]),))
    values = torch.from_numpy(np.array(data)).view(kind).reshape(tuple(tensor.dims)).float()
    change(values.numpy())
    data[:] = values.to(kind).reshape(-1).view(torch.uint8).numpy()
    data.flush()
    return out


def changed_graph(subject: Subject, change: Callable[[onnx.ModelProto], None], out: Path) -> Path:
    """A copy of the export where `change` was made to the portable graph."""
    shutil.copytree(subject.folder, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, out / "model.onnx")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPONENTS)
def test_what_was_exported_passes(name):
    subject(name).hold(subject(name).folder)


@pytest.mark.slow
def test_faint_queries_pass_too():
    subject("denoiser", faint).hold(subject("denoiser", faint).folder)


def scale_one_channel(weight: np.ndarray) -> None:
    weight[1] *= 1.01


def swap_heads(weight: np.ndarray) -> None:
    weight[:] = np.concatenate([weight[32:64], weight[:32]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameter", "change"),
    [
        ("denoiser", "transformer.transformer_blocks.0.attn1.to_v.weight", scale_one_channel),
        ("denoiser", "transformer.transformer_blocks.0.attn2.to_out.0.weight", scale_one_channel),
        ("text_projection", "transformer.transformer_blocks.0.attn2.to_v.weight", scale_one_channel),
        ("text_projection", "transformer.caption_projection.linear_1.weight", scale_one_channel),
        ("denoiser", "transformer.transformer_blocks.0.attn1.to_v.weight", swap_heads),
        ("decoder", "decoder.conv_out.conv.weight", scale_one_channel),
        ("decoder", "decoder.conv_in.weight", scale_one_channel),
        ("text_encoder", "encoder.layers.0.mlp.up_proj.weight", scale_one_channel),
        ("text_encoder", "encoder.layers.0.self_attn.k_proj.weight", scale_one_channel),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.split(".", 1)[-1],
)
def test_an_error_in_a_stored_weight_is_seen(tmp_path, name, parameter, change):
    bad = changed_weight(subject(name), parameter, change, tmp_path / "bad")
    with pytest.raises(ParityError, match=rf"{name}, \w+ \(ONNX Runtime, case '\w+'\): rms error: got .*; expected at most"):
        subject(name).hold(bad)


def wrong_epsilon_of_the_body(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LinearAttentionApply")
    next(attribute for attribute in node.attribute if attribute.name == "eps").f = NV_EPS


def wrong_epsilon_of_a_norm(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-3


def forgotten_relu(model: onnx.ModelProto) -> None:
    body = next(function for function in model.functions if function.name == "LinearAttentionState")
    next(node for node in body.node if node.op_type == "Relu").op_type = "Abs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "change"),
    [
        pytest.param(faint, wrong_epsilon_of_the_body, marks=pytest.mark.slow),
        (tiny, wrong_epsilon_of_a_norm),
        (tiny, forgotten_relu),
    ],
    ids=lambda value: value.__name__,
)
def test_an_error_in_the_graph_is_seen(tmp_path, folder, change):
    bad = changed_graph(subject("denoiser", folder), change, tmp_path / "bad")
    with pytest.raises(ParityError, match="expected at most"):
        subject("denoiser", folder).hold(bad)


@pytest.mark.slow
def test_an_output_that_is_not_finite_or_of_another_shape_is_seen():
    it = subject("decoder")
    right = {case: dict(golden.outputs) for case, golden in it.golden.items()}
    for wrong, words in (
        (lambda x: np.where(x == x.max(), np.nan, x), "not finite"),
        (lambda x: x[..., :-1], "got an output of shape"),
    ):
        got = right | {"wide": {"images": wrong(right["wide"]["images"])}}
        with pytest.raises(ParityError, match=rf"decoder, images \(TensorRT, case 'wide'\): .*{words}"):
            measured("decoder", "tensorrt", got, it.golden, it.bounds)


# What a kernel inside an engine could get wrong. There is no GPU here, so PyTorch at the engine's precision stands in for it.
def wrong_epsilon(q, k, v, eps):
    return ops.relu_linear_attention_truth(q, k, v, 10 * NV_EPS)


def swapped_head(q, k, v, eps):
    out = ops.relu_linear_attention_truth(q, k, v, eps)
    return torch.cat([out[:, 1:2], out[:, :1], out[:, 2:]], dim=1)


def scaled_channel(q, k, v, eps):
    return ops.relu_linear_attention_truth(q, k, v, eps) * torch.where(torch.arange(q.shape[-1]) == 3, 1.5, 1.0).to(q.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "kernel", "seen"),
    [
        (tiny, ops.relu_linear_attention_truth, False),
        pytest.param(faint, ops.relu_linear_attention_truth, False, marks=pytest.mark.slow),
        pytest.param(faint, wrong_epsilon, True, marks=pytest.mark.slow),
        (tiny, swapped_head, True),
        (tiny, scaled_channel, True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_error_in_an_engines_kernel_is_seen(monkeypatch, folder, kernel, seen):
    it = subject("denoiser", folder)
    source = it.checkpoint.sources["transformer"]
    module = loaded(it.component.module, lambda name: source.read(it.component.checkpoint_name(name)), TORCH_DTYPES[Precision.FP16])

    def attention(qkv, num_heads, eps=ops.EPS):
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return kernel(q, k, v, eps).transpose(1, 2).flatten(2)

    monkeypatch.setattr(ops, "qkv_linear_attention", attention)
    got = {case: run_module(module, it.component, golden.inputs) for case, golden in it.golden.items()}
    if seen:
        with pytest.raises(ParityError, match=r"denoiser, \w+ \(TensorRT, case"):
            measured("denoiser", "tensorrt", got, it.golden, it.bounds)
    else:
        measured("denoiser", "tensorrt", got, it.golden, it.bounds)


# The same faults in the Triton kernel itself, run by Triton's interpreter.
FAULTS = {
    "none": ("+ eps", "+ eps"),
    "wrong_epsilon": ("+ eps", f"+ {NV_EPS}"),
    "swapped_head": ("image * in_B + head * in_H", "image * in_B + (head ^ 1) * in_H"),  # reads the neighbour's, writes its own
    "scaled_channel": ("top_ND, bottom_N[:, None]", "top_ND * tl.where(d[None, :] == 3, 1.02, 1.0), bottom_N[:, None]"),
}
DISPATCH = """
import importlib
def launch(q, k, v, out, fault):
    importlib.import_module("planted_" + fault).launch(q, k, v, out)
"""


@pytest.mark.slow
def test_an_error_in_the_triton_kernel_is_seen(tmp_path, monkeypatch):
    from plugins import relu_linear_attention

    source = Path(relu_linear_attention.__file__).read_text()
    (tmp_path / "planted.py").write_text(DISPATCH)
    for fault, (right, wrong) in FAULTS.items():
        assert right in source, f"the kernel was rewritten: plant {fault} another way"
        (tmp_path / f"planted_{fault}.py").write_text(source.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    q, k, v = (torch.randn(1, 4, 77, 32, generator=torch.Generator().manual_seed(seed)).half() for seed in range(3))
    q, k = q * 1e-4, k * 1e-4  # small, so that the epsilon matters
    exact = ops.relu_linear_attention_truth(q.double(), k.double(), v.double()).numpy()
    bound = bound_from(measure(ops.relu_linear_attention_truth(q, k, v).numpy(), exact))
    outputs = interpret("planted:launch", [((q, k, v), {"fault": fault}) for fault in FAULTS])
    wrong = {fault: check(measure(out.numpy(), exact), bound) for fault, out in zip(FAULTS, outputs, strict=True)}
    assert not wrong.pop("none")
    assert all(wrong.values()), wrong
