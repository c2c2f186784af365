"""Compiled kernels are kept for the next start; whatever is wrong with the files, pictures are the same and nothing fails."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_tensorrt import MACHINE, FakeRuntimeCache, fake_backend
from hypothesis import given
from hypothesis import strategies as st

import runtime.trt_backend
from engines.bundle import Bundle
from engines.spec import COMPONENTS
from runtime import SanaEngine
from runtime.kernel_cache import KernelCache, kernel_folder

REQUEST = {"seed": 3, "steps": 4, "width": 96}
Draw = Callable[..., tuple[bytes, dict[str, int]]]


@pytest.fixture
def draw(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """A picture by a new engine, and how many kernels each component compiled for it."""

    def draw(kernel_cache: Path | bool, *, machine: dict[str, str] = MACHINE, **options) -> tuple[bytes, dict[str, int]]:
        changes = {name: options.pop(name) for name in ("width", "height") if name in options}
        monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", functools.partial(fake_backend, machine=machine))
        with SanaEngine(bundle, backend="tensorrt", kernel_cache=kernel_cache, **options) as engine:
            picture = engine.generate("a red apple", **(REQUEST | changes))[0].tobytes()
            graphs = engine._backend.engines  # type: ignore[union-attr]
            return picture, {name: sum(len(each.compiled) for each in graph.contexts) for name, graph in graphs.items()}

    return draw


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def total(compiled: dict[str, int]) -> int:
    return sum(compiled.values())


def test_the_next_start_compiles_nothing(draw: Draw, tmp_path: Path) -> None:
    plain, compiled = draw(False)
    assert all(compiled[name] for name in COMPONENTS)
    assert draw(tmp_path) == (plain, compiled)
    assert len(files(tmp_path)) == len(COMPONENTS)
    assert draw(tmp_path) == (plain, dict.fromkeys(COMPONENTS, 0))


def test_low_memory_keeps_the_text_encoders_kernels_too(draw: Draw, tmp_path: Path) -> None:
    plain, _ = draw(tmp_path, low_memory=True)
    assert draw(tmp_path, low_memory=True) == (plain, dict.fromkeys(COMPONENTS, 0))


def test_another_size_is_added(draw: Draw, tmp_path: Path) -> None:
    draw(tmp_path)
    _, compiled = draw(tmp_path, height=128)
    assert compiled["denoiser"] == compiled["decoder"] == 1
    assert compiled["text_encoder"] == 0
    for size in ({}, {"height": 128}):
        assert total(draw(tmp_path, **size)[1]) == 0


@pytest.mark.parametrize("what", MACHINE)
def test_another_machine_has_kernels_of_its_own(draw: Draw, tmp_path: Path, what: str) -> None:
    _, compiled = draw(tmp_path)
    assert draw(tmp_path, machine=MACHINE | {what: "another"})[1] == compiled
    assert total(draw(tmp_path)[1]) == 0


def test_files_are_written_when_kernels_are_new_and_only_then(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = KernelCache.write
    monkeypatch.setattr(KernelCache, "write", lambda self, key, content: (written.append(key), write(self, key, content)))
    draw(tmp_path)
    assert len(written) == len(set(written)) == len(COMPONENTS)
    draw(tmp_path)
    assert len(written) == len(COMPONENTS)


def test_kernels_are_there_after_the_picture_and_not_at_the_end_alone(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed keeps what it compiled. The third picture is captured, where the fakes refuse a serialization."""
    monkeypatch.setattr(runtime.trt_backend, "open_tensorrt", fake_backend)
    with SanaEngine(bundle, backend="tensorrt", kernel_cache=tmp_path) as engine:
        for number in range(3):
            engine.generate("a cat", **REQUEST)
            assert len(files(tmp_path)) == len(COMPONENTS), number
        assert engine._backend._cuda.graphs  # type: ignore[union-attr]
        before = {path: path.stat().st_ino for path in files(tmp_path)}
        engine.generate("a cat", **(REQUEST | {"height": 128}))
        changed = [path for path in files(tmp_path) if path.stat().st_ino != before[path]]
        assert len(changed) == 2  # the denoiser's and the decoder's: other sizes are other kernels


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "swapped", "large", "folder", "fifo", "refused"])
def test_a_bad_file_is_ignored_said_and_replaced(
    draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    plain, compiled = draw(tmp_path)
    for path, other in zip(files(tmp_path), [each.read_bytes() for each in files(tmp_path)[::-1]], strict=True):
        data = bytearray(path.read_bytes())
        if damage == "bit":
            data[-1] ^= 1
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage == "fifo":
            os.mkfifo(path)
        else:
            path.write_bytes({"cut": data[:-1], "empty": b"", "swapped": other}.get(damage, data))
    with monkeypatch.context() as patch:
        if damage == "large":
            patch.setitem(KernelCache.__init__.__kwdefaults__, "max_file", 40)
        if damage == "refused":
            patch.setattr(FakeRuntimeCache, "refuses", True)
        with caplog.at_level(logging.WARNING, logger="runtime"):
            assert draw(tmp_path) == (plain, compiled)
    assert len([record for record in caplog.records if "compiled again" in record.message]) >= len(COMPONENTS)
    if damage != "folder":  # which a file cannot replace
        assert total(draw(tmp_path)[1]) == 0


def test_a_folder_that_cannot_be_written_is_said_once(draw: Draw, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="runtime"):
        assert draw(tmp_path / "file" / "kernels") == draw(False)
    assert [record.message for record in caplog.records if "cannot be written" in record.message][1:] == []
    assert "the next start compiles kernels again" in caplog.text


def test_a_writer_that_died_leaves_nothing(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "new-0123abcd").mkdir()
    draw(tmp_path)
    assert all(path.suffix == ".kernels" for path in files(tmp_path))


def test_where_kernels_are_kept(draw: Draw, own_cache: Path, tmp_path: Path) -> None:
    assert kernel_folder(True) == own_cache / "kernels"
    assert kernel_folder(False) is None
    assert kernel_folder("there") == Path("there")
    draw(False)
    assert not own_cache.exists()
    draw(True)
    assert len(files(own_cache / "kernels")) == len(COMPONENTS)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, machine={}, max_total=3 * 132)
    for number, key in enumerate("abc"):
        cache.write(key, bytes(100))
        os.utime(cache.path(key), (number, number))
    assert cache.read("a") == bytes(100)  # used: "b" is the oldest now
    cache.write("d", bytes(100))
    assert [path.stem for path in files(tmp_path)] == ["a", "c", "d"]


def test_more_than_the_bound_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = KernelCache(tmp_path / "kernels", machine={}, max_file=131)
    cache.write("a", bytes(100))
    assert not (tmp_path / "kernels").exists()
    assert "got 132 bytes" in caplog.text


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[KernelCache, bytes]:
    cache = KernelCache(tmp_path_factory.mktemp("kernels"), machine={})
    cache.write("key", b"kernels of an engine")
    return cache, cache.path("key").read_bytes()


@given(data=st.data())
def test_no_change_of_a_file_reaches_tensorrt(one_file: tuple[KernelCache, bytes], data: st.DataObject) -> None:
    cache, good = one_file
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "any"]))
    at = data.draw(st.integers(0, len(good) - 1))
    bad = {
        "flip": good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :],
        "cut": good[:at],
        "more": good + data.draw(st.binary(min_size=1)),
        "any": data.draw(st.binary()),
    }[kind]
    cache.path("key").write_bytes(bad)
    assert cache.read("key") == (b"kernels of an engine" if bad == good else None)
