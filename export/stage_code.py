"""The files that decide what a stage of a build makes (export/stages.py): a change in one of them makes it anew."""

__all__ = ["ENGINE_CODE", "EXPORT_CODE", "PARITY_CODE", "QUALITY_CODE", "REFERENCE_CODE"]

EXPORT_CODE = (
    "sana_ref/*.py",
    "plugins/*.py",
    "export/accumulation.py",
    "export/components.py",
    "export/fp4_nodes.py",
    "export/onnx_export.py",
    "export/qdq_nodes.py",
    "export/scalars.py",
    "export/token_table.py",
    "export/translation.py",
    "export/weight_only.py",
    "export/weight_only_nodes.py",
    "export/weights.py",
    "export/widen.py",
)
ENGINE_CODE = (
    "sana_ref/fp8.py",
    "sana_ref/quantization.py",
    "sana_ref/quantize_ops.py",
    "sana_ref/quantized_convs.py",
    "plugins/*.py",
    "engines/tensorrt.py",
    "engines/tensorrt_library.py",
    "export/engine_graph.py",
    "export/folding.py",
    "export/fp8_nodes.py",
    "export/epilogue_nodes.py",
    "export/level_nodes.py",
    "export/linear_nodes.py",
    "export/plugin_nodes.py",
    "export/quantized_constants.py",
    "export/quantized_conv_nodes.py",
)
REFERENCE_CODE = (
    "sana_ref/*.py",
    "export/cases.py",
    "export/components.py",
    "export/reference.py",
    "export/references.py",
    "export/wide.py",
    "engines/golden.py",
    "engines/parity_report.py",
    "runtime/noise.py",
    "runtime/prompt.py",
    "runtime/schedule.py",
)
QUALITY_CODE = (
    "export/quality.py",
    "export/metrics/*.py",
    "export/metrics/*.safetensors",
    "engines/quality_report.py",
    "runtime/*.py",
    "sana_ref/*.py",
)
PARITY_CODE = (
    "export/parity.py",
    "export/token_table.py",
    "engines/parity_report.py",
    "engines/token_table.py",
    "plugins/shell.py",
    "plugins/work.py",
    "runtime/bfloat16.py",
    "runtime/cuda.py",
    "runtime/image.py",
    "runtime/token_table.py",
    "runtime/trt_session.py",
)
