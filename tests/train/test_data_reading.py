"""Batches out of shards: what safetensors' own reader gives, with few files open, from several threads, and from damaged files."""

import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from data_sets import FakeEncoders, sample_files, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train.data import reading
from train.data.cache import Writer
from train.data.errors import DataError
from train.data.reading import Cache
from train.data.settings import DataSettings
from train.data.source import find
from train.data.stream import CachedSource

NUM = 12


def make(folder, shard_size=2, encoders=None):
    settings = DataSettings.checked(path=write_folder(folder / "data", sample_files(NUM)), resolution=512, shard_size=shard_size)
    return Writer(find(settings), encoders or FakeEncoders(), settings, folder).write()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make(tmp_path_factory.mktemp("cache"))


def read(opened, sample, number=0):
    return opened.batch([sample], length=8, passes=[number], seed=3, temperature=1.0)


def plainly(opened, sample, caption):
    entry = opened.entries[sample]
    with safe_open(opened.folder / entry.shard, framework="pt") as file:
        return file.get_tensor(f"{entry.number}.latent"), file.get_tensor(f"{entry.number}.text.{caption}")


class Narrow(FakeEncoders):
    """Two types in one file, whose order in it is by type."""

    def latents(self, pixels):
        return super().latents(pixels).half()

    def texts(self, captions):
        return [text.float() for text in super().texts(captions)]


@pytest.mark.parametrize("encoders", [FakeEncoders(), Narrow()], ids=["one type", "two types"])
@pytest.mark.parametrize("shard_size", [1, 5, 100])
def test_batches_are_what_safetensors_reads(tmp_path, shard_size, encoders):
    opened = Cache(make(tmp_path, shard_size, encoders))
    for sample, number in itertools.product(range(len(opened)), range(3)):
        batch = read(opened, sample, number)
        latent, text = plainly(opened, sample, batch.chosen[0])
        assert (batch.latents.dtype, batch.text.dtype) == (latent.dtype, text.dtype)
        assert torch.equal(batch.latents[0], latent)
        assert torch.equal(batch.text[0, : len(text)], text)
        assert not batch.text[0, len(text) :].any()
        assert batch.mask[0].tolist() == [1.0] * len(text) + [0.0] * (8 - len(text))


def num_open():
    return len(os.listdir("/proc/self/fd"))


def test_few_files_are_open_and_all_are_closed(cache, monkeypatch):
    monkeypatch.setattr(reading, "MAX_OPEN", 2)
    before = num_open()
    opened = Cache(cache)
    assert len({entry.shard for entry in opened.entries}) == 6
    with ThreadPoolExecutor(4) as pool:  # they push each other's files out
        found = list(pool.map(read, [opened] * 400, [i % NUM for i in range(400)]))
    assert num_open() <= before + 2
    for i, batch in enumerate(found):
        assert torch.equal(batch.latents[0], plainly(opened, i % NUM, 0)[0])
    del opened
    assert num_open() == before


@pytest.mark.parametrize("num_workers", [0, 2, 5])
def test_any_number_of_threads_gives_the_same_batches(cache, num_workers):
    def take(num_workers, position=0):
        source = CachedSource(Cache(cache), micro_batch=2, length=8, seed=1, temperature=1.0, num_workers=num_workers)
        source.load_state_dict(source.state_dict() | {"batches": position})
        return list(itertools.islice(source, 15)), source.state_dict()

    for position in (0, 4):
        (some, state), (others, expected) = take(num_workers, position), take(1, position)
        assert state == expected
        for a, b in zip(some, others, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(DataError, match="num_workers: got -1"):
        take(-1)


def test_a_shard_that_is_cut_or_gone_while_it_is_read(tmp_path):
    opened = Cache(make(tmp_path))
    gone, cut = (opened.folder / opened.entries[sample].shard for sample in (0, NUM - 1))
    gone.unlink()
    os.truncate(cut, 2000)
    with pytest.raises(DataError, match="cannot be opened"):
        read(opened, 0)
    with pytest.raises(DataError, match=r"got \d+ of \d+ bytes at \d+; expected a whole shard"):
        read(opened, NUM - 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("1.latent"), "damaged"),
        (lambda tensors: tensors.update({"0.latent": tensors["0.latent"].double()}), "expected one type of each"),
        (lambda tensors: tensors.update({"0.text.0": torch.zeros(3)}), "expected one type of each"),
        (lambda tensors: tensors.update({name: tensor.int() for name, tensor in tensors.items()}), "expected among F64"),
    ],
)
def test_shards_with_other_tensors_are_refused(tmp_path, change, words):
    folder = make(tmp_path)
    path = folder / "shard-00001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    index = json.loads((folder / "index.json").read_bytes())
    index["shards"][1]["bytes"] = path.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=words):
        Cache(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_are_pinned_where_there_is_a_gpu(cache):
    source = CachedSource(Cache(cache), micro_batch=2, length=8, seed=1, temperature=1.0, num_workers=2)
    assert all(tensor.is_pinned() for tensor in next(iter(source)).values())
