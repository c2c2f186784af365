"""The quality section: what is refused, and that its page is a function of it that lets nothing of a prompt through as HTML."""

import pytest
from pydantic import ValidationError

from engines.errors import ManifestError
from engines.parity_report import ParityReport, parse_report
from engines.quality_report import Against, Estimate, PictureRow, QualityReport, SceneScores, page

ESTIMATE = Estimate(mean=1.0, low=0.5, high=1.5)


def section(prompt: str = "a cat", **more: object) -> QualityReport:
    names = ("000-first.png", "000-second.png", "000-difference.png")
    row = PictureRow(prompt=prompt, seed=3, psnr_db=30.0, ssim=0.9, lpips=0.01, pictures=names)
    against = Against(kind="bundle", name="fp16", digest="a" * 64)
    fields = {"against": against, "name": "nvfp4", "backend": "x", "prompts": 2, "seeds": 1, "amplified": 8, "rows": (row,)}
    return QualityReport(**fields | {"psnr_db": ESTIMATE, "ssim": ESTIMATE, "lpips": ESTIMATE} | more)


def parity(**more: object) -> ParityReport:
    return ParityReport(reference="fp32 PyTorch", components={}, machine="x", versions={}, **more)


def test_reports_with_and_without_it_are_read():
    for report in (parity(), parity(schema_version=2, quality=section())):
        assert parse_report(report.model_dump_json().encode(), source="the test") == report
    old = b'{"schema_version": 1, "reference": "fp32 PyTorch", "components": {}, "machine": "x", "versions": {}}'
    assert parse_report(old, source="the test").quality is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"schema_version":2', b'"schema_version":1', "got 1 with a quality section; expected 2"),
        (b'"low":0.5', b'"low":2.5', "expected the lower end first"),
        (b"000-first.png", b"../../evil.png", "pattern"),
        (b'"prompts":2', b'"prompts":0', "prompts"),
        (b'"mean":1.0', b'"mean":NaN', "finite"),
        (b'"amplified"', b'"amplifed"', "did you mean 'amplified'"),
    ],
)
def test_what_is_refused(old, new, message):
    data = parity(schema_version=2, quality=section()).model_dump_json().encode()
    assert old in data
    with pytest.raises(ManifestError, match=message):
        parse_report(data.replace(old, new, 1), source="the test")


def test_an_estimate_is_ordered():
    with pytest.raises(ValidationError, match="lower end first"):
        Estimate(mean=0.0, low=1.0, high=0.0)


def test_the_page_shows_all_and_lets_no_markup_through():
    scores = SceneScores(judge="b" * 64, first=ESTIMATE, second=ESTIMATE, points_lost=ESTIMATE)
    text = page(section("<script>alert(1)</script>\"'", scores=scores))
    assert "<script" not in text
    assert "fp16 | nvfp4 | difference x 8" in text
    for words in ("points lost 1.00 (95 %: 0.50 to 1.50)", "000-difference.png", "LPIPS 0.01000", "PSNR 30.00 dB"):
        assert words in text
    assert text == page(section("<script>alert(1)</script>\"'", scores=scores))
