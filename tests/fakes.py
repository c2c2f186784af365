"""A tiny bundle with trivial graphs: the interfaces of a real one, and numbers that mean nothing.

Its graphs obey the inputs and outputs of the components, keep their weights in `model.onnx.data` at each component's
precision, and run in ONNX Runtime in well under a millisecond: tests of the bundle, the runtime and the apps need no trained model.
With the default seed the numbers of a fake are within the bounds of its own parity.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from engines.bundle import Bundle, BundleInfo, LatentInfo, PromptInfo, ScheduleInfo, TensorRTInfo
from engines.bundle_writer import write_bundle
from engines.digest import file_sha256
from engines.golden import Golden, golden_name, save_golden
from engines.parity_report import ComponentParity, OutputParity, ParityReport, bound_from, measure
from engines.spec import COMPONENTS, ComponentName, Precision, ShapeRange, Target, component_precision
from engines.token_table import TABLE_NAME, TENSOR

HOST_TABLE: dict[str, Any] = {"schema_version": 3, "token_table_rows": 64}  # fake_info's arguments of a table on the host
LENGTH, CHANNELS, LATENT_CHANNELS, VOCABULARY = 8, 6, 4, 64  # tokens, of a prompt embedding, of the latents, words
ONNX_TYPE = {Precision.FP32: TensorProto.FLOAT, Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}

# Each graph: signature and body in ONNX's own text form, and the shapes of its weights. `*_w` is the stored weight of `*`.
GRAPHS: dict[ComponentName, tuple[str, dict[str, tuple[int, ...]]]] = {
    "text_encoder": (
        f"""(int64[B, S] input_ids, int64[B, S] attention_mask) => (float[B, {LENGTH}, {CHANNELS}] prompt_embeds) {{
            length = Shape <start = 1, end = 2> (input_ids)
            one = Constant <value_ints = [1]> ()
            tail = Constant <value_ints = [{LENGTH - 1}]> ()
            first = Sub (length, tail)
            start = Constant <value_ints = [0]> ()
            ids_head = Slice (input_ids, start, one, one)
            ids_tail = Slice (input_ids, first, length, one)
            ids = Concat <axis = 1> (ids_head, ids_tail)
            mask_head = Slice (attention_mask, start, one, one)
            mask_tail = Slice (attention_mask, first, length, one)
            mask = Concat <axis = 1> (mask_head, mask_tail)
            keep = Cast <to = 1> (mask)
            keep3 = Unsqueeze (keep, two)
            rows = Gather (embedding, ids)
            prompt_embeds = Mul (rows, keep3)
        }}""",
        {"embedding": (VOCABULARY, CHANNELS)},
    ),
    "text_projection": (
        f"""(float[k, B, T, {CHANNELS}] prompt_embeds)
            => (float[1, k, B, 1, T, {CHANNELS}] text_keys, float[1, k, B, 1, T, {CHANNELS}] text_values) {{
            keys = MatMul (prompt_embeds, to_keys)
            text_keys = Unsqueeze (keys, zero_three)
            values = MatMul (prompt_embeds, to_values)
            text_values = Unsqueeze (values, zero_three)
        }}""",
        {"to_keys": (CHANNELS, CHANNELS), "to_values": (CHANNELS, CHANNELS)},
    ),
    "denoiser": (
        f"""(float[B, {LATENT_CHANNELS}, h, w] latents, float[B, {LATENT_CHANNELS}, h, w] previous, float[8] coefficients,
             float[k] guidance_weights, float[1, k, B, 1, {LENGTH}, {CHANNELS}] text_keys,
             float[1, k, B, 1, {LENGTH}, {CHANNELS}] text_values, float[k, B, {LENGTH}] prompt_mask)
            => (float[B, {LATENT_CHANNELS}, h, w] next_latents, float[B, {LATENT_CHANNELS}, h, w] prediction) {{
            t, c_in, c_x, c_v, c_previous, c_noise, p_x, p_v = Split <num_outputs = 8> (coefficients)
            x = Mul (latents, c_in)
            y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, mix)
            image = Tanh (y)
            mask4 = Unsqueeze (prompt_mask, three)
            both = Add (text_keys, text_values)
            both4 = ReduceSum <keepdims = 0> (both, zero_three)  # not Squeeze, which TensorRT for RTX 1.6 refuses
            kept = Mul (both4, mask4)
            text_sum = ReduceSum <keepdims = 0> (kept, two)
            text = MatMul (text_sum, project)
            text5 = Unsqueeze (text, three_four)
            thousandth = Constant <value_float = 0.001> ()
            time = Mul (t, thousandth)
            timed = Add (image, time)
            scaled = Mul (text5, timed)
            v_k = Add (scaled, timed)
            weights = Unsqueeze (guidance_weights, one_to_four)
            weighted = Mul (v_k, weights)
            v = ReduceSum <keepdims = 0> (weighted, zero)
            a = Mul (c_x, latents)
            b = Mul (c_v, v)
            c = Mul (c_previous, previous)
            ab = Add (a, b)
            next_latents = Add (ab, c)
            d = Mul (p_x, latents)
            e = Mul (p_v, v)
            prediction = Add (d, e)
        }}""",
        {"mix": (LATENT_CHANNELS, LATENT_CHANNELS, 3, 3), "project": (CHANNELS, LATENT_CHANNELS)},
    ),
    "decoder": (
        f"""(float[B, {LATENT_CHANNELS}, h, w] latents) => (float[B, 3, H, W] images) {{
            rgb = Conv <kernel_shape = [1, 1]> (latents, to_rgb)
            roi = Constant <value_floats = [0.0]> ()
            scales = Constant <value_floats = [1.0, 1.0, 32.0, 32.0]> ()
            images = Resize <mode = "nearest"> (rgb, roi, scales)
        }}""",
        {"to_rgb": (3, LATENT_CHANNELS, 1, 1)},
    ),
}
ROWS_GRAPH = f"""(float[B, S, {CHANNELS}] inputs_embeds, int64[B, S] attention_mask)
    => (float[B, {LENGTH}, {CHANNELS}] prompt_embeds) {{
    length = Shape <start = 1, end = 2> (inputs_embeds)
    one = Constant <value_ints = [1]> ()
    tail = Constant <value_ints = [{LENGTH - 1}]> ()
    first = Sub (length, tail)
    start = Constant <value_ints = [0]> ()
    head = Slice (inputs_embeds, start, one, one)
    rest = Slice (inputs_embeds, first, length, one)
    rows = Concat <axis = 1> (head, rest)
    mask_head = Slice (attention_mask, start, one, one)
    mask_tail = Slice (attention_mask, first, length, one)
    mask = Concat <axis = 1> (mask_head, mask_tail)
    keep = Cast <to = 1> (mask)
    keep3 = Unsqueeze (keep, two)
    prompt_embeds = Mul (rows, keep3)
}}"""  # the text encoder's, where its table is on the host
AXES = {  # shared constants
    "zero": [0],
    "two": [2],
    "three": [3],
    "zero_three": [0, 3],
    "three_four": [3, 4],
    "one_to_four": [1, 2, 3, 4],
}


def fake_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: shape for _, weights in GRAPHS.values() for name, shape in weights.items()}
    return {name: (rng.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def save_fake_graph(component: ComponentName, path: Path, *, precision: Precision, weights: dict[str, np.ndarray]) -> None:
    """The graph of `component` at `path`, its weights beside it in <name>.data, stored at `precision` and cast to fp32 inside.

    Of a text encoder without `weights`, the one that takes rows.
    """
    text, shapes = GRAPHS[component] if weights else (ROWS_GRAPH, {})
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {component} {text}')
    used = {name for node in model.graph.node for name in node.input}
    for name, axes in AXES.items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), name))
    for name, shape in shapes.items():
        dtype = helper.tensor_dtype_to_np_dtype(ONNX_TYPE[precision])
        stored = numpy_helper.from_array(weights[name].reshape(shape).astype(dtype), f"{name}_w")
        set_external_data(stored, path.name + ".data")
        model.graph.initializer.append(stored)
        model.graph.node.insert(0, helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".data").unlink(missing_ok=True)  # onnx appends
    onnx.save_model(model, str(path))


def fake_inputs(
    component: ComponentName, *, batch: int = 1, height: int = 4, width: int = 6, seed: int = 0
) -> dict[str, np.ndarray]:
    """Valid inputs; height and width in latent cells."""
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((batch, LATENT_CHANNELS, height, width)).astype(np.float32)
    if component == "decoder":
        return {"latents": latents}
    if component == "text_encoder":
        ids = rng.integers(1, VOCABULARY, (batch, LENGTH + 3))
        return {"input_ids": ids.astype(np.int64), "attention_mask": np.ones_like(ids, dtype=np.int64)}
    if component == "text_projection":
        return {"prompt_embeds": rng.standard_normal((2, batch, LENGTH, CHANNELS)).astype(np.float32)}
    text = (1, 2, batch, 1, LENGTH, CHANNELS)
    return {
        "latents": latents,
        "previous": rng.standard_normal(latents.shape).astype(np.float32),
        "coefficients": np.array([500, 1, 1, -0.05, 0.1, 0, 1, -0.5], np.float32),
        "guidance_weights": np.array([-3.5, 4.5], np.float32),
        "text_keys": rng.standard_normal(text).astype(np.float32),
        "text_values": rng.standard_normal(text).astype(np.float32),
        "prompt_mask": (np.arange(LENGTH) < LENGTH - 2).astype(np.float32) * np.ones((2, batch, 1), np.float32),
    }


def save_fake_table(path: Path, table: np.ndarray, **changes: Any) -> None:
    """A table of tokens, (rows, channels) of fp32, fp16 or ml_dtypes' bfloat16; `changes` of its tensor's header."""
    tensor = {"dtype": {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[table.dtype.name], "shape": list(table.shape)}
    header = json.dumps({TENSOR: tensor | {"data_offsets": [0, table.nbytes]} | changes}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + table.tobytes())


def open_session(model: str | bytes) -> Any:
    """ONNX Runtime's, of a path or a graph, with one thread: to start others, which then wait busily, takes longer than to run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def save_fake_tokenizer(path: Path) -> None:
    """Whole words from a short list, <unk> for the rest; <bos> first, as Gemma's."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *"a an red green blue apple cat dog house on the left of and".split()]
    vocabulary = {word: index for index, word in enumerate(words)}
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": vocabulary[word], "content": word, **special} for word in words[:4]],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocabulary["<bos>"]], "tokens": ["<bos>"]}},
        },
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    path.write_text(json.dumps(document), encoding="utf-8")


def fake_info(
    *,
    precision: Precision | dict[ComponentName, Precision] = Precision.FP16,
    targets: Sequence[Target] = (),
    tensorrt_version: str = "1.2.3",
    **changes: Any,
) -> BundleInfo:
    values: dict[str, Any] = {
        "model": "fake",
        "model_digest": "0" * 64,
        "variant": "custom",
        "precision": component_precision(precision) if isinstance(precision, Precision) else precision,
        "ranges": ShapeRange(min_side=32, opt_side=64, max_side=128, max_batch=4, max_sequence_length=LENGTH),
        "targets": tuple(targets),
        "tensorrt": TensorRTInfo(flavor="rtx", version=tensorrt_version) if targets else None,
        "plugins": {component: {} for component in COMPONENTS},
        "schedule": ScheduleInfo(scheduler="flow_euler", num_inference_steps=4, guidance_scale=4.5),
        "prompt": PromptInfo(complex_human_instruction="", max_sequence_length=LENGTH),
        "latents": LatentInfo(channels=LATENT_CHANNELS, scaling_factor=0.41407),
        "guidance_embeds": False,
        "caption_channels": CHANNELS,
        "licence": "none: made for tests",
    }
    return BundleInfo(**{**values, **changes})


def fill_fake_bundle(folder: Path, info: BundleInfo, *, seed: int = 0, wrong_weight: str | None = None) -> None:
    """Everything but the manifest. The golden outputs are those of fp32 weights, so the weights' rounding is the error that the
    report allows twice. wrong_weight: the name of one whose first channel is scaled by 1.05 in the bundle alone."""
    exact, stored = fake_weights(seed), fake_weights(seed)
    if wrong_weight is not None:
        stored[wrong_weight][0] *= 1.05
    reports: dict[ComponentName, ComponentParity] = {}
    for component in COMPONENTS:
        graph = folder / component / "model.onnx"
        inputs = fake_inputs(component)
        save_fake_graph(component, graph, precision=Precision.FP32, weights=exact)
        reference = run_onnx(graph, inputs)
        save_fake_graph(component, graph, precision=info.precision[component], weights=exact)
        rounded = run_onnx(graph, inputs)
        save_fake_graph(component, graph, precision=info.precision[component], weights=stored)
        if component == "text_encoder" and info.token_table_rows:
            save_fake_graph(component, graph, precision=info.precision[component], weights={})
            table = stored["embedding"][: info.token_table_rows].astype(
                helper.tensor_dtype_to_np_dtype(ONNX_TYPE[info.precision[component]])
            )
            save_fake_table(folder / TABLE_NAME, table)
        golden = folder / golden_name(component)
        golden.parent.mkdir(exist_ok=True)
        save_golden(golden, {"small": Golden(inputs=inputs, outputs=reference)})
        outputs = {}
        for name in reference:
            error = measure(rounded[name], reference[name])
            outputs[name] = OutputParity(pytorch=error, onnxruntime=error, bound=bound_from(error))
        reports[component] = ComponentParity(precision=info.precision[component], outputs=outputs)
        if info.targets:
            (folder / component / f"{'-'.join(info.targets)}.engine").write_bytes(f"not a real engine of {component}".encode())
    report = ParityReport(reference="fp32 PyTorch", components=reports, machine="tests", versions={})
    (folder / "parity.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    save_fake_tokenizer(folder / "tokenizer" / "tokenizer.json")


def write_fake_bundle(out: Path, *, seed: int = 0, wrong_weight: str | None = None, **info: Any) -> Bundle:
    """A valid bundle at `out`. `seed` decides its weights; the others are fake_info's arguments, such as HOST_TABLE."""
    with write_bundle(out) as writer:
        description = fake_info(**info)
        fill_fake_bundle(writer.path, description, seed=seed, wrong_weight=wrong_weight)
        return writer.finish(description)


HALVES = np.ones((64, 6), np.float16)


def only(component: ComponentName, bundle: Path, folder: Path) -> Path:
    """A copy whose manifest has one component, as development builds them."""
    shutil.copytree(bundle, folder)
    document = json.loads((folder / "manifest.json").read_bytes())
    others = tuple(f"{name}/" for name in COMPONENTS if name != component)
    document["files"] = {name: entry for name, entry in document["files"].items() if not name.startswith(others)}
    document["precision"], document["plugins"] = {component: document["precision"][component]}, {component: {}}
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def with_table(pristine: Path, folder: Path, write: Callable[[Path], object]) -> Path:
    """A copy of a bundle with HOST_TABLE, with another table and a manifest that fits: what a program with a bug would write."""
    shutil.copytree(pristine, folder)
    write(folder / TABLE_NAME)
    document = json.loads((folder / "manifest.json").read_bytes())
    size = (folder / TABLE_NAME).stat().st_size
    document["files"][TABLE_NAME] |= {"sha256": file_sha256(folder / TABLE_NAME), "size": size}
    (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _changed(table: np.ndarray, **changes: object) -> Callable[[Path], object]:
    return lambda path: save_fake_table(path, table, **changes)


WRONG_TABLES: dict[str, tuple[Callable[[Path], object], str]] = {  # name: what writes it, and words of the message
    "cut": (_cut, r"got 766 bytes of rows; expected 768\. Copy the file again"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "got 769 bytes of rows; expected 768"),
    "fp16": (_changed(HALVES), "token_table: dtype: got 'F16'; expected 'BF16'"),
    "rows": (_changed(HALVES[1:], dtype="BF16"), r"token_table: shape: got \[63, 6\]; expected \[64, 6\]\. Rebuild"),
    "channels": (_changed(HALVES.reshape(48, 8), dtype="BF16"), r"shape: got \[48, 8\]; expected \[64, 6\]"),
    "no shape": (_changed(HALVES, dtype="BF16", shape=None), r"shape: got None; expected \[64, 6\]"),
    "floats": (_changed(HALVES, dtype="BF16", shape=[64.0, 6]), r"shape: got \[64\.0, 6\]; expected \[64, 6\]"),
    "elsewhere": (_changed(HALVES, dtype="BF16", data_offsets=[2, 770]), r"data_offsets: got \[2, 770\]; expected \[0, 768\]"),
    "empty": (lambda path: path.write_bytes(b""), "got 0 bytes that do not begin as a safetensors file"),
    "seven": (lambda path: path.write_bytes(bytes(7)), "got 7 bytes that do not begin"),
    "eight": (lambda path: path.write_bytes(bytes(8)), "not JSON at line 1"),
    "long header": (lambda path: path.write_bytes(b"\xff" * 8 + bytes(64)), "got 72 bytes that do not begin as a safetensors"),
    "another tensor": (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"{}"), "got no tensor 'token_table'"),
    "a list": (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"[]"), "got no tensor 'token_table'"),
    "not JSON": (lambda path: path.write_bytes(b"\x02" + bytes(7) + b"{?"), "not JSON at line 1, column 2"),
}
