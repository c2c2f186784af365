"""For tests that calibrate: a module has its own `folder`, a checkpoint."""

from pathlib import Path

import pytest

from engines.store import Store
from sana_ref.pipeline import SanaReference


@pytest.fixture(scope="module")
def reference(folder: Path) -> SanaReference:
    return SanaReference(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))
