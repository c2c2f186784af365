"""Folders, shards, and everything that can be wrong with them."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from data_sets import captions, picture, sample_files, tar_of, write_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data.captions import Caption
from train.data.errors import BrokenSample, DataError, TooManyBroken
from train.data.images import decode
from train.data.report import MAX_NAMED, Broken, Report
from train.data.settings import MAX_PIXELS, DataSettings
from train.data.source import find, parse_captions, read_captions, read_image


def settings(path, **more):
    return DataSettings.checked(path=path, **more)


def test_a_folder(tmp_path):
    write_folder(tmp_path, sample_files(3) | {"deep/er/x.y.jpg": picture(1, "JPEG"), "deep/er/x.y.json": captions(9)})
    write_folder(tmp_path, {".hidden.png": b"", ".git/a.png": b"", "notes.txt": b"left alone"})
    found = find(settings(tmp_path))
    assert [item.key for item in found.items] == ["000", "001", "002", "deep/er/x.y"]
    assert not found.broken
    assert read_captions(found.root, found.items[3]) == (Caption("picture 9", 28.0), Caption("a box", 26.5))
    assert decode(read_image(found.root, found.items[0]), 10_000).size == (96, 64)


def test_shards_as_webdataset_writes_them(tmp_path):
    import webdataset

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05}.tar")) as writer:
            for number in range(3):
                content = json.loads(captions(number))
                writer.write({"__key__": f"{shard}-{number}", "png": picture(number), "json": content, "txt": "left alone"})
    found = find(settings(tmp_path))
    assert [item.key for item in found.items] == [f"{shard:05}.tar/{shard}-{n}" for shard in range(2) for n in range(3)]
    assert not found.broken
    for number, item in enumerate(found.items[:3]):
        assert read_image(found.root, item) == picture(number)
        assert read_captions(found.root, item)[0].text == f"picture {number}"
    alone = find(settings(tmp_path / "00001.tar"))
    assert [item.key for item in alone.items] == [item.key for item in found.items[3:]]


def test_the_digest_is_of_names_sizes_and_times(tmp_path):
    write_folder(tmp_path, sample_files(2))
    before = find(settings(tmp_path)).digest
    assert find(settings(tmp_path)).digest == before
    os.utime(tmp_path / "001.json", ns=(1, 1))
    assert find(settings(tmp_path)).digest != before


def test_an_empty_data_set(tmp_path):
    with pytest.raises(DataError, match=r"the data set is empty: got 0 files and no samples; expected pictures"):
        find(settings(tmp_path))
    (tmp_path / "readme.txt").touch()
    with pytest.raises(DataError, match=r"got 1 files and no samples; expected \.tar shards"):
        find(settings(tmp_path, kind="shards"))
    with pytest.raises(DataError, match="no such file or folder"):
        find(settings(tmp_path / "nowhere"))
    (tmp_path / "empty.tar").write_bytes(tar_of({}))
    with pytest.raises(DataError, match="empty"):
        find(settings(tmp_path))


def test_shards_and_pictures_together(tmp_path):
    write_folder(tmp_path, {**sample_files(1), "a.tar": tar_of(sample_files(1))})
    with pytest.raises(DataError, match="got 1 shards and 1 pictures beside them"):
        find(settings(tmp_path))
    assert len(find(settings(tmp_path, kind="folder")).items) == 1
    assert len(find(settings(tmp_path, kind="shards")).items) == 1


SHARD = tar_of(sample_files(4))
END = 4 * (2 * 512 + 512 * (-(-len(captions(0)) // 512))) + sum(512 * (-(-len(picture(i)) // 512)) for i in range(4))


@given(st.integers(1, len(SHARD)))
def test_a_shard_cut_anywhere(tmp_path_factory, length):
    """What came before the cut is used, and the cut is named, also where it falls between two samples."""
    path = tmp_path_factory.mktemp("cut") / "a.tar"
    path.write_bytes(SHARD[:length])
    found = find(settings(path))
    whole = find_whole()
    assert [item.key for item in found.items] == whole[: len(found.items)]
    for number, item in enumerate(found.items):
        assert read_image(found.root, item) == picture(number)
        assert read_captions(found.root, item)
    named = [broken for broken in found.broken if broken.name == "a.tar"]
    assert bool(named) == (length < END + 512)
    assert all("cut or damaged" in broken.reason for broken in named)
    if length >= END:
        assert len(found.items) == 4


def find_whole():
    return [f"a.tar/{number:03}" for number in range(4)]


def test_other_broken_shards(tmp_path):
    import gzip

    path = tmp_path / "a.tar"
    for content, words in [
        (b"", "cut or damaged after 0 of 0"),
        (b"no tar" * 1000, "cut or damaged"),
        (gzip.compress(SHARD), "compressed with gzip; expected a plain tar"),
        (SHARD[:1024] + b"\xff" * 512 + SHARD[1536:], "cut or damaged"),
    ]:
        path.write_bytes(content)
        found = find(settings(path))
        assert any(words in broken.reason for broken in found.broken), found.broken
    files = sample_files(2)
    path.write_bytes(tar_of({"000.png": b"1", "000.json": b"{}"} | files) + b"")
    path.write_bytes(tar_of({**{f"a/{n}": c for n, c in files.items()}, "b.png": b"", "c.json": b"", "d.png": b"", "d.jpg": b""}))
    found = find(settings(path))
    assert len(found.items) == 2
    assert {broken.name: broken.reason.split(";")[0] for broken in found.broken} == {
        "a.tar/b": "got 1 pictures and 0 JSON files",
        "a.tar/c": "got 0 pictures and 1 JSON files",
        "a.tar/d": "got 2 pictures and 0 JSON files",
    }


def test_a_key_twice_in_a_shard(tmp_path):
    stream = io.BytesIO()
    import tarfile

    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("a.png", "a.json", "b.png", "b.json", "a.png", "a.json", "a.json"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    found = find(settings(tmp_path))
    assert [item.key for item in found.items] == ["a.tar/a", "a.tar/b"]
    assert [broken.name for broken in found.broken] == ["a.tar", "a.tar/a"]
    assert "duplicate file name" in found.broken[0].reason


def test_a_folders_lonely_files_are_named(tmp_path):
    write_folder(tmp_path, sample_files(1) | {"x.png": b"", "y.json": b"", "z.jpg": b"", "z.png": b"", "z.json": b""})
    found = find(settings(tmp_path))
    assert [broken.name for broken in found.broken] == ["x", "y", "z"]
    assert found.total == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a cat", "not JSON"),
        (b"", "not JSON"),
        (b'{"captions": ["a"', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b'["a"]', "holds a list; expected an object"),
        (b"{}", "captions of type NoneType"),
        (b'{"captions": []}', "got 0 captions; expected a list of 1 to 64"),
        (b'{"captions": 7}', "captions of type int"),
        (json.dumps({"captions": ["a"] * 65}).encode(), "got 65 captions"),
        (b'{"captions": ["a", " "]}', "got the caption ' '; expected text"),
        (b'{"captions": [{"score": 1}]}', "got the caption None"),
        (b'{"prompt": "\\ud800"}', "half a surrogate pair"),
        (json.dumps({"prompt": "a" * 100_001}).encode(), "100001 characters"),
        (b'{"captions": [{"text": "a", "score": NaN}]}', "got the score nan; expected a number"),
        (b'{"captions": [{"text": "a", "score": 1e999}]}', "got the score inf"),
        (b'{"captions": [{"text": "a", "score": true}]}', "got the score True"),
        (b'{"captions": [{"text": "a", "score": "high"}]}', "got the score 'high'"),
        (b'{"captions": ["a", {"text": "b", "score": 1}]}', "got scores for 1 of 2 captions"),
    ],
)
def test_bad_captions(content, words):
    with pytest.raises(BrokenSample) as caught:
        parse_captions(content)
    assert words in str(caught.value)


def test_good_captions():
    assert parse_captions(b'{"prompt": "a", "width": 3}') == (Caption("a"),)
    assert parse_captions(b'{"caption": "a"}') == (Caption("a"),)
    assert parse_captions(b'{"captions": ["a", {"text": "b", "source": "vlm"}]}') == (Caption("a"), Caption("b"))


@given(st.binary(max_size=200))
def test_any_bytes_for_captions_are_read_or_refused(content):
    try:
        assert parse_captions(content)
    except BrokenSample:
        pass


def png_that_claims(width, height):
    """A file of under 100 bytes whose header promises a picture."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [20_000, 65_000, 2**31 - 1])  # Pillow warns of the first, raises for the others
def test_an_image_bomb_is_refused_before_it_is_decoded(side, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(BrokenSample, match=r"expected at most 178956970|bomb"):
        decode(png_that_claims(side, side), MAX_PIXELS)


def test_pictures_within_the_limit(monkeypatch):
    content = picture(0)
    assert decode(content, 96 * 64).size == (96, 64)
    with pytest.raises(BrokenSample, match=r"got 96 x 64 = 6144 pixels; expected at most 6143 \(max_pixels\)"):
        decode(content, 96 * 64 - 1)


@pytest.mark.parametrize("content", [b"", b"hello", picture(0)[:40], picture(0)[:-30], b"GIF89a" + b"\0" * 99, picture(0, "BMP")])
def test_pictures_that_are_none(content):
    with pytest.raises(BrokenSample, match=r"not a JPEG, PNG or WEBP picture|cannot be decoded"):
        decode(content, MAX_PIXELS)


@given(st.binary(max_size=64), st.integers(0, 250))
def test_a_damaged_picture_is_decoded_or_refused(noise, position):
    content = picture(0)
    try:
        assert decode(content[:position] + noise + content[position + len(noise) :], 10**6).mode == "RGB"
    except BrokenSample:
        pass


def test_transparency_orientation_and_depth():
    def encoded(image, **more):
        stream = io.BytesIO()
        image.save(stream, "PNG", **more)
        return stream.getvalue()

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode(encoded(clear), 100).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode(encoded(Image.new("RGB", (8, 4)), exif=exif), 100).size == (4, 8)
    assert decode(encoded(Image.new("L", (4, 4), 9)), 100).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(BrokenSample, match="expected 8 bits a channel"):
        decode(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), 100)


def test_files_too_large_are_not_read(tmp_path, monkeypatch):
    write_folder(tmp_path, sample_files(1))
    found = find(settings(tmp_path))
    monkeypatch.setattr("train.data.source.MAX_JSON_BYTES", 10)
    monkeypatch.setattr("train.data.source.MAX_IMAGE_BYTES", 10)
    with pytest.raises(BrokenSample, match=r"got a caption file of .* bytes; expected at most 10"):
        read_captions(found.root, found.items[0])
    with pytest.raises(BrokenSample, match=r"got a picture of .* bytes; expected at most 10"):
        read_image(found.root, found.items[0])
    monkeypatch.undo()
    (tmp_path / "000.png").write_bytes(b"short")
    with pytest.raises(BrokenSample, match="the file changed meanwhile"):
        read_image(found.root, found.items[0])
    (tmp_path / "000.png").unlink()
    with pytest.raises(BrokenSample, match="No such file"):
        read_image(found.root, found.items[0])


def test_the_report_stops_at_its_share():
    report = Report(total=100, max_share=0.02, broken=[Broken("a", "x")])
    report.add(Broken("b", "y"))
    with pytest.raises(TooManyBroken, match=r"got 3 broken of 100 samples; expected at most 2\.00%.*\n  a: x\n  b: y\n  c: z$"):
        report.add(Broken("c", "z"))
    content = json.loads(report.to_json())
    assert (content["samples"], content["broken"]) == (100, 3)
    assert content["named"] == [{"name": "a", "reason": "x"}, {"name": "b", "reason": "y"}, {"name": "c", "reason": "z"}]
    many = Report(total=1, max_share=1, broken=[Broken(str(i), "") for i in range(MAX_NAMED + 5)])
    assert json.loads(many.to_json())["not_named"] == 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"resolution": 768}, "resolution: got 768"),
        ({"resolutoin": 512}, "resolutoin: got 512; Extra inputs"),
        ({"caption_temperature": float("nan")}, "caption_temperature"),
        ({"max_broken_share": 1.5}, "max_broken_share: got 1.5"),
        ({"max_pixels": MAX_PIXELS + 1}, "max_pixels"),
        ({"seed": -1}, "seed: got -1"),
        ({"kind": "zip"}, "kind: got 'zip'"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(DataError, match=words):
        settings("x", **values)
