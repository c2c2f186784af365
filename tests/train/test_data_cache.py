"""The cache: whole shards or none, the same bytes however they were made, and nothing stale."""

import itertools
import json
import os
import shutil
from collections import Counter

import pytest
import torch
from data_sets import FakeEncoders, captions, contents, picture, sample_files, tar_of, write_folder
from kills import kill_at_every_step

from train.data.cache import Writer
from train.data.captions import choose
from train.data.errors import DataError, TooManyBroken
from train.data.order import Order
from train.data.reading import Cache
from train.data.settings import DataSettings
from train.data.source import find
from train.data.stream import CachedSource

NUM = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), sample_files(NUM))


def writer(path, out, encoders=None, **more):
    values = {"resolution": 512, "shard_size": 3, **more}
    settings = DataSettings.checked(path=path, **values)
    return Writer(find(settings), encoders or FakeEncoders(), settings, out)


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    return writer(data, tmp_path_factory.mktemp("cache")).write()


def test_what_is_in_it(data, cache):
    opened = Cache(cache, expected={"vae": "0" * 64, "text_encoder": "1" * 64, "resolution": 512})
    assert cache.name.startswith("512px-")
    assert sorted(entry.key for entry in opened.entries) == [f"{i:03}" for i in range(NUM)]
    assert {(entry.width, entry.height) for entry in opened.entries} == {(640, 416), (512, 512), (384, 704)}
    assert len(set(opened.buckets)) == 3
    assert opened.captions(0) == ("picture 0", "a box")
    assert opened.entries[0].scores == (28.0, 26.5)


def test_batches_of_an_epoch(cache):
    opened = Cache(cache)
    seen = Counter()
    for step in Order(opened.buckets, batch_size=2, seed=4).epoch(1):
        batch = opened.batch(step.samples, length=8, passes=step.passes, seed=4, temperature=1.0)
        seen.update(batch.keys)
        assert batch.latents.shape[:2] == (2, 3)
        assert batch.text.shape == (2, 8, 2)
        for row, (key, chosen, number) in enumerate(zip(batch.keys, batch.chosen, step.passes, strict=True)):
            sample = next(sample for sample, entry in enumerate(opened.entries) if entry.key == key)
            assert chosen == choose(opened.entries[sample].scores, 1.0, seed=4, epoch=number, key=key)
            caption = opened.captions(sample)[chosen]
            num_tokens = 1 + len(caption) % 5
            assert batch.mask[row].tolist() == [1.0] * num_tokens + [0.0] * (8 - num_tokens)
            assert batch.text[row, :num_tokens].tolist() == [[len(caption), ord(caption[0])]] * num_tokens
            assert not batch.text[row, num_tokens:].any()
    assert max(seen.values()) <= 2
    both = [opened.buckets.index(0), opened.buckets.index(1)]
    for samples, length, words in [(both, 8, "got 2 samples of 2 sizes"), ([], 8, "got 0 samples"), ([0], 1, "at most 1 tokens")]:
        with pytest.raises(DataError, match=words):
            opened.batch(samples, length=length, passes=[0] * len(samples), seed=0, temperature=0)


def take(source, num):
    return list(itertools.islice(iter(source), num))


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a[name], b[name])
        for a, b in zip(some, others, strict=True)
        for name in ("latents", "prompt_embeds", "prompt_mask")
    )


def source(cache, **more):
    values = {"micro_batch": 2, "length": 8, "seed": 1, "temperature": 1.0, **more}
    return CachedSource(Cache(cache), **values)


def test_the_trainers_source_goes_on_where_it_was(cache):
    whole = take(source(cache), 20)
    for position in (0, 1, 7):
        first = source(cache)
        taken = take(first, position)  # it has read ahead; its position has not
        state = json.loads(json.dumps(first.state_dict()))
        again = source(cache)
        again.load_state_dict(state)
        assert same(taken + take(again, 20 - position), whole)
    two = [source(cache, rank=rank, world=2) for rank in range(2)]
    shares = [take(one, 4) for one in two]
    assert same([batch for pair in zip(*shares, strict=True) for batch in pair], whole[:8])
    assert two[0].state_dict() == two[1].state_dict()
    alone = source(cache)
    alone.load_state_dict(two[0].state_dict())  # another number of GPUs
    assert same(take(alone, 12), whole[8:])


def test_a_position_of_other_data_is_refused(cache):
    state = source(cache).state_dict()
    for change, words in [({"cache": "0"}, "cache differs"), ({"micro_batch": 3}, "micro_batch"), ({"batches": -1}, "batches")]:
        with pytest.raises(DataError, match=words):
            source(cache).load_state_dict(state | change)
    with pytest.raises(DataError, match="expected one of"):
        source(cache).load_state_dict({})


def test_latents_are_the_encoders(data, cache):
    opened = Cache(cache)
    entry = next(number for number, entry in enumerate(opened.entries) if entry.key == "001")
    latents = opened.batch([entry], length=8, passes=[0], seed=0, temperature=0).latents
    assert latents.shape == (1, 3, 16, 16)
    from PIL import Image

    ground = Image.open(data / "001.png").getpixel((63, 63))
    assert latents[0, :, -2, -2].tolist() == pytest.approx(ground, abs=0.5)


@pytest.mark.parametrize("order", [[(0, 2), (1, 2)], [(1, 2), (0, 2)], [(3, 4), (2, 4), (0, 4), (1, 4)], [(8, 9)]])
def test_parts_in_any_order_make_the_same_bytes(data, cache, tmp_path, order):
    for part, parts in order:
        folder = writer(data, tmp_path).write(part=part, parts=parts)
    assert folder.name == cache.name
    assert contents(folder) == contents(cache)


@pytest.mark.parametrize("workers", [2, 5])
def test_processes_at_the_same_time_make_the_same_bytes(data, cache, tmp_path, workers):
    children = []
    for part in range(workers):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                writer(data, tmp_path).write(part=part, parts=workers)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * workers
    assert contents(tmp_path / cache.name) == contents(cache)
    assert not list((tmp_path / cache.name).glob(".*"))


def test_shards_that_are_there_are_not_made_again(data, cache, tmp_path):
    class Counting(FakeEncoders):
        count = 0

        def latents(self, pixels):
            self.count += len(pixels)
            return super().latents(pixels)

    copy = tmp_path / cache.name
    shutil.copytree(cache, copy)
    for name in ("shard-00001.safetensors", "index.json", "report.json"):
        (copy / name).unlink()
    calls = []
    counting = Counting()
    writer(data, tmp_path, counting).write(on_shard=lambda done, total: calls.append((done, total)))
    assert counting.count == 3
    assert calls == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert contents(copy) == contents(cache)


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_whole_shards_and_the_next_run_makes_the_same(tmp_path):
    data = write_folder(tmp_path / "data", sample_files(2))
    whole = contents(writer(data, tmp_path / "whole", shard_size=1).write())
    out = tmp_path / "out"

    def run():
        writer(data, out, shard_size=1).write()

    num_kills = 0
    for _ in kill_at_every_step(run, before=lambda: shutil.rmtree(out, ignore_errors=True)):
        folders = list(out.iterdir()) if out.is_dir() else []
        for name, content in contents(folders[0]).items() if folders else ():
            assert content == whole[name], f"{name} is there and not whole"
        if num_kills % 4 == 0:  # each of these is a whole run
            run()
            assert contents(next(out.iterdir())) == whole
            assert not list(next(out.iterdir()).glob(".*"))
        num_kills += 1
    assert num_kills > 100


def test_another_encoder_is_another_cache_and_is_refused(data, cache, tmp_path):
    class Other(FakeEncoders):
        vae_digest = "2" * 64

    other = writer(data, cache.parent, Other()).write()
    assert other.parent == cache.parent
    assert other.name != cache.name
    Cache(other, expected={"vae": "2" * 64})
    with pytest.raises(DataError) as caught:
        Cache(other, expected={"vae": "0" * 64, "text_encoder": "1" * 64})
    message = str(caught.value)
    assert "made by something else: got vae 2222222222222222; expected vae 0000000000000000." in message
    assert "Run sana data prepare" in message
    names = {
        writer(data, tmp_path, **more).folder.name for more in ({}, {"shard_size": 4}, {"resolution": 1024}, {"max_pixels": 9999})
    }
    assert len(names) == 4
    assert writer(data, tmp_path, max_broken_share=0.5, seed=3).folder.name == cache.name  # these change no byte


def damage(cache, tmp_path, name, content):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cache, copy)
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    return copy


def test_unfinished_and_damaged_caches_are_refused(cache, tmp_path):
    with pytest.raises(DataError, match="the cache is not finished: got 4 of 4 shards"):
        Cache(damage(cache, tmp_path, "index.json", None))
    shard = (cache / "shard-00002.safetensors").read_bytes()
    for content, words in [(None, "no such file"), (shard[:-1], "expected"), (b"x" * len(shard), "not a shard of a cache")]:
        with pytest.raises(DataError, match=words):
            Cache(damage(cache, tmp_path, "shard-00002.safetensors", content))
    identity = json.loads((cache / "cache.json").read_bytes())["identity"]
    for content, words in [
        (b"{", "cannot be read"),
        (b"[]", "expected a JSON object"),
        (b"{}", "cache.json"),
        (json.dumps({"identity": identity | {"format": 2}}).encode(), "got a cache of format 2; expected 1"),
        (json.dumps({"identity": identity | {"x": 2}}).encode(), "cache.json"),
        (json.dumps({"identity": identity | {"vae": "9"}}).encode(), "belongs to another cache"),
    ]:
        with pytest.raises(DataError, match=words):
            Cache(damage(cache, tmp_path, "cache.json", content))
    outside = (cache / "index.json").read_bytes().replace(b"shard-00000", b"../shard-00")
    for content in (b"{}", outside):
        with pytest.raises(DataError):
            Cache(damage(cache, tmp_path, "index.json", content))
    with pytest.raises(DataError, match="cannot be read"):
        Cache(tmp_path / "nowhere")


def broken_data(folder, kind):
    files = sample_files(8) | {"003.json": b"no JSON", "006.png": picture(6)[:60]}
    if kind == "folder":
        return write_folder(folder, files)
    return write_folder(folder, {"a.tar": tar_of(files)[:-12_000], "b.tar": tar_of({"x.png": picture(1), "x.json": captions(1)})})


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_broken_samples_are_left_out_and_named(tmp_path, kind):
    path = broken_data(tmp_path / "data", kind)
    folder = writer(path, tmp_path, max_broken_share=0.5).write()
    report = json.loads((folder / "report.json").read_bytes())
    named = {entry["name"]: entry["reason"] for entry in report["named"]}
    prefix = "" if kind == "folder" else "a.tar/"
    assert "not JSON" in named[f"{prefix}003"]
    if kind == "folder":
        assert "cannot be decoded" in named["006"]
    else:
        assert "cut or damaged" in named["a.tar"]
    keys = {entry.key for entry in Cache(folder).entries}
    assert report["broken"] == len(named)
    assert keys.isdisjoint(named)
    assert len(keys) + len(named) == report["samples"]
    before = contents(folder)
    (folder / "report.json").unlink()
    writer(path, tmp_path, max_broken_share=0.5).write(part=1, parts=2)  # found again in the shards
    assert contents(folder) == before


def test_too_many_broken_samples_stop_the_run(tmp_path):
    class Counting(FakeEncoders):
        count = 0

        def latents(self, pixels):
            self.count += len(pixels)
            return super().latents(pixels)

    path = broken_data(tmp_path / "data", "folder")
    counting = Counting()
    with pytest.raises(TooManyBroken, match="got 2 broken of 8 samples; expected at most 20") as caught:
        writer(path, tmp_path, counting, max_broken_share=0.2, shard_size=2).write()
    assert "003: the caption file is not JSON" in str(caught.value)
    assert counting.count == 5  # not 6: sample 007 was not looked at
    folder = next(tmp_path.glob("512px-*"))
    assert [entry["name"] for entry in json.loads((folder / "report.json").read_bytes())["named"]] == ["003", "006"]
    assert len(list(folder.glob("shard-*"))) == 3
    with pytest.raises(DataError, match="not finished: got 3 of 4 shards"):
        Cache(folder)
    writer(path, tmp_path, max_broken_share=0.3, shard_size=2).write()  # goes on in the same folder
    assert len(Cache(folder)) == 6


def test_everything_broken(tmp_path):
    path = write_folder(tmp_path / "data", {"a.png": b"", "b.json": b""})
    with pytest.raises(TooManyBroken, match="got 2 broken of 2 samples"):
        writer(path, tmp_path).write()


def test_bfloat16_is_kept(data, tmp_path):
    class Half(FakeEncoders):
        def latents(self, pixels):
            return super().latents(pixels).bfloat16()

    folder = writer(data, tmp_path, Half()).write()
    assert Cache(folder).batch([0], length=8, passes=[0], seed=0, temperature=0).latents.dtype == torch.bfloat16
