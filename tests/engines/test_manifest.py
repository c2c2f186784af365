"""Manifests survive writing and reading, and no bytes make the reader raise anything but its own errors."""

import contextlib
import json

import pytest
from fakes import fake_info
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engines.bundle import parse_manifest
from engines.digest import PART_BYTES, num_parts
from engines.errors import BundleError, ManifestError
from engines.manifest import FileEntry, Manifest, PromptInfo, ScheduleInfo, engine_targets
from engines.spec import COMPONENTS, Precision, Target
from engines.token_table import TABLE_NAME

positive = st.floats(min_value=1e-6, max_value=1e6)
schedules = st.builds(
    ScheduleInfo,
    scheduler=st.sampled_from(["flow_euler", "flow_dpm_solver", "scm"]),
    flow_shift=positive,
    num_inference_steps=st.integers(1, 1000),
    guidance_scale=st.floats(0, 100),
    max_timestep=st.none() | positive,
)
entries = st.builds(
    FileEntry,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    size=st.integers(0, 1 << 50),
    role=st.sampled_from(["graph", "weights", "engine", "tokenizer", "golden", "report", "licence"]),
)


@st.composite
def large_entries(draw: st.DrawFn) -> FileEntry:
    size = draw(st.integers(PART_BYTES + 1, 5 * PART_BYTES))
    digests = st.text("0123456789abcdef", min_size=64, max_size=64)
    parts = draw(st.lists(digests, min_size=num_parts(size), max_size=num_parts(size)))
    return FileEntry(sha256=draw(digests), size=size, role="engine", parts=tuple(parts))


entries = entries | large_entries()
names = st.from_regex(r"[a-z0-9_]{1,8}(/[a-z0-9_]{1,8}\.txt){0,2}", fullmatch=True)
# Text as people write instructions: any character that UTF-8 can carry.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    targets = tuple(sorted(draw(st.sets(st.sampled_from(list(Target)), max_size=3))))
    entry = draw(entries)
    files = {f"{component}/model.onnx": entry for component in COMPONENTS} | draw(st.dictionaries(names, entries, max_size=4))
    if targets:
        files |= {f"{component}/{'-'.join(targets)}.engine": entry for component in COMPONENTS}
    on_host = draw(st.booleans())
    if on_host:
        files[TABLE_NAME] = entry
    info = fake_info(
        targets=targets,
        schema_version=draw(st.sampled_from([3, 4] if on_host else [2, 3, 4])),
        token_table_rows=draw(st.integers(1, 1 << 30)) if on_host else 0,
        schedule=draw(schedules),
        prompt=PromptInfo(complex_human_instruction=draw(texts), max_sequence_length=8),
        licence=draw(texts),
        plugins={component: draw(st.dictionaries(st.sampled_from(["A", "B"]), st.integers(1, 99))) for component in COMPONENTS},
    )
    return Manifest(**dict(info), files=files)


@pytest.mark.slow
@given(manifests())
def test_round_trip(manifest):
    text = manifest.model_dump_json(indent=1)
    assert ("token_table_rows" in text) == (TABLE_NAME in manifest.files)  # what programs of before need not know is not written
    again = parse_manifest(text.encode(), source="test")
    assert again == manifest
    assert again.model_dump_json(indent=1) == text  # so the digest of a bundle does not depend on who wrote it
    for component in COMPONENTS:
        for target in Target:
            found = manifest.engine_name(component, target)
            assert (found is not None) == (target in manifest.targets)


VALID = Manifest(
    **dict(fake_info()), files={f"{c}/model.onnx": FileEntry(sha256="0" * 64, size=1, role="graph") for c in COMPONENTS}
)
VALID_BYTES = VALID.model_dump_json(indent=1).encode()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def read_or_refuse(data: bytes) -> None:
    with contextlib.suppress(BundleError):
        parse_manifest(data, source="test")


@given(st.binary(max_size=200))
def test_any_bytes(data):
    read_or_refuse(data)


@given(st.integers(0, len(VALID_BYTES) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_damaged_bytes(at, inserted, removed):
    read_or_refuse(VALID_BYTES[:at] + inserted + VALID_BYTES[at + removed :])


@given(st.integers(0, len(VALID_BYTES.rstrip()) - 2))
def test_every_prefix_is_refused(length):
    with pytest.raises(ManifestError):
        parse_manifest(VALID_BYTES[:length], source="test")


@given(st.data())
def test_any_value_in_any_place(data):
    document = json.loads(VALID_BYTES)
    at = document
    while True:
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(json_values)
    read_or_refuse(json.dumps(document).encode())


def test_manifest_is_checked_when_it_is_built_too():
    with pytest.raises(ValidationError, match="expected text_encoder, text_projection, denoiser, decoder"):
        Manifest(**dict(fake_info(plugins={})), files=VALID.files)
    unlike = {**VALID.precision, "text_projection": Precision.BF16}
    with pytest.raises(ValidationError, match="got bf16 for text_projection and fp16 for denoiser; expected fp16 for the first"):
        Manifest(**dict(fake_info(precision=unlike)), files=VALID.files)
    with pytest.raises(ValidationError, match="expected both or neither"):
        fake_info(tensorrt=None, targets=(Target.SM80,))
    with pytest.raises(ValidationError, match="expected the same"):
        fake_info(prompt=PromptInfo(complex_human_instruction="", max_sequence_length=9))
    quantized = {**VALID.precision, "denoiser": Precision.FP8, "text_projection": Precision.FP16}
    assert Manifest(**dict(fake_info(precision=quantized)), files=VALID.files).precision == quantized


def test_an_engines_name_lists_its_targets():
    assert engine_targets("denoiser/sm80-sm120.engine") == ("sm80", "sm120")
    assert engine_targets("denoiser/model.onnx") == ()
