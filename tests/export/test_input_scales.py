"""Scales of activations, from the largest numbers of the references."""

import pytest
import torch
from tiny_build import component, runner

from engines.spec import Precision
from export import reference
from export.input_scales import MARGIN, InputScales
from export.reference import PyTorchErrors, loaded, make_reference
from export.wide import Wide

GROUPS = {f"transformer_blocks.0.{layer}" for layer in ("attn1.to_out.0", "attn2.to_out.0", "ff.conv_point")}


@pytest.fixture(scope="module")
def step():
    part = component("denoiser", Precision.FP8)
    return part, loaded(part.module, runner().loader(part), torch.float16)


def inputs(part, factor=1.0):
    sizes = {"batch": 1, "guidance": 2, "height": 3, "width": 4}
    torch.manual_seed(0)
    return [torch.rand(t.shape(sizes)).to(t.torch_dtype) * (factor if t.name == "text_values" else 1.0) for t in part.spec.inputs]


@pytest.mark.parametrize("wide", [None, torch.float32, torch.float64], ids=str)
def test_the_largest_numbers_that_went_in(step, wide):
    """Of both calls, also where all is computed wider; and the answer is as without."""
    part, module = step
    seen = {}
    transformer = module.get_submodule("transformer")
    block = transformer.transformer_blocks[0]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].abs().max().item()))
        for name, layer in (("attn1.to_out.0", block.attn1.to_out[0]), ("attn2.to_out.0", block.attn2.to_out[0]))
    ]
    watch = InputScales(transformer)
    with torch.inference_mode():
        for factor in (1.0, 3.0, 0.5):
            given = inputs(part, factor)
            with Wide(wide) if wide else torch.inference_mode():
                plain = module(*given)
                with watch:
                    got = module(*given)
            assert all(torch.equal(one, other) for one, other in zip(got, plain, strict=True))
    for hook in hooks:
        hook.remove()
    scales = watch.scales()
    assert scales.keys() == GROUPS
    for name, found in seen.items():
        assert scales[f"transformer_blocks.0.{name}"] == pytest.approx(MARGIN * max(found) / 448, rel=1e-6)
    assert len(set(seen["attn2.to_out.0"])) == 3  # the second call's is the largest
    assert seen["attn2.to_out.0"].index(max(seen["attn2.to_out.0"])) in (2, 3)
    assert all(torch.tensor(scale).item() == scale for scale in scales.values())


def test_no_scale_without_a_number(step):
    part, module = step
    watch = InputScales(module.get_submodule("transformer"))
    with pytest.raises(ValueError, match=r"attn1.to_out.0: got inputs up to 0.0 in the references"):
        watch.scales()
    with torch.inference_mode(), watch:
        module(*inputs(part, torch.nan))
        module(*inputs(part))
    with pytest.raises(ValueError, match=r"to_out.0: got inputs up to nan"):
        watch.scales()


def test_references_have_scales_and_their_own_error_is_with_them(step, monkeypatch):
    part, _ = step
    given = {t.name: x.numpy() for t, x in zip(part.spec.inputs, inputs(part), strict=True)}
    found = []

    class Recorded(reference.Fp8Linears):
        def __init__(self, transformer, input_scales):
            found.append(input_scales)
            super().__init__(transformer, input_scales)

    monkeypatch.setattr(reference, "Fp8Linears", Recorded)
    _, errors = make_reference(part, {"case": given}, runner().loader(part))
    assert errors.input_scales.keys() == GROUPS
    assert found == [errors.input_scales]
    assert PyTorchErrors.model_validate_json(errors.model_dump_json(), strict=False) == errors
    fp16 = component("denoiser", Precision.FP16)
    assert make_reference(fp16, {"case": given}, runner().loader(fp16))[1].input_scales == {}
