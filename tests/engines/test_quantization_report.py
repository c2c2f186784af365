"""denoiser/quantization.json: what it says, and what is refused."""

import pytest

from engines.errors import ManifestError
from engines.quantization_report import QuantizationReport, parse_quantization
from engines.spec import Precision


def report(**changes: object) -> QuantizationReport:
    fields: dict[str, object] = {
        "method": "calibration",
        "recipe": "mine",
        "formats": {"a": Precision.NVFP4, "b": Precision.NVFP4, "c": "none"},
        "prompts": 16,
        "budget": "lpips<=0.08",
        "measured": {"lpips": 0.0625, "size": 0.5},
    }
    return QuantizationReport(**(fields | changes))


def test_it_is_read_as_it_was_written_and_says_it_in_words():
    for each in (report(), report(method="dynamic", recipe=None, prompts=None, budget=None, measured={})):
        assert parse_quantization(each.model_dump_json().encode(), source="the test") == each
    assert report().lines() == [
        "of 3 groups of layers 2 nvfp4, 1 fp16; calibrated by the recipe mine on 16 prompts",
        "chosen for the budget lpips<=0.08; simulated: lpips 0.0625, size 0.5",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"schema_version":1', b'"schema_version":2', "schema_version"),
        (b'"calibration"', b'"plan"', "expected a recipe and a number of prompts with calibration alone"),
        (b'"prompts":16', b'"prompts":0', "prompts"),
        (b'"nvfp4"', b'"nvfp5"', "nvfp5"),
        (b"0.0625", b"NaN", "finite"),
        (b'"budget"', b'"budgett"', "did you mean 'budget'"),
        (b'"a":"nvfp4",', b'"a":"nvfp4","a":"none",', "there twice"),
    ],
)
def test_what_is_refused(old, new, message):
    data = report().model_dump_json().encode()
    assert old in data
    with pytest.raises(ManifestError, match=message):
        parse_quantization(data.replace(old, new, 1), source="the test")
