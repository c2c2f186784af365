"""The history's file: appended, read, accepted; and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from latency_records import record

from benchmarks.latency_history import History
from engines.errors import ManifestError, RequestError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    history = History(tmp_path / "history")
    assert history.read() == []
    first, second = record(run="0" * 12), record(run="1" * 12, date="2026-01-03T00:00:00+00:00", model="Sana/1.6B")
    history.append([second, first])
    assert history.read() == [first, second]
    assert {path.name for path in (tmp_path / "history").iterdir()} == {"sana-tiny.jsonl", "Sana-1.6B.jsonl"}


def test_the_last_accepted_of_the_same_key(tmp_path: Path) -> None:
    history = History(tmp_path)
    old, new = (record(run=str(n) * 12, accepted=True, date=f"2026-01-0{n}") for n in (1, 2))
    other = record(run="3" * 12, accepted=True, date="2026-01-03", batch=2)
    later = record(run="4" * 12, date="2026-01-04", bundle="cd" * 32, commit="fedcba987654")  # bundle and commit may change
    history.append([old, new, other, later])
    assert later.key == new.key != other.key
    with_peer = record(peers={"diffusers_eager": 3.0})
    assert with_peer.key != new.key  # what runs in between counts
    assert with_peer.model_copy(update={"turns": "each first"}).key != with_peer.key  # and where each of several has its turn
    assert new.model_copy(update={"turns": "each first"}).key == new.key
    assert history.last_accepted(later.key) == new
    assert history.last_accepted(with_peer.key) is None
    assert history.last_of_work(with_peer.work) == new
    assert history.last_of_work(other.model_copy(update={"batch": 3}).work) is None


def test_of_a_machine_what_the_work_needs_counts() -> None:
    """A component on a GPU waits for no processor, a picture does."""
    hosts = ("NVIDIA H200, 16 x CPU", "NVIDIA H200, 32 x CPU")
    for component, backend, same in (
        ("denoiser", "tensorrt", True),
        ("picture", "tensorrt", False),
        ("denoiser", "onnxruntime", False),
    ):
        here, there = (record(component=component, backend=backend, machine=machine).key for machine in hosts)
        assert (here == there) is same
    with_peers = [record(backend="tensorrt", machine=machine, peers={"diffusers_eager": 3.0}) for machine in hosts]
    assert with_peers[0].key != with_peers[1].key  # they wait for it
    assert with_peers[0].work == with_peers[1].work
    other = record(backend="tensorrt", machine="NVIDIA L4, 16 x CPU")
    assert other.key != record(backend="tensorrt", machine=hosts[0]).key


def test_a_run_is_accepted_afterwards(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.append([record(run="1" * 12), record(run="1" * 12, component="decoder"), record(run="2" * 12)])
    assert history.accept("1" * 12) == 2
    assert [(each.run[0], each.accepted) for each in history.read()] == [("1", True), ("1", True), ("2", False)]
    with pytest.raises(RequestError, match=r"got run 'nothing'; the latest in .* are 111111111111, 222222222222"):
        history.accept("nothing")


def test_a_line_whose_end_an_editor_took_stays_a_line(tmp_path: Path) -> None:
    history, first, second = History(tmp_path), record(run="1" * 12), record(run="2" * 12)
    history.append([first])
    path = tmp_path / "sana-tiny.jsonl"
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    history.append([second])
    assert history.read() == [first, second]


def test_several_programs_append_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: History(tmp_path).append([record(run=f"{n:012x}")]), range(24)))
    assert len({each.run for each in History(tmp_path).read()}) == 24


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"schema_version": 1', "ends too early"),
        (record().model_dump_json().replace('"batch"', '"bach"'), "bach"),
        (record().model_dump_json().replace('"p50":20.0', '"p50":-1'), "p50"),
        ('"\xff', "Remove it, or restore the file"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    history = History(tmp_path)
    history.append([record()])
    with open(tmp_path / "sana-tiny.jsonl", "a", encoding="utf-8") as sink:
        sink.write(line + "\n")
    with pytest.raises(ManifestError, match=rf"sana-tiny\.jsonl:2.*(?s:.*){why}"):
        history.read()


def test_titles() -> None:
    assert record().title == "sana-tiny denoiser, fp16, 512 x 512 px, batch 1, onnxruntime"
    assert record(component="text_encoder", width=0, height=0).title == "sana-tiny text_encoder, fp16, batch 1, onnxruntime"
    text = record(component="text_encoder", width=300, height=0, batch=2)
    assert text.title == "sana-tiny text_encoder, fp16, 300 tokens, batch 2, onnxruntime"
    assert "picture, 20 steps" in record(component="picture", steps=20).title
