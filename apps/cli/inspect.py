"""`sana inspect BUNDLE`: what is inside, on which GPUs it runs, and how far its numbers are from the reference's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli.output import add_row, make_console, make_table, printable
from engines.disk import human_bytes

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from engines.parity_report import Bound, ErrorStats, ParityReport
    from engines.quality_report import QualityReport
    from engines.quantization_report import QuantizationReport
    from engines.spec import ComponentName
    from engines.weight_report import WeightReport

__all__ = ["DESCRIPTION", "GPUS", "HELP", "NAME", "add_arguments", "read_quantization", "read_report", "run"]

NAME = "inspect"
HELP = "say what is in a bundle"
DESCRIPTION = "Say what is in a bundle. Digests are not compared: that is `sana verify`."

GPUS = {  # the GPUs that people know an architecture by
    "sm80": "A100, A30",
    "sm86": "RTX 30, A10, A40",
    "sm89": "RTX 40, L4, L40S",
    "sm90": "H100, H200",
    "sm100": "B200",
    "sm120": "RTX 50, RTX PRO 6000",
    "sm121": "GB10",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the folder of a bundle")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.add_argument("--open", action="store_true", help="open the page of pictures in a browser, where the bundle has one")


def read_report(bundle: Bundle) -> ParityReport | None:
    """parity.json of the bundle; None if it has none. Raises ManifestError."""
    from engines.parity_report import parse_report
    from engines.strict import read_bounded

    if "parity.json" not in bundle.manifest.files:
        return None
    path = bundle.file("parity.json")
    return parse_report(read_bounded(path), source=str(path))


def read_quantization(bundle: Bundle) -> QuantizationReport | None:
    """How the denoiser was quantized; None if it was not, or nobody said. Raises ManifestError."""
    from engines.quantization_report import QUANTIZATION_NAME, parse_quantization
    from engines.strict import read_bounded

    if QUANTIZATION_NAME not in bundle.manifest.files:
        return None
    path = bundle.file(QUANTIZATION_NAME)
    return parse_quantization(read_bounded(path), source=str(path))


def read_weights(bundle: Bundle) -> dict[ComponentName, WeightReport]:
    """Of components whose weights alone are quantized. Raises ManifestError."""
    from engines.strict import read_bounded
    from engines.weight_report import parse_weights, weights_name

    names = [name for name in bundle.manifest.components if name != "denoiser" and weights_name(name) in bundle.manifest.files]
    paths = {name: bundle.file(weights_name(name)) for name in names}
    return {name: parse_weights(read_bounded(path), source=str(path)) for name, path in paths.items()}


def run(arguments: argparse.Namespace) -> int:
    from engines.bundle import Bundle

    bundle = Bundle.open(arguments.bundle, verify=False)
    report = read_report(bundle)
    if arguments.json:
        print(json.dumps(_as_json(bundle, report), indent=1))
    else:
        _show(bundle, report)
    if arguments.open:
        _open(bundle, report)
    return 0


def _as_json(bundle: Bundle, report: ParityReport | None) -> dict[str, Any]:
    quantization = read_quantization(bundle)
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "size": sum(entry.size for entry in bundle.manifest.files.values()),
        "manifest": bundle.manifest.model_dump(mode="json"),
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
        "weights": {name: weights.model_dump(mode="json") for name, weights in read_weights(bundle).items()},
        "parity": None if report is None else report.model_dump(mode="json"),
    }


def _show(bundle: Bundle, report: ParityReport | None) -> None:
    console = make_console()
    overview = make_table(str(bundle.path), "", "")
    overview.show_header = False
    for key, value in _overview(bundle):
        add_row(overview, key, value)
    console.print(overview)
    components = make_table("Components", "component", "precision", "graph", "weights", "engines", "plugins")
    for component in bundle.manifest.components:
        plugins = bundle.manifest.plugins[component]
        add_row(
            components,
            component,
            bundle.manifest.precision[component],
            *(human_bytes(_size(bundle, component, role)) for role in ("graph", "weights", "engine")),
            ", ".join(f"{count} x {op}" for op, count in plugins.items()) or "none",
        )
    console.print(components)
    if (quantization := read_quantization(bundle)) is not None:
        print("Quantization of the denoiser")
        for line in quantization.lines():
            print(f"  {printable(line)}")
        print()
    for name, weights in read_weights(bundle).items():
        print(f"Weights of the {name.replace('_', ' ')}")
        for line in weights.lines():
            print(f"  {printable(line)}")
        print()
    if report is None:
        print("No parity.json: nobody has compared this bundle with the reference.")
    else:
        _show_parity(report)
        _show_quality(bundle, report.quality)


def _overview(bundle: Bundle) -> list[tuple[str, str]]:
    m = bundle.manifest
    tensorrt = m.tensorrt and f"{'TensorRT for RTX' if m.tensorrt.flavor == 'rtx' else 'TensorRT'} {m.tensorrt.version}"
    gpus = "; ".join(f"{target} ({GPUS.get(target, '')})" for target in m.targets)
    instruction = m.prompt.complex_human_instruction
    first_line = instruction.splitlines()[0] if instruction else "none"
    return [
        ("model", f"{m.model} (variant {m.variant})"),
        ("bundle digest", bundle.digest),
        ("model digest", m.model_digest),
        ("size", f"{human_bytes(sum(entry.size for entry in m.files.values()))} in {len(m.files)} files"),
        ("runs on", f"{gpus}; any CPU by ONNX Runtime" if gpus else "any CPU by ONNX Runtime; no engines for GPUs"),
        ("TensorRT", str(tensorrt or "none")),
        ("side", f"{m.ranges.min_side} to {m.ranges.max_side} px, {m.ranges.opt_side} unless asked"),
        ("batch", f"up to {m.ranges.max_batch}"),
        (
            "schedule",
            f"{m.schedule.scheduler}, {m.schedule.num_inference_steps} steps, guidance {m.schedule.guidance_scale:g}"
            f"{' (embedded)' if m.guidance_embeds else ''}"
            + ("" if m.schedule.scheduler == "scm" else f", shift {m.schedule.flow_shift:g}"),
        ),
        ("prompt", f"up to {m.prompt.max_sequence_length} tokens; instruction: {first_line}"),
        *([("table of tokens", f"{m.token_table_rows} rows, on the host")] if m.token_table_rows else []),
        (
            "latents",
            f"{m.latents.channels} channels, 1 cell is {m.latents.px_per_latent} px a side, scaled by {m.latents.scaling_factor:g}",
        ),
        ("licence", m.licence.splitlines()[0] if m.licence else "not said"),
    ]


def _size(bundle: Bundle, component: str, role: str) -> int:
    files = bundle.manifest.files.items()
    return sum(entry.size for name, entry in files if entry.role == role and name.startswith(f"{component}/"))


def _show_parity(report: ParityReport) -> None:
    """One row for each output and each program that computed it."""
    table = make_table(
        f"Errors against {report.reference}, relative to its root mean square",
        *("component", "output", "by", "rms", "bound", "max", "bound", "mean"),
        numbers_from=3,
    )
    for component, parity in report.components.items():
        for output, errors in parity.outputs.items():
            rows = (
                (f"PyTorch {parity.precision}", errors.pytorch, None),
                ("ONNX Runtime", errors.onnxruntime, errors.bound_of("onnxruntime")),
                ("TensorRT", errors.tensorrt, errors.bound_of("tensorrt")),
            )
            for by, stats, bound in rows:
                add_row(table, component, output, by, *_numbers(stats, bound))
    make_console().print(table)
    print(f"Measured on {printable(report.machine)}. The mean error is bounded by a share of the rms: docs/bundle.md.")


def _show_quality(bundle: Bundle, quality: QualityReport | None) -> None:
    if quality is None:
        print("No quality section: no pictures of this bundle were compared with others.")
        return
    from engines.quality_report import PAGE_NAME

    print("\nQuality of pictures")
    for line in quality.lines():
        print(f"  {printable(line)}")
    print(f"  pictures side by side: {printable(str(bundle.path / PAGE_NAME))} (--open opens it)")


def _open(bundle: Bundle, report: ParityReport | None) -> None:
    """Let a browser at the page, if it is the very page that the section makes: one of other people's could run scripts.

    Raises BundleError if there is none, another one, or no browser; DigestError for pictures that were changed.
    """
    from engines.digest import file_sha256
    from engines.errors import BundleError, DigestError
    from engines.quality_report import PAGE_NAME, page
    from engines.strict import read_bounded

    if report is None or report.quality is None or PAGE_NAME not in bundle.manifest.files:
        raise BundleError(f"{bundle.path}: got no {PAGE_NAME}; expected a bundle with a quality section. Build it anew.")
    path = bundle.file(PAGE_NAME)
    if read_bounded(path) != page(report.quality).encode():
        raise BundleError(
            f"{path}: got another page than the quality section of parity.json makes with this version; expected that one. "
            "Open the file yourself if you trust who made the bundle."
        )
    for row in report.quality.rows:
        for picture in row.pictures:
            name = PAGE_NAME.replace("index.html", picture)
            entry = bundle.manifest.files.get(name)
            if entry is None or file_sha256(bundle.file(name)) != entry.sha256:
                raise DigestError(f"{bundle.path}: {name} was changed, or is not listed. Copy the bundle again, or rebuild.")
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        raise BundleError(f"{path}: got no browser on this machine; expected one. Copy the folder quality/ to one that has.")


def _numbers(stats: ErrorStats | None, bound: Bound | None) -> tuple[str, str, str, str, str]:
    most = ("", "") if bound is None else (f"{bound.rms:.2e}", f"{bound.max:.2e}")
    if stats is None:
        return ("not measured", most[0], "", most[1], "")
    return (f"{stats.rms:.2e}", most[0], f"{stats.max:.2e}", most[1], f"{stats.mean:+.1e}")
