"""What a bundle's pictures lose against those of another bundle, or of the PyTorch reference: the same captions, the same seeds.

    python benchmarks/compare_pictures.py out/fp16 out/nvfp4 --captions 40 --seeds 2 --record nvfp4
    python benchmarks/compare_pictures.py models/sana-tiny out/fp16 --captions 4 --into-bundle

Captions that training never saw, `--captions` of each of five kinds of scenes. Scene score: of 100 pictures, those with every
object in its place and the right background, as the recogniser sees them that ships with sana-tiny. Intervals are 95 %, by a
bootstrap over captions and their seeds; what is lost is a difference of pairs. Writes quality.json and quality/index.html, worst
pairs first; --into-bundle also puts section and page into the second bundle; --record appends quant_FORMAT_… to the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from benchmarks.figures import record
from benchmarks.quality import as_tensor, held_out, judged, painter
from benchmarks.scene_score import scores as by_category
from engines.bundle import Bundle
from engines.bundle_writer import write_bundle
from engines.digest import file_sha256
from engines.errors import SanaError
from engines.manifest import BundleInfo
from engines.parity_report import parse_report
from engines.quality_report import PAGE_NAME, Against, QualityReport, SceneScores
from engines.strict import read_bounded
from export.metrics.pictures import estimate
from export.quality import ROWS, compare, report
from sana_ref.checkpoint import load
from train.tiny import recogniser
from train.tiny.evaluate import Verdict

FORMATS = ("int8", "fp8", "nvfp4")
SUMMARY = "quality.json"


class Judge:
    """Sees all pictures as they are drawn."""

    def __init__(self, folder: Path, captions: int) -> None:
        self.eye, _ = recogniser.load(folder / "recogniser")
        self.digest = file_sha256(folder / "recogniser" / "model.safetensors")
        self.questions = held_out(folder, captions)
        self.verdicts: tuple[list[list[Verdict]], list[list[Verdict]]] = (
            [[] for _ in self.questions],
            [[] for _ in self.questions],
        )

    def look(self, places: Sequence[int], first: list[Image.Image], second: list[Image.Image]) -> None:
        asked = [self.questions[place] for place in places]
        for kept, pictures in zip(self.verdicts, (first, second), strict=True):
            for place, verdict in zip(places, judged(self.eye, as_tensor(pictures), asked), strict=True):
                kept[place].append(verdict)

    def scores(self) -> SceneScores:
        right_1, right_2 = (
            np.array([[100.0 * (each.right and each.colour) for each in seeds] for seeds in kept]) for kept in self.verdicts
        )
        lost = estimate(right_1 - right_2)
        return SceneScores(judge=self.digest, first=estimate(right_1), second=estimate(right_2), points_lost=lost)

    def categories(self) -> list[dict[str, dict[str, int]]]:
        """Of the first and the second: right and total by category."""
        found = []
        for kept in self.verdicts:
            pairs = [(question, each) for question, seeds in zip(self.questions, kept, strict=True) for each in seeds]
            found.append({name: asdict(score) for name, score in by_category(*map(list, zip(*pairs, strict=True))).items()})  # type: ignore[arg-type]
        return found


def denoiser_bytes(bundle: Bundle, role: str) -> int:
    """Of the portable graph with its weights, or of the engines."""
    roles = ("engine",) if role == "engine" else ("graph", "weights")
    return sum(f.size for name, f in bundle.manifest.files.items() if name.startswith("denoiser/") and f.role in roles)


def sizes(first: Bundle, second: Bundle) -> tuple[str, int, int]:
    """What is compared, and bytes of both. Engines where both have them for the same GPUs, else the portable graphs."""
    same = bool(first.manifest.targets) and first.manifest.targets == second.manifest.targets
    what = "engine" if same else "portable graph and weights"
    return what, denoiser_bytes(first, what), denoiser_bytes(second, what)


def named(source: Path) -> Against:
    """Raises SanaError for what is neither a bundle nor a model."""
    if (source / "manifest.json").is_file():
        bundle = Bundle.open(source, verify=False)
        return Against(kind="bundle", name=bundle.manifest.precision["denoiser"], digest=bundle.digest)
    return Against(kind="reference", name="PyTorch fp32", digest=load(source).digest)


def put_into(bundle: Bundle, section: QualityReport, files: dict[str, bytes]) -> Bundle:
    """The bundle anew, with this section and page in place of those that it had. Raises SanaError, and leaves it as it was then."""
    parity = parse_report(read_bounded(bundle.file("parity.json")), source=str(bundle.path / "parity.json"))
    changed = parity.model_copy(update={"quality": section, "schema_version": 2})
    with write_bundle(bundle.path) as writer:
        for name in bundle.manifest.files:
            if not name.startswith("quality/"):
                writer.add(bundle.file(name), name)
        write_files(writer.path, files | {"parity.json": f"{changed.model_dump_json(indent=1)}\n".encode()})
        return writer.finish(BundleInfo(**{name: getattr(bundle.manifest, name) for name in BundleInfo.model_fields}))


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)


def run(options: argparse.Namespace) -> QualityReport:
    """Draw, measure, write. Raises SanaError, FileNotFoundError."""
    eye = Judge(options.judge, options.captions)
    texts = [question.text for question in eye.questions]
    against = named(options.first)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()))
        first, _ = painter(options.first, options.backend if against.kind == "bundle" else "auto", stack)
        second, title = painter(options.second, options.backend, stack)
        task = bar.add_task("drawing pairs", total=len(texts) * options.seeds)
        found = compare(
            first,
            second,
            texts,
            num_seeds=options.seeds,
            seed=options.seed,
            rows=options.rows,
            look=eye.look,
            advance=lambda done: bar.update(task, completed=done),
        )
    bundle = Bundle.open(options.second, verify=False)
    name = bundle.manifest.precision["denoiser"]
    section, files = report(found, against=against, name=name, backend=title.split(", ", 2)[2], scores=eye.scores())
    summary = {"second": bundle.digest, **section.model_dump(mode="json", exclude={"rows"}), "categories": eye.categories()}
    if against.kind == "bundle":
        what, bytes_1, bytes_2 = sizes(Bundle.open(options.first, verify=False), bundle)
        summary["denoiser"] = {"of": what, "first_bytes": bytes_1, "second_bytes": bytes_2, "ratio": bytes_2 / bytes_1}
    summary["pairs"] = {each: getattr(found, each).tolist() for each in ("psnr_db", "ssim", "lpips")}  # (captions, seeds)
    write_files(options.out, files | {SUMMARY: f"{json.dumps(summary, indent=1)}\n".encode()})
    print("\n".join(section.lines()))
    if "denoiser" in summary:
        print(f"denoiser, {what}: {bytes_1} and {bytes_2} bytes, ratio {bytes_2 / bytes_1:.3f}")
    print(f"pictures: {options.out / PAGE_NAME}")
    if options.into_bundle:
        print(f"{options.second}: now bundle {put_into(bundle, section, files).digest[:12]}")
    if options.record is not None:
        _record(options.record, section, f"{title} against {against.name} {against.digest[:12]}")
    return section


def _record(form: str, section: QualityReport, title: str) -> None:
    assert section.scores is not None  # the judge always looks
    pictures = f"{section.prompts} captions kept out, {section.seeds} seeds each"
    for name, value, unit, note in (
        ("scene_points_lost", section.scores.points_lost.mean, "points of 100", section.scores.points_lost.text(2)),
        ("psnr_db", section.psnr_db.mean, "dB", f"{section.psnr_db.text(2)}, SSIM {section.ssim.mean:.4f}"),
        ("lpips", section.lpips.mean, "LPIPS", section.lpips.text(4)),
    ):
        print(json.dumps(record(f"quant_{form}_{name}", value, unit, note=f"{note}; {pictures}; {title}")))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "first", type=Path, metavar="BUNDLE_OR_MODEL", help="what is compared with; a model folder: PyTorch in fp32"
    )
    parser.add_argument("second", type=Path, metavar="BUNDLE", help="whose loss is measured")
    parser.add_argument("--captions", type=int, default=100, metavar="N", help="of each of five kinds of scenes; default 100")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="pictures of each caption; default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next; default 0")
    parser.add_argument("--backend", choices=("auto", "tensorrt", "onnxruntime"), default="auto", help="of bundles")
    parser.add_argument("--judge", type=Path, default=Path("models/sana-tiny"), help="folder of the recogniser and the captions")
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"pairs on the page, at most 200; default {ROWS}")
    parser.add_argument("--out", type=Path, default=Path("out/compared"), help="folder for the numbers and the page")
    parser.add_argument("--into-bundle", action="store_true", help="write section and page into BUNDLE; its digest changes")
    parser.add_argument("--record", choices=FORMATS, help="append quant_FORMAT_… to benchmarks/results/figures.jsonl")
    options = parser.parse_args(arguments)
    for flag, value, most in (("captions", options.captions, 10**6), ("seeds", options.seeds, 10**6), ("rows", options.rows, 200)):
        if not 1 <= value <= most:
            parser.error(f"--{flag}: got {value}; expected 1 to {most}")
    if not (options.second / "manifest.json").is_file():
        parser.error(f"{options.second}: got no manifest.json; expected a bundle. Build one: sana build")
    if options.record:
        precision = Bundle.open(options.second, verify=False).manifest.precision.get("denoiser")
        is_bundle = (options.first / "manifest.json").is_file()
        beside = Bundle.open(options.first, verify=False).manifest.precision.get("denoiser") if is_bundle else "PyTorch"
        if precision != options.record or beside != "fp16":
            parser.error(
                f"--record {options.record}: got a denoiser in {precision}, compared with {beside}; "
                f"expected {options.record}, compared with a bundle in fp16"
            )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if something cannot be used; 130 after Ctrl-C, and then nothing was written."""
    options = parse(arguments)
    try:
        run(options)
    except (SanaError, FileNotFoundError) as error:
        print(f"compare_pictures: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare_pictures: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
