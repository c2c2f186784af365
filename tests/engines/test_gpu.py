"""What is said of the GPU, with a driver that answers as asked."""

from types import SimpleNamespace

import pytest

from engines import gpu
from engines.errors import ArchitectureError, NoGpuError
from engines.spec import Target


class Driver:
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )

    def __init__(self, *, init=0, count=1, capability=(8, 9)):
        self.init, self.count, self.capability = init, count, capability

    def cuInit(self, flags):
        if isinstance(self.init, Exception):
            raise self.init
        return (self.init,)

    def cuDeviceGetCount(self):
        return 0, self.count

    def cuDeviceGet(self, index):
        return 0, index

    def cuDriverGetVersion(self):
        return 0, 13010

    def cuDeviceGetAttribute(self, which, device):
        return 0, self.capability[("major", "minor").index(which)]

    def cuDeviceGetName(self, length, device):
        return 0, b"NVIDIA Example" + b"\0" * (length - 14)

    def cuDeviceTotalMem(self, device):
        return 0, 8 << 30

    def cuGetErrorName(self, code):
        return 0, b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"


@pytest.fixture
def answers(monkeypatch):
    return lambda **answers: monkeypatch.setattr(gpu, "_driver", lambda: Driver(**answers))


def test_a_gpu(answers):
    answers()
    info = gpu.device_info()
    assert info == gpu.DeviceInfo(name="NVIDIA Example", capability=(8, 9), memory_bytes=8 << 30, driver_cuda="13.1")
    assert (info.sm, gpu.current_target()) == ("sm89", Target.SM89)


NONE = {
    "no driver library": (
        {"init": RuntimeError("Failed to dlopen libcuda.so.1")},
        "got no NVIDIA driver library .*Install",
    ),
    "no device": ({"init": 100}, "got an NVIDIA driver and no GPU.*CUDA_VISIBLE_DEVICES"),
    "count of zero": ({"count": 0}, "got an NVIDIA driver and no GPU"),
}


@pytest.mark.parametrize(("state", "message"), NONE.values(), ids=NONE)
def test_no_gpu(answers, state, message):
    answers(**state)
    assert gpu.current_target() is None
    with pytest.raises(NoGpuError, match=message):
        gpu.device_info()


BROKEN = {
    "driver of another version": ({"init": 803}, "cuInit: got CUDA_ERROR_SYSTEM_DRIVER_MISMATCH from the NVIDIA driver"),
    "GPU too old": ({"capability": (7, 5)}, r"got NVIDIA Example, compute capability 7\.5; expected 8\.0 or newer.*too old"),
}


@pytest.mark.parametrize(("state", "message"), BROKEN.values(), ids=BROKEN)
def test_a_gpu_that_is_of_no_use_is_not_taken_for_none(answers, state, message):
    answers(**state)
    for ask in (gpu.device_info, gpu.current_target):
        with pytest.raises(NoGpuError, match=message):
            ask()


def test_an_architecture_that_nothing_is_built_for(answers):
    answers(capability=(8, 7))
    assert gpu.device_info().sm == "sm87"
    with pytest.raises(ArchitectureError, match="got NVIDIA Example, sm87; expected one of sm80, "):
        gpu.current_target()
