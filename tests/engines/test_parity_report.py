import math

import numpy as np
import pytest
from fakes import write_fake_bundle
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import BundleError, ManifestError, ParityError
from engines.golden import Golden, load_golden, save_golden
from engines.parity_report import Bound, ErrorStats, bound_from, check, measure, parse_report


def test_errors_are_relative_to_the_references_rms():
    reference = np.array([3.0, -3.0, 3.0, -3.0])
    got = measure(reference + np.array([0.3, 0.0, 0.0, -0.6]), reference)
    assert got.rms == pytest.approx(math.sqrt((0.09 + 0.36) / 4) / 3)
    assert got.max == pytest.approx(0.2)
    assert got.mean == pytest.approx(-0.075 / 3)


def test_the_bound_is_twice_pytorch():
    pytorch = ErrorStats(rms=1e-3, max=5e-3, mean=-1e-4)
    assert bound_from(pytorch) == Bound(rms=2e-3, max=1e-2, mean_share=0.25)


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ((2e-3, 1e-2, 5e-4), []),
        ((2e-3, 1e-2, -5e-4), []),
        ((0.0, 0.0, 0.0), []),
        ((2.1e-3, 1e-2, 0.0), ["rms error: got 2.100e-03; expected at most 2.000e-03"]),
        ((2e-3, 1.1e-2, 0.0), ["max error"]),
        ((1e-3, 1e-2, -3e-4), ["|mean| error: got 3.000e-04; expected at most 2.500e-04"]),  # small, but nearly all of it a bias
        ((1.0, 1.0, 1.0), ["rms", "max", "|mean|"]),
    ],
)
def test_check(measured, words):
    rms, largest, mean = measured
    found = check(ErrorStats(rms=rms, max=largest, mean=mean), Bound(rms=2e-3, max=1e-2))
    assert len(found) == len(words)
    assert all(sentence.startswith(word) for sentence, word in zip(found, words, strict=True))


@given(st.floats(1.001, 1e3), st.integers(0, 2**31))
def test_pytorchs_own_error_passes_and_a_larger_one_does_not(factor, seed):
    rng = np.random.default_rng(seed)
    reference, noise = rng.standard_normal((2, 1000))
    noise -= noise.mean()
    bound = bound_from(measure(reference + 1e-3 * noise, reference))
    assert not check(measure(reference + 2e-3 * noise * 0.999, reference), bound)
    assert check(measure(reference + 2e-3 * factor * noise, reference), bound)


def test_a_bias_cannot_hide():
    reference = np.random.default_rng(0).standard_normal(10_000)
    noise = np.random.default_rng(1).standard_normal(10_000)
    bound = bound_from(measure(reference + 1e-3 * noise, reference))
    assert not check(measure(reference + 1e-3 * noise, reference), bound)
    assert check(measure(reference + 1e-3 * noise + 5e-4, reference), bound)


@pytest.mark.parametrize(
    ("got", "reference", "words"),
    [
        (np.zeros(3), np.ones(4), r"shape \(3,\); expected \(4,\)"),
        (np.array([1.0, np.nan]), np.ones(2), "got 1 numbers that are not finite, of 2"),
        (np.array([1.0, np.inf]), np.ones(2), "not finite"),
        (np.ones(2), np.zeros(2), "zero everywhere"),
        (np.ones(0), np.ones(0), "empty"),
    ],
)
def test_what_cannot_be_measured(got, reference, words):
    with pytest.raises(ParityError, match=words):
        measure(got, reference)


def test_a_report_round_trips_and_refuses_unknown_keys(tmp_path):
    bundle = write_fake_bundle(tmp_path / "b")
    data = bundle.file("parity.json").read_bytes()
    report = parse_report(data, source="parity.json")
    assert parse_report(report.model_dump_json().encode(), source="again") == report
    wrong = data.replace(b'"mean_share"', b'"mean_chare"', 1)
    with pytest.raises(ManifestError, match=r"bound\.mean_chare: unknown key; did you mean 'mean_share'\?"):
        parse_report(wrong, source="parity.json")


def test_golden_files_round_trip(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    cases = {
        "small": Golden(inputs={"x": x, "ids": np.arange(3)}, outputs={"y": x[:, ::2]}),
        "batch-2": Golden(inputs={"x": x}, outputs={"y": x.T}),
    }
    save_golden(tmp_path / "g", cases)
    again = load_golden(tmp_path / "g")
    assert set(again) == set(cases)
    for name, golden in cases.items():
        for kind in ("inputs", "outputs"):
            want, got = getattr(golden, kind), getattr(again[name], kind)
            assert set(want) == set(got)
            for key in want:
                assert want[key].dtype == got[key].dtype
                np.testing.assert_array_equal(want[key], got[key])


def test_golden_inputs_in_fp16_are_fp32_again(tmp_path):
    x = np.array([1.5, -65504, 6e-8], np.float16)
    save_golden(tmp_path / "g", {"a": Golden(inputs={"x": x}, outputs={"y": x})})
    golden = load_golden(tmp_path / "g")["a"]
    assert (golden.inputs["x"].dtype, golden.outputs["y"].dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(golden.inputs["x"], x)


def test_bad_golden_files(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "text").write_bytes(b"not safetensors")
    with pytest.raises(BundleError, match="not a safetensors file"):
        load_golden(tmp_path / "text")
    save_file({"x": np.zeros(1)}, tmp_path / "names")
    with pytest.raises(BundleError, match="got the tensor 'x'"):
        load_golden(tmp_path / "names")
    save_file({"a/input/x": np.zeros(1)}, tmp_path / "half")
    with pytest.raises(BundleError, match="the case 'a' without inputs or outputs"):
        load_golden(tmp_path / "half")
    save_file({}, tmp_path / "empty")
    with pytest.raises(BundleError, match="got no cases"):
        load_golden(tmp_path / "empty")
    with pytest.raises(ValueError, match="tensor name"):
        save_golden(tmp_path / "x", {"a case": Golden(inputs={}, outputs={"y": np.zeros(1)})})
