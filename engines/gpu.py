"""The GPU that is there, asked of the CUDA driver: no TensorRT, no PyTorch, no context made, no memory taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.errors import ArchitectureError, NoGpuError
from engines.spec import Target

__all__ = ["OLDEST", "DeviceInfo", "current_target", "device_info"]

OLDEST = (8, 0)  # compute capability: Ampere, the first with bf16
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceInfo:
    name: str  # "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int]  # (9, 0)
    memory_bytes: int
    driver_cuda: str  # the newest CUDA that the driver knows, "13.0"

    @property
    def sm(self) -> str:
        """The architecture as targets name it: "sm90"."""
        return "sm{}{}".format(*self.capability)


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _ask(call: str, *args: Any) -> Any:
    """What the driver's function `call` answers. Raises NoGpuError if it answers with an error."""
    driver = _driver()
    code, *values = getattr(driver, call)(*args)
    if int(code):
        name = driver.cuGetErrorName(code)[1]
        raise NoGpuError(
            f"{call}: got {name.decode() if name else int(code)} from the NVIDIA driver; expected success. "
            "nvidia-smi may say more; a driver that was updated under a running system needs a reboot."
        )
    return values[0] if values else None


def _find() -> DeviceInfo | str:
    """The first visible GPU, or why there is none. Raises NoGpuError if a driver is there and broken."""
    driver = _driver()
    try:
        code = int(driver.cuInit(0)[0])
    except RuntimeError as error:  # cuda-bindings looks for the library on its first call; it has no narrower type in common
        return (
            f"got no NVIDIA driver library ({error}); expected libcuda.so.1. "
            "Install an NVIDIA driver, or give the container access to the GPU (docker run --gpus all)."
        )
    if code != _NO_DEVICE:
        if code:
            _ask("cuInit", 0)
        if _ask("cuDeviceGetCount"):
            device, attribute = _ask("cuDeviceGet", 0), driver.CUdevice_attribute
            prefix, version = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_", int(_ask("cuDriverGetVersion"))
            major, minor = (
                int(_ask("cuDeviceGetAttribute", getattr(attribute, prefix + part), device)) for part in ("MAJOR", "MINOR")
            )
            return DeviceInfo(
                name=_ask("cuDeviceGetName", 128, device).split(b"\0")[0].decode(),
                capability=(major, minor),
                memory_bytes=int(_ask("cuDeviceTotalMem", device)),
                driver_cuda=f"{version // 1000}.{version % 1000 // 10}",
            )
    return (
        "got an NVIDIA driver and no GPU; expected at least one. "
        "Is CUDA_VISIBLE_DEVICES empty, or the GPU not passed on to the container?"
    )


def _checked(found: DeviceInfo) -> DeviceInfo:
    if found.capability < OLDEST:
        raise NoGpuError(
            f"got {found.name}, compute capability {found.capability[0]}.{found.capability[1]}; expected {OLDEST[0]}.{OLDEST[1]} "
            "or newer (Ampere: A100, RTX 30). This GPU is too old for bf16; use the onnxruntime back end."
        )
    return found


def device_info() -> DeviceInfo:
    """The first visible GPU. Raises NoGpuError, saying which: no driver, no device, a broken driver, a GPU too old."""
    found = _find()
    if isinstance(found, str):
        raise NoGpuError(found)
    return _checked(found)


def current_target() -> Target | None:
    """The architecture of the first visible GPU; None if there is no driver or no GPU.

    Raises NoGpuError if the driver is broken or the GPU too old, ArchitectureError if nothing is built for its architecture.
    """
    found = _find()
    if isinstance(found, str):
        return None
    sm = _checked(found).sm
    if sm not in set(Target):
        raise ArchitectureError(f"got {found.name}, {sm}; expected one of {', '.join(Target)}. Use the onnxruntime back end.")
    return Target(sm)
