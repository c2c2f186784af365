"""Kernels that may start before the one before them has ended: they wait themselves, first of all, and compute the same."""

import re
import subprocess

import pytest
import torch
import triton

from engines.tensorrt import current_target
from plugins import cross_attention, cubin, fp8_quantize, gated_depthwise_conv, gated_sum, modulated_norm, qkv_linear_attention
from plugins.launch import Launch
from plugins.work import KernelWork

NORM = modulated_norm.Variant(dim=1152, rows=(0, 1, 5), time_rows=6, gate_time_rows=6)
STATE, APPLY = qkv_linear_attention.STATE, qkv_linear_attention.APPLY
KERNELS = {
    "gate": lambda capability: gated_depthwise_conv.compile_cubin(capability, "fp16", 2240),
    "state": lambda capability: qkv_linear_attention.compile_cubin(STATE, capability, "fp16", 32, False),
    "apply": lambda capability: qkv_linear_attention.compile_cubin(APPLY, capability, "fp16", 32, False),
    "cross": lambda capability: cross_attention.compile_cubin(capability, "fp16", 300, 112),
    "norm": lambda capability: modulated_norm.compile_cubin(capability, "fp16", NORM),
}
FP8 = {  # of SM 89 and later alone
    "sum": lambda capability: gated_sum.compile_cubin(capability, 1152, 2, 6),
    "quantize": lambda capability: fp8_quantize.compile_cubin(capability, "fp16", 1152),
}
GLOBAL = re.compile(r"\b(LD|ST|LDG|STG|LDGSTS|RED|REDG|ATOM|ATOMG|UTMALDG|UBLKCP)\b")  # what may reach global memory


@pytest.mark.parametrize("name", KERNELS)
def test_from_sm90_on(name):
    found = {capability: KERNELS[name](capability).waits for capability in (80, 86, 89, 90, 100, 120)}
    assert found == {80: False, 86: False, 89: False, 90: True, 100: True, 120: True}


@pytest.mark.parametrize("name", FP8)
def test_from_sm90_on_of_fp8(name):
    assert {capability: FP8[name](capability).waits for capability in (89, 90, 120)} == {89: False, 90: True, 120: True}


@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("name", [*KERNELS, *FP8])
def test_nothing_comes_before(tmp_path, name, capability):
    """Also after ptxas has put the instructions into its own order. ACQBULK is griddepcontrol.wait.

    On SM 100, a block takes its tensor memory before it waits, in branches; none leads past the wait.
    """
    path = tmp_path / "kernel.cubin"
    path.write_bytes((KERNELS | FP8)[name](capability).code)
    disassembler = triton.knobs.nvidia.nvdisasm.path
    text = subprocess.run([disassembler, path], capture_output=True, text=True, check=True).stdout
    assert text.count("ACQBULK") == 1
    before, after = text[text.index("\n.text.") :].split("ACQBULK")
    assert not GLOBAL.search(before)
    assert GLOBAL.search(after)
    targets = set(re.findall(r"BRA\S* .*`\((\S+)\)", before))
    assert targets <= set(re.findall(r"^(\S+):", before, re.MULTILINE))


def test_a_kernel_without_the_parameter_does_not_wait():
    from plugins import relu_linear_attention

    assert not relu_linear_attention.compile_cubin(90, "fp16", 32).waits


def test_a_wait_that_is_not_first(monkeypatch):
    """In PTX that reads before it."""
    compiled = triton.compile

    def late(*args, **options):
        found = compiled(*args, **options)
        before, wait, after = found.asm["ptx"].partition("griddepcontrol.wait")
        found.asm["ptx"] = before + "ld.global.b32 %r1, [%rd1];\n" + wait + after
        return found

    monkeypatch.setattr(cubin.triton, "compile", late)
    with pytest.raises(RuntimeError, match=r"before griddepcontrol\.wait; expected it to begin so"):
        gated_depthwise_conv.compile_cubin.__wrapped__(90, "fp16", 2240)


@pytest.mark.gpu
@pytest.mark.skipif(current_target() is None, reason="needs a CUDA GPU")
def test_a_chain_in_a_graph():
    """Each launch reads what the one before it wrote, into memory that a memset in the graph has just made NaN."""
    from cuda.bindings import driver

    heads, n_keys, head_dim, tokens, steps = 20, 300, 112, 1024, 24
    attributes = cross_attention.compile_cubins([current_target()], "fp16", heads=heads, n_keys=n_keys, head_dim=head_dim, block=0)
    launch = Launch.from_json(attributes["launch"])
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": torch.float16}
    keys, values = (torch.randn(1, 1, 1, heads, n_keys, head_dim, generator=generator, **options) for _ in range(2))
    bias = torch.zeros(1, n_keys, **options)
    first = torch.randn(1, tokens, heads * head_dim, generator=generator, **options)
    chain = torch.empty(steps, *first.shape, **options)
    torch.cuda.synchronize()
    work = KernelWork(launch, attributes["cubins"])
    work.prepare([tuple(tensor.shape) for tensor in (first, keys, values, bias)])

    def queue(step, stream):
        q = chain[step - 1] if step else first
        addresses = [tensor.data_ptr() for tensor in (q, keys, values, bias)]
        work.queue(addresses, [chain[step].data_ptr()], 0, stream)

    for step in range(steps):
        queue(step, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    expected = chain.clone()
    assert expected.isfinite().all()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        size = chain.numel() * chain.element_size()
        assert driver.cuMemsetD8Async(chain.data_ptr(), 0xFF, size, stream) == (driver.CUresult.CUDA_SUCCESS,)  # 0xFFFF is NaN
        for step in range(steps):
            queue(step, stream)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(chain, expected)
