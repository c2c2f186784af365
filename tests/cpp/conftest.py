from collections.abc import Callable
from pathlib import Path

import cpp_build
import pytest

Ask = Callable[..., list[tuple[str, bytes]]]


@pytest.fixture(scope="session")
def ask(cpp: Path) -> Ask:
    return lambda requests: cpp_build.ask(cpp / "sana_check", requests)
