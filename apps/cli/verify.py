"""`sana verify BUNDLE`: every digest, and then the parity check again on this machine.

The golden inputs that came with the bundle go through the back end; what comes out is held against the reference's outputs and the
bounds of parity.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apps.cli.inspect import read_report
from apps.cli.output import ByteBar, add_row, make_console, make_table
from engines.errors import BundleError, MissingFileError, ParityError

if TYPE_CHECKING:
    from engines.parity_report import Bound, ErrorStats, ParityReport
    from engines.spec import ComponentName
    from runtime.engine import SanaEngine

__all__ = ["DESCRIPTION", "HELP", "NAME", "Measurement", "add_arguments", "measure_component", "run"]

NAME = "verify"
ALL_CASES = "all"  # pooled, which is how the mean is judged
HELP = "check a bundle: digests, and numbers against the reference's"
DESCRIPTION = "Compare all digests, then run the golden inputs. Exit code 0: all within bounds; 1: not; 2: a file is damaged."


@dataclass(frozen=True)
class Measurement:
    component: ComponentName
    case: str
    output: str
    bound: Bound
    stats: ErrorStats | None  # none if the output could not be compared at all
    wrong: list[str]  # sentences; empty if it is within its bound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the folder of a bundle")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto, tensorrt or onnxruntime (default: auto)")
    parser.add_argument("--digests-only", action="store_true", help="do not run anything")


def run(arguments: argparse.Namespace) -> int:
    from engines.bundle import Bundle
    from runtime.engine import SanaEngine

    bundle = Bundle.open(arguments.bundle, verify=False)
    with ByteBar("verifying") as bar:
        bundle.verify(whole=True, progress=bar)
    print(f"{bundle.path}: {len(bundle.manifest.files)} files have the digests of the manifest; bundle {bundle.digest}", flush=True)
    if arguments.digests_only:
        return 0
    with SanaEngine(bundle, backend=arguments.backend) as engine:
        report = read_report(engine.bundle)
        if report is None:
            raise MissingFileError(f"{arguments.bundle}: no parity.json, so there are no bounds. Rebuild, or use --digests-only.")
        measurements = [m for component in engine.manifest.components for m in measure_component(engine, report, component)]
        where = f"{engine.backend} on {engine.device}"
    return _show(measurements, report, where)


def measure_component(engine: SanaEngine, report: ParityReport, component: ComponentName) -> list[Measurement]:
    """Run every golden case of `component`.

    Raises BundleError if report and golden file do not speak of the same outputs: a check of nothing must not pass.
    """
    from engines.golden import golden_name, load_golden
    from engines.parity_report import check_bias, check_size, measure, pooled

    if component not in report.components:
        raise BundleError(f"parity.json has no bounds for {component}; expected them for each component. Rebuild.")
    bounds = {name: output.bound_of(engine.backend) for name, output in report.components[component].outputs.items()}
    found = []
    sizes: dict[str, list[tuple[ErrorStats, int]]] = {name: [] for name in bounds}
    cases = load_golden(engine.bundle.file(golden_name(component)))
    with engine.session(component) as session:
        for case, golden in cases.items():
            if not bounds or set(golden.outputs) != set(bounds):
                raise BundleError(
                    f"{golden_name(component)}, case {case!r}: got the outputs {', '.join(golden.outputs)}; "
                    f"parity.json has bounds for {', '.join(bounds) or 'none'}. Rebuild."
                )
            got = session.run(golden.inputs)
            for name, reference in golden.outputs.items():
                if name not in got:
                    raise BundleError(f"{component}: the graph has no output {name!r}, which the golden file has. Rebuild.")
                try:
                    stats = measure(got[name], reference)
                except ParityError as error:
                    found.append(Measurement(component, case, name, bounds[name], None, [str(error)]))
                else:
                    sizes[name].append((stats, reference.size))
                    found.append(Measurement(component, case, name, bounds[name], stats, check_size(stats, bounds[name])))
    for name, measured in sizes.items():
        if measured:
            together = pooled(measured)
            found.append(Measurement(component, ALL_CASES, name, bounds[name], together, check_bias(together, bounds[name])))
    return found


def _show(measurements: list[Measurement], report: ParityReport, where: str) -> int:
    table = make_table(
        f"Errors against {report.reference}, by {where}",
        *("component", "case", "output", "", "rms", "of bound", "max", "of bound", "mean"),
        numbers_from=4,
    )
    for m in measurements:
        numbers = ["-"] * 5
        if m.stats is not None:
            rms, largest, mean = m.stats.rms, m.stats.max, m.stats.mean
            numbers = [f"{rms:.2e}", _share(rms, m.bound.rms), f"{largest:.2e}", _share(largest, m.bound.max), f"{mean:+.1e}"]
        add_row(table, m.component, m.case, m.output, "over" if m.wrong else "ok", *numbers)
    make_console().print(table)
    wrong = [f"{m.component}, {m.output}, case {m.case!r}: {sentence}" for m in measurements for sentence in m.wrong]
    for sentence in wrong:
        print(sentence)
    if wrong:
        print("This back end does not compute what the reference computes. Do not use the bundle with it.")
    else:
        print("all within their bounds")
    return 1 if wrong else 0


def _share(value: float, bound: float) -> str:
    return f"{value / bound:.0%}" if bound else "0%" if not value else "over"
