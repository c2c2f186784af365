"""Makes the hostile files in this folder: python tests/data/hostile/make.py. tests/engines/test_hostile.py says what each causes.

Each manifest differs from one valid manifest in one thing; each graph keeps a tensor outside the bundle in one of the places where
ONNX allows a tensor.
"""

import json
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

SHA = "0" * 64
VALID: dict[str, Any] = {
    "schema_version": 2,
    "model": "hostile",
    "model_digest": SHA,
    "variant": "custom",
    "precision": {"decoder": "bf16"},
    "ranges": {"min_side": 32, "opt_side": 64, "max_side": 128, "max_batch": 1, "max_sequence_length": 8},
    "targets": [],
    "tensorrt": None,
    "plugins": {"decoder": {}},
    "schedule": {"scheduler": "flow_euler", "num_inference_steps": 2, "guidance_scale": 4.5},
    "prompt": {"complex_human_instruction": "", "max_sequence_length": 8},
    "latents": {"channels": 4, "scaling_factor": 0.41407},
    "guidance_embeds": False,
    "caption_channels": 6,
    "licence": "none",
    "files": {"decoder/model.onnx": {"sha256": SHA, "size": 0, "role": "graph"}},
}


def with_file(name: str) -> dict[str, Any]:
    return {**VALID, "files": {**VALID["files"], name: {"sha256": SHA, "size": 0, "role": "weights"}}}


def manifests() -> dict[str, bytes]:
    text = json.dumps(VALID, indent=1)
    documents: dict[str, Any] = {
        "newer_schema": {**VALID, "schema_version": 5, "a_key_of_the_future": True},
        "older_schema": {**VALID, "schema_version": 1},
        "schema_zero": {**VALID, "schema_version": 0},
        "schema_true": {**VALID, "schema_version": True},
        "table_of_old_schema": {**VALID, "token_table_rows": 8},
        "table_without_file": {**VALID, "schema_version": 3, "token_table_rows": 8},
        "table_without_rows": {**with_file("text_encoder/token_table.safetensors"), "schema_version": 3},
        "table_without_encoder": {**with_file("text_encoder/token_table.safetensors"), "schema_version": 3, "token_table_rows": 8},
        "table_of_null_rows": {**VALID, "schema_version": 3, "token_table_rows": None},
        "unknown_key": {**VALID, "licens": "none"},
        "unknown_key_inside": {**VALID, "latents": {**VALID["latents"], "scaling_facter": 1.0}},
        "missing_key": {key: value for key, value in VALID.items() if key != "latents"},
        "not_an_object": [VALID],
        "no_files": {**VALID, "files": {}},
        "itself": with_file("manifest.json"),
        "odd_side": {**VALID, "ranges": {**VALID["ranges"], "min_side": 33}},
        "negative_size": {**VALID, "files": {"decoder/model.onnx": {"sha256": SHA, "size": -1, "role": "graph"}}},
        "short_digest": {**VALID, "files": {"decoder/model.onnx": {"sha256": SHA[1:], "size": 0, "role": "graph"}}},
        "path_parent": with_file("../secret"),
        "path_parent_inside": with_file("decoder/../../secret"),
        "path_absolute": with_file("/etc/passwd"),
        "path_backslash": with_file("decoder\\..\\..\\secret"),
        "path_drive": with_file("C:/secret"),
        "path_dot": with_file("./decoder/x"),
        "path_double_slash": with_file("decoder//x"),
        "path_hidden": with_file("decoder/.bashrc"),
        "path_nul": with_file("decoder/x\0.data"),
        "path_newline": with_file("decoder/x\n"),
        "path_space": with_file("decoder/x "),
        "path_dotdot_lookalike": with_file("decoder/\u2024\u2024/x"),
        "path_surrogate": with_file("decoder/\ud800"),
        "path_empty": with_file(""),
        "path_long": with_file("a" * 241),
        "engine_outside_targets": with_file("decoder/sm80.engine"),
        "targets_without_engines": {**VALID, "targets": ["sm80"], "tensorrt": {"flavor": "rtx", "version": "1.7.1"}},
    }
    return {f"{name}.json": json.dumps(value, indent=1).encode() for name, value in documents.items()} | {
        "truncated.json": text[: len(text) // 2].encode(),
        "empty.json": b"",
        "nan.json": text.replace("0.41407", "NaN").encode(),
        "infinity.json": text.replace("0.41407", "-Infinity").encode(),
        "overflow.json": text.replace("0.41407", "1e999").encode(),
        "key_twice.json": text.replace('"licence"', '"model": "another",\n "licence"').encode(),
        "not_utf8.json": text.replace("hostile", "h\u00f6stile").encode("latin-1"),
        "byte_order_mark.json": b"\xef\xbb\xbf" + text.encode(),
        "huge_integer.json": text.replace('"caption_channels": 6', '"caption_channels": ' + "9" * 5000).encode(),
        "python_literal.json": text.replace("false", "False").encode(),
    }


def outside(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def graphs() -> dict[str, bytes]:
    tensor = outside("../../secret")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    node = helper.make_node("Constant", [], ["y"], value=tensor)
    sparse = onnx.SparseTensorProto(values=outside("../../secret"), dims=[1])
    places: dict[str, dict[str, Any]] = {
        "initializer": {"initializer": [tensor]},
        "initializer_absolute": {"initializer": [outside("/etc/passwd")]},
        "initializer_beside_unlisted": {"initializer": [outside("unlisted.data")]},
        "initializer_dot": {"initializer": [outside("./model.onnx.data")]},
        "initializer_memory_address": {"initializer": [outside("*/_ORT_MEM_ADDR_/*")]},
        "sparse_initializer": {"sparse_initializer": [sparse]},
        "attribute": {"node": [node]},
        "attribute_tensors": {"node": [helper.make_node("Custom", [], ["y"], values=[tensor, tensor])]},
        "attribute_sparse": {"node": [helper.make_node("Constant", [], ["y"], sparse_value=sparse)]},
        "subgraph": {"node": [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]},
        "subgraphs": {"node": [helper.make_node("Custom", [], ["y"], graphs=[inner])]},
    }
    models = {name: onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g", **parts)) for name, parts in places.items()}
    models["function"] = onnx.ModelProto(ir_version=10, functions=[onnx.FunctionProto(name="f", domain="d", node=[node])])
    default = helper.make_attribute("value", tensor)
    models["function_default"] = onnx.ModelProto(ir_version=10, functions=[onnx.FunctionProto(name="f", attribute_proto=[default])])
    models["training"] = onnx.ModelProto(
        ir_version=10, training_info=[onnx.TrainingInfoProto(initialization=inner, algorithm=inner)]
    )
    made = {f"{name}.onnx": model.SerializeToString(deterministic=True) for name, model in models.items()}
    deep = b"\x12\x00"
    for _ in range(200):  # graph -> node -> attribute -> graph -> ...; each a length and what it holds
        for field in (6, 5, 1):
            deep = bytes([field << 3 | 2]) + _varint(len(deep)) + deep
    return made | {
        "truncated.onnx": made["initializer.onnx"][:-3],
        "length_past_end.onnx": b"\x3a\xff\xff\xff\xff\x0f",
        "number_too_long.onnx": b"\x08" + b"\xff" * 11,
        "group.onnx": b"\x3b\x3c",
        "empty.onnx": b"",
        "deep.onnx": b"\x3a" + _varint(len(deep)) + deep,
        "not_onnx.onnx": b"PK\x03\x04 this is another kind of file",
    }


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def all_files() -> dict[str, bytes]:
    return manifests() | graphs()


if __name__ == "__main__":
    for name, data in all_files().items():
        (Path(__file__).parent / name).write_bytes(data)
