"""Launch plans of kernels, timed."""

import inspect
import json

import pytest
import torch
import triton

from benchmarks import kernel_plans
from engines.errors import RequestError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernels", "conv3x3,modulated"], "got modulated; did you mean 'modulated_norm'?"),
        (["--jobs", "0"], "--jobs: got 0; expected 1 or more"),
        ([], "got no GPU; expected one"),
    ],
)
def test_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernel_plans.py", *arguments])
    with pytest.raises(SystemExit):
        kernel_plans.main()
    assert message in capsys.readouterr().err


def test_a_call_goes_on_behind_what_was_measured(monkeypatch, tmp_path):
    out, measured, stop = tmp_path / "plans.json", [], {"second"}

    def measure_one(case):
        if case.name in stop:
            raise KeyboardInterrupt
        measured.append(case.name)
        return {"kernel": case.name, "source": {}, "peers": {}, "plans": []}

    def cases():
        for name in ("first", "second"):
            yield kernel_plans.Case(name, [], lambda plan: lambda: None, {})

    monkeypatch.setattr(kernel_plans, "measured", measure_one)
    monkeypatch.setattr(kernel_plans, "CASES", {"kernel": cases})
    monkeypatch.setattr(kernel_plans, "commit", lambda: "one")
    with pytest.raises(KeyboardInterrupt):
        kernel_plans.measure(["kernel"], out)
    stop.clear()
    kernel_plans.measure(["kernel"], out)
    assert measured == ["first", "second"]
    assert [row["kernel"] for row in json.loads(out.read_text())["kernels"]] == ["first", "second"]
    monkeypatch.setattr(kernel_plans, "commit", lambda: "another")
    kernel_plans.measure(["kernel"], out)
    assert measured == 2 * ["first", "second"]


def test_kernels_that_are_not_asked_for_are_not_lost(monkeypatch, tmp_path):
    out = tmp_path / "plans.json"
    row = {"source": {}, "peers": {}, "plans": []}
    monkeypatch.setattr(kernel_plans, "measured", lambda case: {"kernel": case.name, **row})
    case = kernel_plans.Case("first", [], lambda plan: lambda: None, {})
    monkeypatch.setattr(kernel_plans, "CASES", {"kernel": lambda: [case], "other": lambda: []})
    monkeypatch.setattr(kernel_plans, "commit", lambda: "one")
    kernel_plans.measure(["kernel", "other"], out)
    before = out.read_bytes()
    monkeypatch.setattr(kernel_plans, "commit", lambda: "another")
    with pytest.raises(RequestError, match="of commit one; expected a new file, or --kernels with other too"):
        kernel_plans.measure(["kernel"], out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("commit", ["one+changes", "unknown"])
def test_what_is_not_of_a_commit_is_measured_anew(monkeypatch, tmp_path, commit):
    measured = []
    monkeypatch.setattr(kernel_plans, "commit", lambda: commit)
    monkeypatch.setattr(kernel_plans, "CASES", {"kernel": lambda: [kernel_plans.Case("first", [], lambda plan: lambda: None, {})]})
    monkeypatch.setattr(
        kernel_plans,
        "measured",
        lambda case: measured.append(case.name) or {"kernel": case.name, "source": {}, "peers": {}, "plans": []},
    )
    for _ in range(2):
        kernel_plans.measure(["kernel"], tmp_path / "plans.json")
    assert measured == ["first", "first"]


def test_shares_are_all_plans(monkeypatch):
    plans, compiled = [{"rows": rows} for rows in range(7)], []

    def cases():
        yield kernel_plans.Case("one", plans[:-1], lambda plan: lambda: compiled.append(plan), plans[-1])

    monkeypatch.setattr(kernel_plans, "CASES", {"kernel": cases})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for share in range(3):
        kernel_plans.compile_share(["kernel"], share, 3)
    assert sorted(compiled, key=plans.index) == plans


OPTIONS = {"num_warps", "num_stages", "maxnreg"}  # Triton's own


class Launched:
    """In the place of a kernel: its parameters are filled, the grid has programs."""

    def __init__(self, kernel):
        self.signature, self.count = inspect.signature(kernel.fn), 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            bound = self.signature.bind(*arguments, **{key: value for key, value in options.items() if key not in OPTIONS})
            assert list(bound.arguments) == list(self.signature.parameters)
            assert all(isinstance(programs, int) and programs > 0 for programs in grid)
            self.count += 1

        return launch


@pytest.mark.parametrize("kernel", kernel_plans.CASES)
@pytest.mark.usefixtures("on_meta")
def test_plans_fit_their_kernels(monkeypatch, kernel):
    """Every plan, and the source's own, on tensors without memory."""
    files = (kernel_plans.denoiser_cases, kernel_plans.decoder_cases, kernel_plans.text_cases)
    (cases,) = (each for each in files if kernel in each.CASES)
    launched = {}
    for module in [value for value in vars(cases).values() if inspect.ismodule(value) and value.__name__.startswith("plugins.")]:
        for name, value in [*vars(module).items()]:
            if isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, name, launched.setdefault(id(value), Launched(value)))
    names, plans = [], 0
    for case in kernel_plans.CASES[kernel]():
        assert case.source in case.plans  # else the source's would be measured, and its neighbours not
        names.append(case.name)
        for plan in [*case.plans, case.source]:
            assert set(plan) == set(case.source)
            case.launch(plan)()
            plans += 1
    assert sum(each.count for each in launched.values()) == plans
    assert len(set(names)) == len(names)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kernel", kernel_plans.CASES)
def test_the_source_is_among_the_plans(monkeypatch, tmp_path, kernel):
    out = tmp_path / "plans.json"
    monkeypatch.setattr("sys.argv", ["kernel_plans.py", "--kernels", kernel, "--out", str(out)])
    assert kernel_plans.main() == 0
    for found in json.loads(out.read_text())["kernels"]:
        assert found["source"] in found["plans"]
        assert all(row["ms"] > 0 for row in found["plans"])
