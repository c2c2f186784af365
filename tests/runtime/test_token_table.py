"""A table of tokens on the host: rows are the file's numbers, and pictures those of the same table in the graph."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fake_tensorrt import fake_backend
from fakes import HOST_TABLE, fake_inputs, save_fake_table, write_fake_bundle
from hypothesis import given
from hypothesis import strategies as st

import runtime.trt_backend
from engines.bundle import Bundle
from engines.errors import BundleError, DigestError
from engines.spec import Precision, Target
from engines.token_table import TABLE_NAME
from runtime import SanaEngine
from runtime.token_table import TokenTable

BACKENDS = ("onnxruntime", "tensorrt")
REQUEST = {"seed": 3, "steps": 3, "width": 64, "negative_prompts": "blue"}
TYPES = {Precision.FP32: np.float32, Precision.FP16: np.float16, Precision.BF16: ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """As the fixture `bundle`, but for the place of its table."""
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "host", targets=[Target.SM89], **HOST_TABLE)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", fake_backend)


@pytest.mark.parametrize("precision", TYPES)
def test_rows_are_the_files_numbers(tmp_path: Path, precision: Precision) -> None:
    table = np.random.default_rng(0).standard_normal((300, 48)).astype(TYPES[precision])
    save_fake_table(tmp_path / "t", table)
    rows = TokenTable(tmp_path / "t", rows=300, channels=48, precision=precision)
    ids = np.array([[0, 299, 7, 7], [1, 0, 298, 299]])
    got = rows.rows(ids)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, table[ids].astype(np.float32))
    bits = rows.rows(ids, bits=True)
    assert bits.dtype == (np.uint16 if precision is Precision.BF16 else np.float32)
    np.testing.assert_array_equal(bits.view(ml_dtypes.bfloat16) if bits.dtype == np.uint16 else bits, table[ids])
    assert rows.rows(ids[:, :0]).shape == (2, 0, 48)


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 9), min_size=1, max_size=8))
def test_ids_that_are_no_rows(tmp_path_factory: pytest.TempPathFactory, values: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "eight"
    save_fake_table(path, np.arange(32, dtype=np.float32).reshape(8, 4))
    table = TokenTable(path, rows=8, channels=4, precision=Precision.FP32)
    outside = [value for value in values if not 0 <= value < 8]
    ids = np.array([values], np.int64)
    if not outside:
        assert table.rows(ids)[0, :, 0].tolist() == [4 * value for value in values]
        return
    with pytest.raises(BundleError, match=rf"got the token {outside[0]}; expected 0 to 7, the rows of the table\. The tokenizer"):
        table.rows(ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_same_pictures(bundle: Bundle, on_host: Bundle, backend: str, low_memory: bool) -> None:
    prompts = ["a red apple", "a cat", "", "a red apple"]
    options = {"backend": backend, "low_memory": low_memory}
    with SanaEngine(bundle, **options) as inside, SanaEngine(on_host, **options) as beside:
        for _ in range(2):  # the second time, on the GPU, as a CUDA graph
            expected, got = inside.generate(prompts, **REQUEST), beside.generate(prompts, **REQUEST)
            assert [each.tobytes() for each in got] == [each.tobytes() for each in expected]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_session_by_hand_takes_ids(bundle: Bundle, on_host: Bundle, backend: str) -> None:
    inputs = fake_inputs("text_encoder", batch=3)
    with SanaEngine(bundle, backend=backend) as inside, SanaEngine(on_host, backend=backend) as beside:
        with inside.session("text_encoder") as plain, beside.session("text_encoder") as looking_up:
            expected = plain.run(inputs)["prompt_embeds"]
            np.testing.assert_array_equal(looking_up.run(inputs)["prompt_embeds"], expected)
            with pytest.raises(BundleError, match="got the token 64; expected 0 to 63"):
                looking_up.run(inputs | {"input_ids": inputs["input_ids"] * 0 + 64})
            for dtype in (np.float32, np.bool_):
                with pytest.raises(BundleError, match=f"got token ids of {np.dtype(dtype)}; expected integers"):
                    looking_up.run(inputs | {"input_ids": inputs["input_ids"].astype(dtype)})
            rows = looking_up._table.looked_up(inputs)  # type: ignore[attr-defined]
            np.testing.assert_array_equal(looking_up.run(rows)["prompt_embeds"], expected)


def test_what_the_gpu_gets(on_host: Bundle) -> None:
    """16 bits for each channel of each token, and no table."""
    inputs = fake_inputs("text_encoder")
    with SanaEngine(on_host, backend="tensorrt") as engine, engine.session("text_encoder") as session:
        session.run(inputs)
        assert session.inputs == ("inputs_embeds", "attention_mask")  # type: ignore[attr-defined]
        assert session._slots["inputs_embeds"]._size == 2 * inputs["input_ids"].size * 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_compared_before_it_is_used(on_host: Bundle, tmp_path: Path, backend: str) -> None:
    folder = Path(shutil.copytree(on_host.path, tmp_path / "b"))
    with SanaEngine(folder, backend=backend) as engine:
        assert TABLE_NAME in engine._backend.files()  # type: ignore[union-attr]
    data = bytearray((folder / TABLE_NAME).read_bytes())
    data[-1] ^= 1
    (folder / TABLE_NAME).write_bytes(data)
    with pytest.raises(DigestError, match=r"token_table\.safetensors was changed"):
        SanaEngine(folder, backend=backend)
