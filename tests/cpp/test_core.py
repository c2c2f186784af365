"""The C++ runtime refuses what Python refuses, in the same words, and takes what Python takes."""

import copy
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from fakes import HOST_TABLE, WRONG_TABLES, fake_info, fill_fake_bundle, with_table, write_fake_bundle

from engines.bundle import Bundle, parse_manifest
from engines.bundle_writer import write_bundle
from engines.digest import PART_BYTES
from engines.errors import BundleError, SanaError
from engines.onnx_locations import external_locations
from engines.spec import Target
from engines.token_table import TABLE_NAME

ROOT = Path(__file__).parents[1]
HOSTILE = ROOT / "data" / "hostile"
GOLDEN_DIGESTS = json.loads((ROOT / "golden" / "digests.json").read_bytes())
# Words of Python itself that changed after 3.11: about trailing commas and loops of links.
SAME_PYTHON = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="Python's own messages differ between versions; C++ has 3.11's"
)


def python_says(data: bytes) -> tuple[str, str]:
    try:
        return "ok", parse_manifest(data, source="manifest.json").model
    except SanaError as error:
        return type(error).__name__, str(error)


def both_say(ask, documents: list[bytes]) -> None:
    for data, (kind, text) in zip(documents, ask([("manifest", data) for data in documents]), strict=True):
        assert (kind, text.decode("utf-8", "surrogatepass")) == python_says(data), data[:2000]


@SAME_PYTHON
def test_hostile_manifests(ask):
    both_say(ask, [path.read_bytes() for path in sorted(HOSTILE.glob("*.json"))])


VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        32,
        33,
        64,
        1 << 40,
        1 << 63,
        -(1 << 70),
        0.0,
        -0.5,
        1.0,
        2.5,
        1e16,
        1e-5,
        123456789.125,
        1e300,
    ),
    *(
        "",
        "x",
        "fp16",
        "bf16",
        "fp8",
        "nvfp4",
        "sm80",
        "sm89",
        "rtx",
        "1.7.1",
        "1..7",
        "é\u202e'\"\\\n",
        "a" * 90,
        "0" * 64,
        "graph",
    ),
    *(["0" * 64], ["0" * 64, "F" * 64, 3], ["0" * 64] * 3, PART_BYTES, 2 * PART_BYTES, 2 * PART_BYTES + 1),
    *([], ["sm80"], ["sm80", "sm80"], ["sm80", 3, "x"], {}, {"a": 1}, {"decoder": "fp16"}, {"decoder": {"Op": 1}}, [[{}]]),
]
KEYS = [
    "licens",
    "modell",
    "size",
    "parts",
    "decoder",
    "denoiser",
    "text_projection",
    "x" * 300,
    "",
    "scaling_facter",
    "decoder/sm80.engine",
]


def mutated(document: object, chance: random.Random) -> object:
    """The document with one place of it changed, removed or added to."""
    at = document = copy.deepcopy(document)
    while True:
        key = chance.choice(sorted(at)) if at else chance.choice(KEYS)
        inner = at.get(key)
        if isinstance(inner, dict) and chance.random() < 0.8:
            at = inner
            continue
        what = chance.random()
        if what < 0.15:
            at.pop(key, None)
        elif what < 0.3:
            at[chance.choice(KEYS)] = chance.choice(VALUES)
        else:
            at[key] = chance.choice(VALUES)
        return document


def valid_documents() -> list[dict]:
    small = json.loads((HOSTILE / "no_files.json").read_bytes())
    small["files"] = {"decoder/model.onnx": {"sha256": "0" * 64, "size": 0, "role": "graph"}}
    large = copy.deepcopy(small)
    names = ("text_encoder", "text_projection", "denoiser", "decoder")
    entry = small["files"]["decoder/model.onnx"]
    large["files"] = {f"{name}/{file}": entry for name in names for file in ("model.onnx", "sm80-sm89.engine")}
    large |= {"targets": ["sm80", "sm89"], "tensorrt": {"flavor": "rtx", "version": "1.7.1.116"}}
    large |= {"precision": dict.fromkeys(names, "bf16"), "plugins": {name: {"Op": 2} for name in names}}
    large["files"]["decoder/model.onnx"] = entry | {"size": 3 * PART_BYTES - 1, "parts": ["0" * 64, "1" * 64, "2" * 64]}
    large["schedule"] |= {"max_timestep": 1.5, "intermediate_timestep": None, "flow_shift": 3}
    on_host = copy.deepcopy(large) | {"schema_version": 3, "token_table_rows": 64}
    on_host["files"][TABLE_NAME] = entry | {"role": "weights"}
    return [small, large, on_host]


def test_changed_manifests(ask):
    chance = random.Random(8)
    documents = []
    for valid in valid_documents():
        documents.append(valid)
        for _ in range(1500):
            changed = valid
            for _ in range(chance.choice([1, 1, 1, 2, 4])):
                changed = mutated(changed, chance)
            documents.append(changed)
    both_say(ask, [json.dumps(each, ensure_ascii=chance.random() < 0.5).encode() for each in documents])


def test_parts(ask):
    documents = []
    sizes = (0, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 2 * PART_BYTES + 1, 1 << 50, -1)
    for size in sizes:
        for parts in ([], ["0" * 64], ["0" * 64] * 2, ["0" * 64] * 3, ["0" * 63, "0" * 64], [1, "G" * 64], None, {}, "0" * 64):
            document = copy.deepcopy(valid_documents()[0])
            document["files"]["decoder/model.onnx"] |= {"size": size, "parts": parts}
            documents.append(json.dumps(document).encode())
    both_say(ask, documents)
    assert sum(python_says(data)[0] == "ok" for data in documents) == 6 + 2 + 1  # empty; two parts; three parts


def test_numbers_that_equal_the_right_one(ask):
    documents = []
    for value in (32, 32.0, 31, 32.5, True, "32", None, 1 << 63, 1 << 64, -(1 << 80)):
        document = copy.deepcopy(valid_documents()[0])
        document["latents"]["px_per_latent"] = value
        documents.append(json.dumps(document).encode())
    both_say(ask, documents)


@SAME_PYTHON
def test_damaged_bytes(ask):
    chance = random.Random(9)
    whole = json.dumps(valid_documents()[1], indent=1).encode()
    inserted = [
        b"",
        b"\xff",
        b"\xc3",
        b"\xe2\x82",
        b"\xed\xa0\x80",
        b'"',
        b"\\",
        b"\\u12",
        b"\\ud83d\\ude00",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
    ]
    inserted += [
        b":",
        b"\n",
        b"\x01",
        b"NaN",
        b"-",
        b"-Infinity",
        b"0",
        b"1e5",
        b"1.",
        b"tru",
        b"null",
        b"\xc2\xa0",
        b"\\u0000",
        b"e+",
    ]
    documents = []
    for _ in range(1500):
        at, gone = chance.randrange(len(whole)), chance.choice([0, 0, 1, 3])
        documents.append(whole[:at] + chance.choice(inserted) + whole[at + gone :])
    documents += [whole[: chance.randrange(len(whole))] for _ in range(100)]
    both_say(ask, documents)


def test_lone_surrogates_and_depth(ask):
    texts = [r"\ud800", r"\udc00", r"\ud800\n", r"\ud800A", r"\ud800\u0041", r"\ud800\ud800", r"\ud83d\ude00", r"x\ud800"]
    documents = [json.dumps(valid_documents()[0]).replace("hostile", text).encode() for text in texts]
    documents += [json.dumps(valid_documents()[0]).replace('"none"', "[" * n + "]" * n).encode() for n in (150, 199, 200, 300)]
    documents.append(b"[" * 1_000_000)
    many = valid_documents()[0]
    entry = next(iter(many["files"].values()))
    many["files"] |= {f"f{index}": entry for index in range(10_000)}
    documents.append(json.dumps(many).encode())
    both_say(ask, documents)


def test_locations(ask):
    paths = sorted(HOSTILE.glob("*.onnx"))
    for path, (kind, text) in zip(paths, ask([("locations", str(path).encode()) for path in paths]), strict=True):
        try:
            expected = "ok", "".join(f"{each}\n" for each in sorted(external_locations(path)))
        except BundleError as error:
            expected = "BundleError", str(error)
        assert (kind, text.decode()) == expected


@SAME_PYTHON
def test_bad_bundles(ask, tmp_path):
    pristine = write_fake_bundle(tmp_path / "b", targets=(Target.SM80, Target.SM89), tensorrt_version="1.7.1.116").path
    folders = [pristine, tmp_path / "nothing", Path(__file__), tmp_path, tmp_path / "b" / "decoder"]

    def spoilt(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(pristine, folder)
        folders.append(folder)
        return folder

    for number, file in enumerate(["denoiser/model.onnx", "decoder/model.onnx.data", "decoder/sm80-sm89.engine", "parity.json"]):
        for at in (0, -1):
            path = spoilt(f"changed-{number}-{at}") / file
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)
    with open(spoilt("cut") / "decoder" / "model.onnx.data", "r+b") as file:
        file.truncate(3)
    (spoilt("missing") / "tokenizer" / "tokenizer.json").unlink()
    for name, target in {"out": "../../secret", "dangling": "../nothing", "loop": "parity.json", "inside": "manifest.json"}.items():
        path = spoilt(f"link-{name}") / "parity.json"
        path.unlink()
        path.symlink_to(target)
    path = spoilt("fifo") / "parity.json"
    path.unlink()
    path.mkdir()
    (tmp_path / "secret").write_bytes(bytes(24))
    locations = [
        "../../secret",
        "/etc/hostname",
        "../denoiser/model.onnx.data",
        "unlisted.data",
        "./model.onnx.data",
        "",
        "model.onnx.data",
    ]
    for number, location in enumerate(locations):
        folder = spoilt(f"location-{number}")
        (folder / "decoder" / "unlisted.data").write_bytes(bytes(24))
        rewrite_location(folder, location)
    host = write_fake_bundle(tmp_path / "host", **HOST_TABLE).path
    folders.append(host)
    for number, (write, _) in enumerate(WRONG_TABLES.values()):
        folders.append(with_table(host, tmp_path / f"table-{number}", write))
    folder = spoilt("link-to-the-same")
    shutil.move(folder / "parity.json", tmp_path / "elsewhere")
    (folder / "parity.json").symlink_to(tmp_path / "elsewhere")
    manifest = json.loads((pristine / "manifest.json").read_bytes())
    for number, change in enumerate(({"schema_version": 3, "new": 1}, {"schema_version": 1}, {"licence": 3})):
        (spoilt(f"manifest-{number}") / "manifest.json").write_text(json.dumps(manifest | change))
    (spoilt("half") / "manifest.json").write_bytes((pristine / "manifest.json").read_bytes()[:999])
    path = spoilt("manifest-fifo") / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    with open(spoilt("hole") / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    (tmp_path / "link").symlink_to(pristine)
    folders.append(tmp_path / "link")
    for word, verify in (("bundle", True), ("unverified", False)):
        for folder, (kind, text) in zip(folders, ask([(word, str(folder).encode()) for folder in folders]), strict=True):
            try:
                expected = "ok", Bundle.open(folder, verify=verify).digest
            except SanaError as error:
                expected = type(error).__name__, str(error)
            assert (kind, text.decode()) == expected, folder


@pytest.mark.parametrize("case", GOLDEN_DIGESTS, ids=range(len(GOLDEN_DIGESTS)))
def test_golden_digests(ask, tmp_path, case):
    for name, text in case["files"].items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    assert ask([("bundle", str(tmp_path).encode())]) == [("ok", case["digest"].encode())]


def test_files_in_parts(ask, tmp_path):
    folder, name = tmp_path / "b", "decoder/large.data"
    with write_bundle(folder) as writer:
        fill_fake_bundle(writer.path, fake_info())
        with open(writer.path / name, "wb") as file:
            for part in range(3):
                file.seek(part * PART_BYTES)
                file.write(b"part %d" % part)
        good = writer.finish(fake_info())
    entry = good.manifest.files[name]
    assert entry.size == 2 * PART_BYTES + 6
    assert len(entry.parts) == 3
    said = []

    def both(expected: str) -> None:
        try:
            python = "ok", Bundle.open(folder).digest
        except SanaError as error:
            python = type(error).__name__, str(error)
        assert [(kind, text.decode()) for kind, text in ask([("bundle", str(folder).encode())])] == [python]
        assert python[0] == expected
        said.append(python[1])

    both("ok")
    for at in (0, PART_BYTES - 1, PART_BYTES, 2 * PART_BYTES - 1, 2 * PART_BYTES, entry.size - 1):
        with open(folder / name, "r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))
            file.flush()
            both("DigestError")
            assert f"{name} was changed: got SHA-256" in said[-1]
            file.seek(at)
            file.write(bytes([byte]))
    document = json.loads((folder / "manifest.json").read_bytes())
    parts = list(entry.parts)
    for changes, expected in (
        ({"parts": []}, "ok"),  # as in a bundle of before
        ({"parts": parts[:2]}, "ManifestError"),
        ({"parts": [*parts, parts[0]]}, "ManifestError"),
        ({"parts": [parts[1], parts[0], parts[2]]}, "DigestError"),
        ({"sha256": "0" * 64}, "ok"),  # `sana verify` alone compares both
    ):
        document["files"][name] = entry.model_dump(mode="json") | changes
        (folder / "manifest.json").write_text(json.dumps(document))
        both(expected)
    assert "has the SHA-256 of the manifest, and its parts have not" in said[-2]


def rewrite_location(folder: Path, location: str) -> None:
    import onnx

    path = folder / "decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    document = json.loads((folder / "manifest.json").read_bytes())
    document["files"]["decoder/model.onnx"]["size"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(document))


def test_a_bundle_whose_writer_was_killed(ask, tmp_path):
    digest = write_fake_bundle(tmp_path / "b").digest
    (tmp_path / "b").rename(tmp_path / ".b.old")
    assert ask([("bundle", str(tmp_path / "b").encode())]) == [("ok", digest.encode())]
    assert not (tmp_path / ".b.old").exists()
