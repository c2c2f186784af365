"""Noise, narrow floats, schedules and text of the C++ runtime are Python's."""

import json
import random
from pathlib import Path

import numpy as np

from engines.errors import SanaError
from runtime.bfloat16 import from_bfloat16
from runtime.noise import MAX_SEED, normal
from runtime.schedule import make_schedule

GOLDEN = Path(__file__).parents[1] / "golden"


def test_golden_noise(ask):
    cases = json.loads((GOLDEN / "noise.json").read_text())
    answers = ask([("noise", f"{c['seed']} {np.prod(c['shape'])} {c['stream']}".encode()) for c in cases])
    digests = ask([("sha256", body) for _, body in answers])
    for case, (kind, body), (_, digest) in zip(cases, answers, digests, strict=True):
        assert kind == "ok"
        assert [f"{word:08x}" for word in np.frombuffer(body, "<u4")[:8]] == case["first_bits"]
        assert digest.decode() == case["sha256"]


def test_noise_of_many_seeds(ask):
    chance = random.Random(10)
    cases = [(chance.randrange(MAX_SEED + 1), chance.choice([1, 2, 3, 63, 1000]), chance.randrange(1 << 32)) for _ in range(300)]
    answers = ask([("noise", " ".join(map(str, case)).encode()) for case in cases])
    for (seed, count, stream), (_, body) in zip(cases, answers, strict=True):
        assert body == normal(seed, (1, 1, count), stream).tobytes()


def test_floats_of_16_bits(ask):
    ((kind, body),) = ask([("narrow_floats", b"")])
    assert kind == "ok"
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = np.concatenate([bits.view(np.float16).astype(np.float32), from_bfloat16(bits)])
    numbers = ~np.isnan(expected)
    assert np.isnan(np.frombuffer(body, np.float32)[~numbers]).all()
    np.testing.assert_array_equal(np.frombuffer(body, np.uint32)[numbers], expected.view(np.uint32)[numbers])


def test_golden_schedules(ask):
    cases = json.loads((GOLDEN / "schedules.json").read_text())
    answers = ask([("schedule", json.dumps(case["arguments"]).encode()) for case in cases])
    for case, (kind, body) in zip(cases, answers, strict=True):
        if "error" in case:
            assert [kind, body.decode()] == case["error"]
            continue
        assert kind == "ok", body
        numbers, steps = np.frombuffer(body, np.float32), len(case["table"])
        np.testing.assert_allclose(numbers[: steps + 1], np.float32(case["sigmas"]), rtol=0, atol=1e-7)
        np.testing.assert_allclose(numbers[steps + 1 :].reshape(steps, 8), np.float32(case["table"]), rtol=1e-7, atol=1e-7)


def test_many_schedules(ask):
    chance = random.Random(11)
    cases = []
    for _ in range(400):
        scheduler = chance.choice(["flow_euler", "flow_dpm_solver", "scm"])
        case = {"scheduler": scheduler, "num_steps": chance.choice([1, 2, 3, 20, 50, 999])}
        if scheduler != "scm":
            case |= {"flow_shift": chance.uniform(0.3, 12), "spacing": chance.choice(["linear", "exponential", "karras"])}
        cases.append(case)
    for case, (kind, body) in zip(cases, ask([("schedule", json.dumps(case).encode()) for case in cases]), strict=True):
        try:
            made = make_schedule(**case)
        except SanaError as error:
            expected = type(error).__name__, str(error)
        else:
            expected = "ok", None
        assert kind == expected[0]
        if kind != "ok":
            assert body.decode() == expected[1]
            continue
        numbers = np.frombuffer(body, np.float32)
        np.testing.assert_allclose(numbers, np.concatenate([made.sigmas, made.table.reshape(-1)]), rtol=1e-7, atol=1e-7)


def test_text_as_python_has_it(ask):
    chance = random.Random(12)
    alphabet = "aZ ÄßİıΣσςΑ\u0301\u200b.\t\u00a0\u3000猫\U0001f600\U00010400'\"\\\x7f\u202e\ufeff1²Ⅷ"
    texts = ["".join(chance.choices(alphabet, k=chance.randrange(12))) for _ in range(2000)]
    texts += [chr(code) for code in range(0, 0x20000, 7) if not 0xD800 <= code < 0xE000]
    for word, python in (("lower", str.lower), ("strip", str.strip), ("repr", repr)):
        for text, (_, got) in zip(texts, ask([(word, text.encode()) for text in texts]), strict=True):
            assert got.decode() == python(text), (word, text)
