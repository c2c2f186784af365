"""Slots: device memory with a page-locked twin, on a fake GPU that does its work only when somebody waits."""

import numpy as np
from fake_tensorrt import FakeCuda

from runtime.cuda import Slot


def test_writing_again_does_not_change_what_was_queued_before() -> None:
    cuda = FakeCuda()
    slot, result = Slot(cuda), np.zeros(4, np.float32)  # type: ignore[arg-type]
    slot.write(np.arange(4, dtype=np.float32))
    cuda.to_host(result.ctypes.data, slot.address, result.nbytes)
    slot.write(np.full(4, 9, np.float32))
    cuda.synchronize()
    assert result.tolist() == [0, 1, 2, 3]
    assert slot.read(np.float32, (4,)).tolist() == [9, 9, 9, 9]


def test_grows_and_never_shrinks() -> None:
    cuda = FakeCuda()
    slot = Slot(cuda)  # type: ignore[arg-type]
    first = slot.reserve(1000)
    assert slot.reserve(10) == first
    slot.reserve(2000)
    assert [size for _, size in cuda.allocations.values()] == [2000]
    slot.close()
    slot.close()
    assert not cuda.allocations


def test_takes_arrays_that_are_not_contiguous() -> None:
    slot = Slot(FakeCuda())  # type: ignore[arg-type]
    array = np.arange(12, dtype=np.int64).reshape(3, 4).T
    slot.write(array)
    assert np.array_equal(slot.read(np.int64, (4, 3)), array)
