"""`sana data` from end to end: a real checkpoint, latents that decode to their pictures, contact sheets, Ctrl-C."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import captions, contents, picture, sample_files, tar_of, write_folder
from PIL import Image

from apps.cli.main import main as sana
from apps.cli.program import PROGRAMS
from train.data.__main__ import main, stopped_once
from train.data.buckets import make_buckets, nearest
from train.data.encoders import CheckpointEncoders, expected_identity
from train.data.images import decode, fit
from train.data.reading import Cache

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "sana-tiny"
PREPARE = ("--model", str(MODEL), "--resolution", "512", "--dtype", "float32", "--device", "cpu", "--shard-size", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), sample_files(3))


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    """Made by two processes."""
    out = tmp_path_factory.mktemp("cache")
    command = [sys.executable, "-m", "apps.cli", "data", "prepare", str(data), *PREPARE, "--out", str(out), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "3 of 3 shards" in done.stderr
    assert "3 samples in 3 shards" in done.stderr
    assert "none broken" in done.stderr
    folder = Path(done.stdout.rstrip("\n"))
    assert folder.parent == out
    return folder


@pytest.mark.slow
def test_the_same_bytes_from_one_process(data, cache, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["prepare", str(data), *PREPARE, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = False
    folder = Path(capsys.readouterr().out.rstrip("\n"))
    assert folder.name == cache.name
    assert contents(folder) == contents(cache)


@pytest.mark.slow
def test_latents_decode_to_their_pictures_and_texts_are_what_drawing_uses(data, cache):
    from sana_ref import checkpoint
    from sana_ref.pipeline import SanaReference

    reference = SanaReference(MODEL)
    loaded = checkpoint.load(MODEL, components=("vae", "text_encoder"))
    opened = Cache(cache, expected=expected_identity(loaded))
    length = reference.checkpoint.prompt.max_sequence_length
    buckets = make_buckets(512)
    entry = opened.entries[0]
    batch = opened.batch([0], length=length, passes=[0], seed=0, temperature=0)
    image = decode((data / f"{entry.key}.png").read_bytes(), 10**6)
    wanted = np.asarray(fit(image, buckets[nearest(buckets, *image.size)])).astype(float)
    images = torch.from_numpy(wanted / 127.5 - 1).float().movedim(-1, 0)[None]
    with torch.inference_mode():
        through = loaded.vae(torch.float32)(images)  # neither coding nor decoding applies the scaling factor
    drawn = reference.decode(batch.latents)
    torch.testing.assert_close(drawn, through, rtol=0, atol=1e-3)
    psnr = 10 * math.log10(4 / (drawn.clamp(-1, 1) - images).square().mean())
    swapped = 10 * math.log10(4 / (drawn.clamp(-1, 1) - images.flip(1)).square().mean())
    assert psnr > max(20, swapped + 3)  # dB: it is the picture, as well as this small model can
    embeds, mask = reference.encode_prompts(opened.captions(0)[0])
    assert torch.equal(batch.mask, mask)
    torch.testing.assert_close(batch.text * mask[..., None], embeds * mask[..., None], rtol=1e-4, atol=1e-4)
    empty, mask = reference.encode_prompts("", negative=True)
    assert mask.sum() == 1
    torch.testing.assert_close(batch.text[0, 0], empty[0, 0], rtol=1e-4, atol=1e-4)  # so captions can be dropped by a mask


@pytest.mark.slow
def test_encoders_say_what_they_are():
    from sana_ref import checkpoint

    loaded = checkpoint.load(MODEL, components=("vae", "text_encoder"))
    encoders = CheckpointEncoders(MODEL, dtype=torch.bfloat16)
    assert {"vae": encoders.vae_digest, "text_encoder": encoders.text_digest} == expected_identity(loaded)
    assert encoders.dtype == "bfloat16"
    assert encoders.texts(["a fox", "a red apple"])[1].dtype == torch.bfloat16
    changed = dataclasses.replace(loaded, prompt=dataclasses.replace(loaded.prompt, complex_human_instruction="Paint."))
    assert expected_identity(changed)["text_encoder"] != encoders.text_digest
    assert expected_identity(changed)["vae"] == encoders.vae_digest


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_only_the_first_signal_interrupts(first):
    """A second one, while the first is handled, would show a traceback; a program that ends by itself leaves all as it was."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with stopped_once():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        heard = []

        def interrupted():
            try:
                signal.raise_signal(first)
            finally:
                for number in numbers:
                    signal.raise_signal(number)
                    heard.append(number)

        with pytest.raises(KeyboardInterrupt), stopped_once():
            interrupted()
        for number in numbers:  # also behind the block, where the message is printed
            signal.raise_signal(number)
        assert heard == [*numbers]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_interrupted(tmp_path, number, workers):
    """Also where the working folder has a train.py of its own."""
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong program')")
    many = write_folder(tmp_path / "data", sample_files(40))
    command = [sys.executable, "-c", "import sys; from apps.cli.main import main; sys.exit(main())"]
    arguments = ["data", "prepare", str(many), *PREPARE, "--out", str(tmp_path / "out"), "--workers", str(workers)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Ctrl-C is heard even where these tests run in the background, as a shell starts what ends in &.
    first = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.path.remove(''); "
    with subprocess.Popen(
        [*command[:2], first + command[2], *arguments],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        assert child.stderr is not None
        deadline = time.monotonic() + 200
        while len(list(tmp_path.glob("out/*/shard-*.safetensors"))) < 2:  # two workers may finish them in another order
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(child.pid, number) if number == signal.SIGINT else child.send_signal(number)
        said = child.communicate(timeout=120)[1]
    assert child.returncode == 130
    assert "data: interrupted. Finished shards are kept; the same command goes on from there." in said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):  # nothing is left running
        os.killpg(child.pid, 0)
    folder = next((tmp_path / "out").iterdir())
    kept = contents(folder)
    assert 2 <= len([name for name in kept if name.startswith("shard")]) < 40
    assert "index.json" not in kept


@pytest.mark.slow
def test_inspect_a_folder(tmp_path, capsys):
    path = write_folder(tmp_path / "data", sample_files(7) | {"005.json": b"no JSON", "x.jpg": b""})
    assert sana(["data", "inspect", str(path), "--resolution", "512", "--out", str(tmp_path / "sheets" / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheets" / "sheet.png") as sheet:
        assert sheet.width > 6 * 192
        assert len(sheet.getcolors(10**6) or ()) > 12  # ground and rectangle of the pictures


def test_inspect_says(tmp_path, capsys):
    path = write_folder(tmp_path / "data", sample_files(7) | {"005.json": b"no JSON", "\x1b[2J.jpg": b""})
    arguments = ["inspect", str(path), "--resolution", "512", "--out", str(tmp_path / "sheet.png")]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    rows = printed.out.splitlines()
    assert rows[0].split(maxsplit=1) == ["samples", "8 in all, 6 looked at and whole, 2 broken"]
    for words in ("64 to 96 px", "2: 6", "26.5 to 28", "512x512: 2", "005: the caption file is not JSON", "6 pictures would be"):
        assert any(words in row for row in rows), words
    assert "\x1b" not in printed.out  # a name cannot steer the terminal
    assert "7 of 7 samples" in printed.err
    assert main([*arguments, "--most", "2"]) == 0
    assert "2 looked at and whole" in capsys.readouterr().out


def test_inspect_shards_as_a_page(tmp_path, capsys):
    files = {"a.png": picture(0), "a.json": json.dumps({"prompt": "<script>alert(1)</script>"}).encode()}
    path = write_folder(tmp_path / "data", {"a.tar": tar_of(files), "b.tar": tar_of(sample_files(2))[:-12_000]})
    assert main(["inspect", str(path), "--out", str(tmp_path / "sheet.html")]) == 0
    page = (tmp_path / "sheet.html").read_text()
    assert "&lt;script&gt;alert" in page
    assert "<script" not in page
    assert "cut or damaged" in page
    assert page.count("<img") >= 1


def test_errors_are_one_message(tmp_path, capsys):
    data = write_folder(tmp_path / "in" / "data", sample_files(1))
    tmp_path = write_folder(tmp_path / "empty", {"notes.txt": b""})
    for arguments, words in [
        (["inspect", str(tmp_path), "--out", str(tmp_path / "s.png")], "the data set is empty"),
        (["inspect", str(tmp_path), "--out", str(tmp_path / "s.gif")], "--out: got 's.gif'; expected"),
        (["prepare", str(tmp_path), *PREPARE, "--out", str(tmp_path / "c")], "the data set is empty"),
        (["inspect", str(tmp_path), "--max-pixels", "1", "--out", str(tmp_path / "s.png")], "max_pixels: got 1"),
        (["prepare", str(data), "--model", "nowhere/", "--out", "x"], "nowhere/"),
    ]:
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert f"data: error: {words}" in printed.err.replace(f"{tmp_path}: ", "") or words in printed.err
        assert "Traceback" not in printed.err
        assert not printed.out
    with pytest.raises(SystemExit):
        main(["prepare", str(tmp_path), *PREPARE, "--out", "x", "--part", "2/2"])
    assert "got '2/2'; expected I/N" in capsys.readouterr().err


@pytest.mark.slow
def test_a_broken_worker_is_an_error(tmp_path, capfd):
    path = write_folder(tmp_path / "d", {"a.png": picture(0), "a.json": b"", "b.png": picture(1), "b.json": captions(1)})
    assert main(["prepare", str(path), *PREPARE, "--out", str(tmp_path / "c"), "--workers", "2"]) == 2
    said = capfd.readouterr().err
    assert "got 1 broken of 2 samples; expected at most 1.00%" in said
    assert "workers failed" in said


def test_sana_data_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(PROGRAMS, "data", dataclasses.replace(PROGRAMS["data"], needs=("sys", "a_package_that_is_not_there")))
    assert sana(["data", "inspect", "x"]) == 2
    assert "a_package_that_is_not_there not installed" in capsys.readouterr().err
