"""Pictures drawn again in C++: reading PNGs and what they say, `sana replay`, and schedules from files. As Python does it."""

import copy
import json
import random
import shutil
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cpp_bundles import letters_bundle
from cpp_pictures import run_program
from PIL import Image, PngImagePlugin

from apps.cli.main import main
from engines.errors import SanaError
from runtime import SanaEngine
from runtime.image import read_picture, save_png
from runtime.picture_info import parse_picture_info
from runtime.schedule import load_schedule

CONFIGS = Path(__file__).parents[2] / "configs" / "schedule"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return letters_bundle(tmp_path_factory.mktemp("replay") / "fake")


@pytest.fixture(scope="module")
def picture(bundle, tmp_path_factory) -> Path:
    """What Python drew, beside its bundle."""
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        drawn = engine.generate("a cat", seed=7, steps=3, width=96, height=64)[0]
    return save_png(drawn, bundle.parent / "cat.png")


@pytest.fixture
def run(cpp):
    return partial(run_program, cpp, "sana")


# --- what a picture says ---

INFO = {
    "format": 1,
    "prompt": 'a "cat"\n猫',
    "negative_prompt": "",
    "seed": 2**64 - 1,
    "guidance": 4.5,
    "width": 512,
    "height": 1024,
    "schedule": {
        "scheduler": "flow_euler",
        "num_steps": 3,
        "flow_shift": 1e-7,
        "spacing": [1.0, 0.5, 1e-5],
        "max_timestep": None,
        "intermediate_timestep": 1.3,
    },
    "model": "m",
    "bundle_digest": "0a" * 32,
    "backend": "tensorrt",
    "device": "d",
    "batch_size": 4,
    "batch_index": 3,
    "program": "p",
}
VALUES = [None, True, 0, 1, -1, 31, 32, 33, 1000, 1001, 1 << 64, 0.0, -2.5, 3.25, 1e22, "", "scm", "linear", "karas", "x" * 100]
VALUES += ["f" * 64, "onnxruntime", [], [1.0, 0.5], [0.5, 0], ["x", 1], [[1]], [-1, 2], [0.5] * 1000, [0.5] * 2500, {}, {"a": [1]}]


def info_of(data: bytes) -> tuple[str, object]:
    try:
        return "ok", json.loads(parse_picture_info(data.decode(), source="picture").model_dump_json())
    except SanaError as error:
        return type(error).__name__, str(error)


def test_infos(ask):
    chance = random.Random(20)
    documents = [
        json.dumps(INFO),
        json.dumps(INFO, ensure_ascii=False),
        "{}",
        "[]",
        "",
        "{",
        json.dumps(INFO)[:-9],
        '{"format": NaN}',
    ]
    documents += [json.dumps(INFO | {"prompt": "x" * length}) for length in (100_000, 100_001)]
    documents += [json.dumps(INFO)[:-9], json.dumps(INFO).replace("cat", r"\ud800"), " " * (5 << 20)]
    for _ in range(1500):
        changed = copy.deepcopy(INFO)
        for _ in range(chance.choice([1, 1, 2, 6])):
            place = chance.choice([changed, changed.get("schedule")])
            if not isinstance(place, dict):
                continue
            key = chance.choice([*place, *place, "promt", "spacin"])
            if chance.random() < 0.1:
                place.pop(key, None)
            else:
                place[key] = chance.choice(VALUES)
        documents.append(json.dumps(changed))
    answers = ask([("info", each.encode()) for each in documents])
    for document, (kind, text) in zip(documents, answers, strict=True):
        said = json.loads(text) if kind == "ok" else text.decode()
        assert (kind, said) == info_of(document.encode()), document[:2000]


# --- PNG files ---


def saved(image: Image.Image, path: Path, **options: object) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


def with_chunk(data: bytes, kind: bytes, body: bytes, *, at: int = 33) -> bytes:
    """`data` with a chunk more, behind the header."""
    chunk = len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)
    return data[:at] + chunk + data[at:]


def test_pngs_that_other_programs_wrote(ask, picture, tmp_path):
    original = read_picture(picture)[0]
    text = original.info["sana"]
    files = [picture.read_bytes()]
    plain = {"optimize": True}, {"compress_level": 0}, {"compress_level": 9}
    for options in plain:
        for add in ("add_text", "add_itxt"):
            for squeezed in (True, False):
                info = PngImagePlugin.PngInfo()
                info.add_text("other", "x" * 5000, zip=True)
                getattr(info, add)("sana", text, zip=squeezed)
                files.append(saved(original, tmp_path / "x.png", pnginfo=info, **options))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("sana", text)
    files.append(saved(original.convert("RGBA"), tmp_path / "x.png", pnginfo=info))
    files.append(with_chunk(files[0], b"tEXt", b"sana\0not this one: a later one counts"))
    for filtered in range(5):  # each of PNG's filters
        files.append(filtered_png(np.asarray(original), filtered, text))
    for data, (kind, body) in zip(files, ask([("png", data) for data in files]), strict=True):
        (tmp_path / "y.png").write_bytes(data)
        expected, _ = read_picture(tmp_path / "y.png")
        assert kind == "ok", body
        assert body == text.encode() + b"\0" + expected.convert("RGB").tobytes()


def filtered_png(pixels: np.ndarray, filtered: int, text: str) -> bytes:
    height, width, _ = pixels.shape
    rows = np.zeros((height + 1, width * 3 + 3), np.int64)
    rows[1:, 3:] = pixels.reshape(height, -1)
    here, left, up, corner = rows[1:, 3:], rows[1:, :-3], rows[:-1, 3:], rows[:-1, :-3]
    estimate = left + up - corner
    a, b, c = abs(estimate - left), abs(estimate - up), abs(estimate - corner)
    paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
    coded = here - [0 * left, left, up, (left + up) // 2, paeth][filtered]
    data = np.insert(coded % 256, 0, filtered, axis=1).astype(np.uint8).tobytes()
    out = b"\x89PNG\r\n\x1a\n"
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    packed = zlib.compress(data)
    chunks = [(b"IHDR", header), (b"iTXt", b"sana\0\0\0\0\0" + text.encode()), (b"IDAT", packed[:100]), (b"IDAT", packed[100:])]
    for kind, body in chunks:
        out = with_chunk(out, kind, body, at=len(out))
    return out


def test_pngs_that_are_refused(ask, picture, tmp_path):
    original = read_picture(picture)[0]
    whole, text = picture.read_bytes(), original.info["sana"]
    info = PngImagePlugin.PngInfo()
    info.add_itxt("sana", text)
    at_pixels = whole.index(b"IDAT") - 4
    cases = {
        b"": "cannot be read as a PNG",
        b"GIF89a" + whole: "cannot be read as a PNG",
        whole[:40]: "cannot be read as a PNG",
        whole[:at_pixels]: "cannot be read as a PNG",
        whole.replace(b"iTXt", b"iTXu"): "cannot be read as a PNG",  # a checksum is wrong
        saved(original, tmp_path / "x.png"): "a PNG without metadata of sana",
        whole[:-30]: "the pixels cannot be read",
        saved(original.convert("P"), tmp_path / "x.png", pnginfo=info): "the pixels cannot be read",
        saved(original.convert("L"), tmp_path / "x.png", pnginfo=info): "the pixels cannot be read",
        whole[: at_pixels + 8]: "cannot be read as a PNG",
        with_chunk(whole[:at_pixels], b"IDAT", b"not zlib", at=at_pixels): "the pixels cannot be read",
        with_chunk(whole[:at_pixels], b"IDAT", zlib.compress(b"\5" * 9999), at=at_pixels): "the pixels cannot be read",
        with_chunk(whole[:at_pixels], b"IDAT", zlib.compress(b"\0" * 9999), at=at_pixels): "the pixels cannot be read",
    }
    for words, (kind, message) in zip(cases.values(), ask([("png", data) for data in cases]), strict=True):
        assert kind == "RequestError"
        assert message.decode().startswith(f"picture.png: {words}"), message
    broken = with_chunk(whole, b"tEXt", b"sana\0{}", at=at_pixels)
    assert ask([("png", broken)])[0][0] == "ManifestError"
    chance = random.Random(21)
    damaged = []
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 2, 9])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        damaged.append(bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))
    assert {kind for kind, _ in ask([("png", data) for data in damaged])} <= {"ok", "RequestError", "ManifestError"}


# --- sana replay ---


def both_say(run, capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and output of the C++ program, which are Python's."""
    code = main(list(map(str, arguments)))
    said = capsys.readouterr()
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, said.out)
    if code == 2:
        assert done.stderr.splitlines()[-1] == said.err.splitlines()[-1]
    return code, done.stdout


def test_replay(run, bundle, picture, tmp_path, capsys, monkeypatch):
    code, said = both_say(run, capsys, "replay", picture, "--bundle", bundle)
    assert code == 0
    assert "identical, all 96x64 px (seed 7)" in said
    assert both_say(run, capsys, "replay", picture)[0] == 0  # its bundle lies beside it
    shutil.copy(picture, tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    assert both_say(run, capsys, "replay", "x.png")[0] == 2
    (tmp_path / "out").mkdir()
    shutil.copytree(bundle, tmp_path / "out" / "b")
    assert both_say(run, capsys, "replay", "x.png", "--out", "again.png")[0] == 0
    assert read_picture("again.png")[0].tobytes() == read_picture(picture)[0].tobytes()


def test_replay_of_what_is_not_the_same(run, bundle, picture, tmp_path, capsys):
    image, info = read_picture(picture)
    text, other = image.info["sana"], tmp_path / "x.png"
    image.putpixel((3, 5), (0, 255, 0))
    image.putpixel((90, 60), (1, 2, 3))
    save_png(image, other)
    assert both_say(run, capsys, "replay", other, "--bundle", bundle)[0] == 1
    image.info["sana"] = text.replace(info.device, r"another\u001b[31m")
    save_png(image, other)
    said = both_say(run, capsys, "replay", other, "--bundle", bundle)[1]
    assert "it was drawn by onnxruntime on another" in said
    assert "\x1b" not in said
    small = image.resize((48, 32))
    small.info["sana"] = text
    save_png(small, other)
    assert both_say(run, capsys, "replay", other, "--bundle", bundle)[0] == 2
    image.info["sana"] = text.replace(info.bundle_digest, "0" * 64)
    save_png(image, other)
    assert both_say(run, capsys, "replay", other, "--bundle", bundle)[0] == 2
    for change in ({"batch_size": 2}, {"batch_size": 2, "batch_index": 1}, {"batch_index": 1}, {"width": 16384}):
        image.info["sana"] = json.dumps(json.loads(text) | change)
        save_png(image, other)
        assert both_say(run, capsys, "replay", other, "--bundle", bundle)[0] == 2
    image.info["sana"] = text.replace('"onnxruntime"', '"tensorrt"')
    save_png(image, other)
    assert run("replay", other, "--bundle", bundle).returncode == 2  # no TensorRT, or no engines
    assert both_say(run, capsys, "replay", other, "--bundle", bundle, "--backend", "onnxruntime")[0] == 1
    assert both_say(run, capsys, "replay", tmp_path / "nothing.png")[0] == 2
    Image.new("RGB", (32, 32)).save(other)
    assert both_say(run, capsys, "replay", other)[0] == 2


# --- schedules from files ---

GOOD = [
    "scheduler: flow_euler\nnum_steps: 5\n",
    "---\n# words\nscheduler: 'flow_dpm_solver'  # and more\nnum_steps: +7\nflow_shift: 6\nspacing: karras\n\n",
    'scheduler: "flow_euler"\nflow_shift: 1.0\nspacing:\n  - 1.0\n  - 0.5  # half\n  - 2.5e-1\nnum_steps: null\n',
    "scheduler: flow_euler\r\nspacing: [1.0,\n  0.75, 0.5,\n  .25]\r\n".replace(" .25", " 0.25"),
    "scheduler: scm\nnum_steps: 2\nintermediate_timestep: even\nmax_timestep: 1.5",
    "scheduler: scm\nnum_steps: 2\nintermediate_timestep: 1.0",
    "scheduler: scm\nspacing: [1.5, 1.0, 0.3]",
]
BAD = [
    "",
    "# nothing\n",
    "num_steps: 3",
    "scheduler: flow_eular\nnum_steps: 3",
    "scheduler: 3\nnum_steps: 3",
    "scheduler: flow_euler\nnum_step: 3",
    "scheduler: flow_euler",
    *(f"scheduler: flow_euler\nnum_steps: {value}" for value in ("0", "1001", "true", "3.0", "x", "[1]", "''")),
    *(f"scheduler: flow_euler\nnum_steps: 3\nflow_shift: {value}" for value in ("0", "-1", "no", "x", "[1.0]", "1000000.0")),
    *(
        f"scheduler: flow_euler\nspacing: {value}"
        for value in ("karas", "[]", "[0.5, 0.9]", "[1.0, 0]", "3", "[x, 1]", "[2.0, 1.0]")
    ),
    "scheduler: flow_euler\nspacing:\nnum_steps: 3",
    "scheduler: flow_euler\nspacing: [1.0, 0.5]\nnum_steps: 3",
    "scheduler: flow_euler\nnum_steps: 3\nmax_timestep: 1.0",
    "scheduler: flow_dpm_solver\nnum_steps: 3\nintermediate_timestep: even",
    "scheduler: scm\nnum_steps: 2\nflow_shift: 3.0",
    "scheduler: scm\nnum_steps: 2\nmax_timestep: 1.0\nintermediate_timestep: 1.3",
    "scheduler: scm\nnum_steps: 2\nmax_timestep: 2.0",
    "scheduler: scm\nnum_steps: 2\nintermediate_timestep: evn",
    "scheduler: scm\nspacing: [1.5, 1.0]\nmax_timestep: 1.5",
    "scheduler: flow_euler\n" + "#" * (64 << 10),
]
NOT_READ = [  # YAML that two readers could take for different things, or that no schedule needs
    "- a\n- b",
    "scheduler: *x",
    "scheduler: &a scm",
    "scheduler: flow_euler\nnum_steps: 010",
    "scheduler: flow_euler\nnum_steps: 1_0",
    "scheduler: flow_euler\nnum_steps: 1:30",
    "scheduler: flow_euler\nflow_shift: 1e-3",
    "scheduler: {a: b}",
    "scheduler: |\n  x",
    "? a",
    "scheduler: flow_euler\nscheduler: flow_euler",
    "scheduler: flow_euler\nspacing: [1.0, [2.0]]",
    "scheduler: flow_euler\nspacing: [1.0",
    "scheduler: flow_euler\n  num_steps: 3",
    "scheduler:\tflow_euler",
    "scheduler: flow_euler\nspacing:\n  - 1.0\n- 0.5",
]


def table_of(path: Path) -> tuple[str, object]:
    try:
        made = load_schedule(path)
    except SanaError as error:
        return type(error).__name__, str(error)
    return "ok", np.concatenate([made.sigmas, made.table.reshape(-1)])


def test_schedule_files(ask, tmp_path):
    paths = sorted(CONFIGS.glob("*.yaml"))
    for number, text in enumerate(GOOD + BAD):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_bytes(text.encode())
    paths += [tmp_path / "none.yaml"]
    good = 0
    for path, (kind, body) in zip(paths, ask([("schedule_file", str(path).encode()) for path in paths]), strict=True):
        expected, value = table_of(path)
        assert kind == expected, (path.read_text()[:200], body)
        if kind == "ok":
            good += 1
            np.testing.assert_allclose(np.frombuffer(body, np.float32), value, rtol=1e-7, atol=1e-7)
        else:
            assert body.decode() == value
    assert good == len(GOOD) + len(list(CONFIGS.glob("*.yaml")))


def test_yaml_that_is_not_read(ask, tmp_path):
    for number, text in enumerate([*NOT_READ, "scheduler: \xff"]):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(text.encode("latin-1"))
        ((kind, message),) = ask([("schedule_file", str(path).encode())])
        assert kind == "SpecError", (text, message)
        assert message.decode().startswith(f"{path}: "), text


def test_pictures_of_a_schedule_file(run, bundle, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD[2])
    assert run("generate", bundle, "a cat", "--schedule", path, "--out", tmp_path / "x.png").returncode == 0
    with SanaEngine(bundle, backend="onnxruntime") as engine:
        expected = engine.generate("a cat", scheduler=load_schedule(path))[0]
    got, info = read_picture(tmp_path / "x.png")
    assert got.tobytes() == expected.tobytes()
    ours, theirs = json.loads(got.info["sana"]), json.loads(expected.info["sana"])
    assert ours | {"program": ""} == theirs | {"program": ""}
    assert info.schedule.spacing == (1.0, 0.5, 0.25)
    assert run("replay", tmp_path / "x.png", "--bundle", bundle).returncode == 0
    both = run("generate", bundle, "a cat", "--schedule", path, "--scheduler", "flow_euler")
    assert "sana: error: scheduler: got 'flow_euler' beside the schedule " in both.stderr
    more = run("generate", bundle, "a cat", "--schedule", path, "--steps", "9")
    assert "sana: error: steps: got 9; this schedule's list has 3 entries" in more.stderr
