"""From a bundle to pictures, without PyTorch.

`SanaEngine` loads on first use, so that `import runtime.noise` or `runtime.schedule` asks for NumPy alone.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.engine import SanaEngine

__all__ = ["SanaEngine"]


def __getattr__(name: str) -> object:
    if name == "SanaEngine":
        from runtime.engine import SanaEngine

        return SanaEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
