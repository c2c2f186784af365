import pytest
import torch
import torch.nn.functional as F
from tiny_build import component
from torch import nn

from engines.spec import Precision
from export.cases import decoder_cases
from export.reference import loaded, run_module
from export.wide import Wide
from sana_ref.checkpoint import load


class Mixed(nn.Module):
    """Every way in which the models ask for a type."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear, self.scale = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, ids):
        x = self.words(ids)
        y = x.float().pow(2).mean(-1, keepdim=True)
        x = (x * torch.rsqrt(y + 1e-6)).to(self.linear.weight.dtype) * self.scale
        z = torch.arange(4, dtype=torch.float32, device=x.device) / 3
        return torch.cat([F.silu(self.linear(x)), z.to(x.dtype).expand_as(x)], dim=-1)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_wide_equals_a_wide_copy(wide):
    torch.manual_seed(0)
    model = Mixed().bfloat16()
    ids = torch.arange(8)
    with torch.inference_mode(), Wide(wide):
        got = model(ids)
    assert got.dtype == wide
    copy = Mixed()
    copy.load_state_dict({name: tensor.to(wide) for name, tensor in model.state_dict().items()}, assign=True)
    with torch.inference_mode(), Wide(wide):  # also where the model asks for fp32 by name
        expected = copy(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert model.linear.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_component_runs_wide_with_narrow_weights():
    from tiny_build import RANGES, tiny

    checkpoint = load(tiny())
    part = component("decoder", Precision.BF16, checkpoint)
    source = checkpoint.sources["vae"]
    module = loaded(part.module, lambda name: source.read(part.checkpoint_name(name)), torch.bfloat16)
    assert all(p.is_meta for p in part.module.parameters())
    inputs = decoder_cases(channels=32, ranges=RANGES)["wide"]
    narrow, fp32, fp64 = (run_module(module, part, inputs, wide)["images"] for wide in (None, torch.float32, torch.float64))
    assert (narrow.dtype, fp32.dtype, fp64.dtype) == ("float32", "float32", "float64")
    assert 0 < abs(fp32 - fp64).max() < 1e-4 < abs(narrow - fp64).max()
