"""The parity check's inputs are within what engines serve."""

import numpy as np
import pytest

from export.cases import text_projection_cases


@pytest.mark.parametrize(("embedded", "most"), [(False, 2), (True, 1)])
def test_a_text_projection_has_as_many_texts_as_its_model(embedded, most):
    """Sprint's engine, which serves one text an image, refused two."""
    rng = np.random.default_rng(0)
    embeds = {text: rng.normal(size=(2, 300, 8)).astype(np.float32) for text in ("prompt", "negative")}
    cases = text_projection_cases(embeds, embedded_guidance=embedded)
    shapes = {case: inputs["prompt_embeds"].shape for case, inputs in cases.items()}
    assert shapes == {"guided": (most, 2, 16, 8), "alone": (1, 1, 16, 8)}
    np.testing.assert_array_equal(cases["guided"]["prompt_embeds"][-1], embeds["prompt"][:, :16])
