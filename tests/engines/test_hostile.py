"""Every file of tests/data/hostile is refused with the error that says why, and never with another exception."""

import importlib.util
import json
from pathlib import Path

import pytest

from engines.bundle import Bundle, parse_manifest
from engines.errors import BundleError, ManifestError, SchemaVersionError, UnsafePathError
from engines.manifest import MAX_FILES
from engines.onnx_locations import external_locations
from engines.strict import MAX_JSON_BYTES, loads

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"

MANIFESTS = {  # name: error, and words of its message
    "newer_schema": (SchemaVersionError, "got schema 5, this program reads 2 to 4: upgrade"),
    "older_schema": (SchemaVersionError, "got schema 1, this program reads 2 to 4: rebuild the bundle"),
    "schema_zero": (ManifestError, "schema_version: got 0"),
    "schema_true": (ManifestError, "schema_version: got True"),
    "table_of_old_schema": (ManifestError, "schema_version: got 2 with token_table_rows; expected 3 or 4"),
    "table_without_file": (ManifestError, "token_table_rows: got 8 and no file text_encoder/token_table.safetensors"),
    "table_without_rows": (ManifestError, "token_table_rows: got 0 and a file text_encoder/token_table.safetensors"),
    "table_without_encoder": (ManifestError, "token_table_rows: got 8 without a text encoder; expected none"),
    "table_of_null_rows": (ManifestError, "token_table_rows: got None; input should be a valid integer"),
    "unknown_key": (ManifestError, "licens: unknown key; did you mean 'licence'?"),
    "unknown_key_inside": (ManifestError, "latents.scaling_facter: unknown key; did you mean 'scaling_factor'?"),
    "missing_key": (ManifestError, "latents: missing"),
    "not_an_object": (ManifestError, "input should be an object"),
    "no_files": (ManifestError, "got no model.onnx"),
    "itself": (ManifestError, "got manifest.json itself"),
    "odd_side": (ManifestError, "ranges.min_side: got 33; input should be a multiple of 32"),
    "negative_size": (ManifestError, "size: got -1"),
    "short_digest": (ManifestError, "sha256"),
    "path_parent": (UnsafePathError, "'../secret', which leads out"),
    "path_parent_inside": (UnsafePathError, "leads out"),
    "path_absolute": (UnsafePathError, "'/etc/passwd', which leads out"),
    "path_backslash": (UnsafePathError, "leads out"),
    "path_drive": (UnsafePathError, "leads out"),
    "path_dot": (UnsafePathError, "'./decoder/x'"),
    "path_double_slash": (UnsafePathError, "single '/'"),
    "path_hidden": (UnsafePathError, "do not start with a dot"),
    "path_nul": (UnsafePathError, "expected names of letters"),
    "path_newline": (UnsafePathError, "expected names of letters"),
    "path_space": (UnsafePathError, "expected names of letters"),
    "path_dotdot_lookalike": (UnsafePathError, "expected names of letters"),
    "path_surrogate": (ManifestError, ""),  # not a string at all to the validator
    "path_empty": (UnsafePathError, "path of 0 characters"),
    "path_long": (UnsafePathError, "path of 241 characters; expected 1 to 240"),
    "engine_outside_targets": (ManifestError, "for a GPU outside targets"),
    "targets_without_engines": (ManifestError, "no engine of decoder for sm80"),
    "truncated": (ManifestError, "the file ends too early: copy it again"),
    "empty": (ManifestError, "the file ends too early"),
    "nan": (ManifestError, "got NaN; expected finite numbers"),
    "infinity": (ManifestError, "got -Infinity; expected finite numbers"),
    "overflow": (ManifestError, "scaling_factor"),
    "key_twice": (ManifestError, "the key 'model' is there twice"),
    "not_utf8": (ManifestError, "utf-8"),
    "byte_order_mark": (ManifestError, "BOM"),
    "huge_integer": (ManifestError, "digits"),
    "python_literal": (ManifestError, "not JSON at line"),
}
LEADING_OUT = {  # name: the location that it names
    "initializer": "../../secret",
    "initializer_absolute": "/etc/passwd",
    "initializer_beside_unlisted": "unlisted.data",
    "initializer_dot": "./model.onnx.data",
    "initializer_memory_address": "*/_ORT_MEM_ADDR_/*",
    **dict.fromkeys(
        ["sparse_initializer", "attribute", "attribute_tensors", "attribute_sparse", "subgraph", "subgraphs", "function"],
        "../../secret",
    ),
    **dict.fromkeys(["function_default", "training"], "../../secret"),
}
NOT_ONNX = {
    "truncated": "cut off|passes its end|bytes at",
    "length_past_end": "are left",
    "number_too_long": "more than 10 bytes",
    "group": "wire type 3",
    "empty": "got 0 bytes",
    "deep": "nested more than",
    "not_onnx": "not an ONNX file",
}


def test_every_file_has_its_test():
    assert {path.name for path in HOSTILE.iterdir() if path.is_file()} == (
        {"make.py"} | {f"{name}.json" for name in MANIFESTS} | {f"{name}.onnx" for name in (*LEADING_OUT, *NOT_ONNX)}
    )


def test_files_are_those_that_the_script_makes():
    spec = importlib.util.spec_from_file_location("make_hostile", HOSTILE / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert {name: (HOSTILE / name).read_bytes() for name in make.all_files()} == make.all_files()
    parse_manifest(json.dumps(make.VALID).encode(), source="the manifest that the others are made from")


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_refused(name):
    error, words = MANIFESTS[name]
    with pytest.raises(error) as caught:
        parse_manifest((HOSTILE / f"{name}.json").read_bytes(), source="manifest.json")
    assert caught.type is error
    assert words in str(caught.value)
    assert str(caught.value).startswith("manifest.json")


def test_deep_nesting_is_refused():
    with pytest.raises(ManifestError, match="nested too deeply"):
        loads(b"[" * 1_000_000, source="manifest.json")


def test_too_many_files_are_refused():
    valid = json.loads((HOSTILE / "itself.json").read_bytes())
    entry = valid["files"].pop("manifest.json")
    valid["files"] |= {f"f{index}": entry for index in range(MAX_FILES)}
    with pytest.raises(ManifestError, match="got 10001 files; expected at most 10000"):
        parse_manifest(json.dumps(valid).encode(), source="manifest.json")


def test_large_manifest_is_not_read(tmp_path):
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room on the disk
    with pytest.raises(ManifestError, match=f"got more than {MAX_JSON_BYTES} bytes"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("name", LEADING_OUT)
def test_location_is_found_wherever_a_tensor_can_be(name):
    assert external_locations(HOSTILE / f"{name}.onnx") == {LEADING_OUT[name]}


@pytest.mark.parametrize("name", NOT_ONNX)
def test_bytes_that_are_not_onnx_are_refused(name):
    with pytest.raises(BundleError, match=NOT_ONNX[name]):
        external_locations(HOSTILE / f"{name}.onnx")
