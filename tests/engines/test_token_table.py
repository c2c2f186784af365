"""A table of tokens on the host is what the manifest says, or the bundle does not open; and no bytes make it read past its file."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from fakes import HALVES, HOST_TABLE, WRONG_TABLES, save_fake_table, with_table, write_fake_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bundle import Bundle
from engines.errors import BundleError
from engines.spec import Precision
from engines.token_table import TABLE_NAME, table_offset


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "b", **HOST_TABLE).path


def test_a_good_one(pristine):
    bundle = Bundle.open(pristine)
    assert bundle.manifest.files[TABLE_NAME].role == "weights"
    assert (bundle.manifest.schema_version, bundle.manifest.token_table_rows) == (3, 64)
    path = bundle.file(TABLE_NAME)
    begin = table_offset(path, rows=64, channels=6, precision=Precision.BF16)
    assert path.stat().st_size == begin + 2 * 64 * 6


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_one(pristine, tmp_path, name):
    write, words = WRONG_TABLES[name]
    folder = with_table(pristine, tmp_path / "b", write)
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(folder, verify=False)
    assert str(folder / TABLE_NAME) in str(caught.value)


def test_precisions(tmp_path):
    for precision, table in ((Precision.FP32, HALVES.astype(np.float32)), (Precision.FP16, HALVES)):
        save_fake_table(tmp_path / "t", table)
        assert table_offset(tmp_path / "t", rows=64, channels=6, precision=precision) > 8
    with pytest.raises(BundleError, match="got a table of tokens of precision int8; expected fp32, fp16, bf16"):
        table_offset(tmp_path / "t", rows=64, channels=6, precision=Precision.INT8)


@settings(max_examples=200)
@given(at=st.integers(0, 99), inserted=st.binary(max_size=3), removed=st.integers(0, 3))
def test_damaged_bytes(tmp_path_factory, at, inserted, removed):
    """Read as they are, or refused; what is read lies inside the file."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    save_fake_table(path, HALVES)
    data = path.read_bytes()
    path.write_bytes(data[:at] + inserted + data[at + removed :])
    with contextlib.suppress(BundleError):
        assert table_offset(path, rows=64, channels=6, precision=Precision.FP16) + HALVES.nbytes <= path.stat().st_size
