"""Build a bundle from a checkpoint.

    python export/build_engine.py --model models/sana-tiny --precision fp16 --target sm89,sm120 --out out/sana-tiny

No GPU is needed, except for `--target current`. Run it again after a change: only what depends on the change is done again.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the folder of this script is on the path, the repository is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.errors import SanaError, SpecError
from engines.spec import COMPONENTS, parse_precision

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="build_engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a folder in diffusers' layout, an original .pth, or owner/name on the Hugging Face Hub")
    add("--revision", help="commit, tag or branch on the Hub; a commit makes the build reproducible")
    add("--variant", choices=("fp16", "bf16"), help="prefer the checkpoint's files of this precision")
    add("--components-from", metavar="PATH_OR_ID", help="for a .pth, which holds the transformer alone: where the rest is")
    add("--precision", default="fp16", help="fp32, fp16 (the denoiser's alone, the rest is bf16) or bf16; default fp16")
    add("--target", default="current", help="sm80,sm86,sm89,sm120,sm121; current: this machine's GPU; onnx: no engines")
    add(
        "--out", required=True, type=Path, metavar="BUNDLE", help="the folder to write; a bundle there is replaced when all is done"
    )
    add("--min-side", type=int, metavar="PX", help="smallest side, a multiple of 32; default: half of --default-side")
    add("--default-side", type=int, metavar="PX", help="side that engines are tuned for; default: what the model was trained for")
    add("--max-side", type=int, metavar="PX", help="largest side; default: twice --default-side")
    add("--max-batch", type=int, default=4, metavar="N", help="pictures in one go, 1 to 1024; default 4")
    add("--components", default=",".join(COMPONENTS), help="only these, for development; default: all")
    add("--cache", type=Path, help="where finished stages are kept; default: $SANA_CACHE_DIR or ~/.cache/sana")
    add("--report", type=Path, metavar="JSON", help="also write each stage's time and peak memory to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if the build failed; 2 if what was asked for cannot be built; 130 after Ctrl-C. Messages go to stderr."""
    options = _parser().parse_args(arguments)
    try:
        _build(options)
    except SpecError as error:
        print(f"build_engine: {error}", file=sys.stderr)
        return 2
    except SanaError as error:
        print(f"build_engine: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_engine: interrupted. Finished stages are kept; what was at --out is unchanged.", file=sys.stderr)
        return 130
    return 0


def _build(options: argparse.Namespace) -> None:
    precision = parse_precision(options.precision)  # a wrong word is answered before PyTorch is loaded
    from export.request import BuildRequest, parse_components, targets_of

    request = BuildRequest(
        model=options.model,
        out=options.out,
        precision=precision,
        targets=targets_of(options.target),
        revision=options.revision,
        variant=options.variant,
        components_from=options.components_from,
        min_side=options.min_side,
        opt_side=options.default_side,
        max_side=options.max_side,
        max_batch=options.max_batch,
        components=parse_components(options.components),
        cache=options.cache,
    )
    from export.build import build
    from export.progress import Progress

    # TensorRT's warnings about every int64 input; all it says is kept beside the engine in the cache, and its errors are raised
    logging.getLogger("engines.tensorrt_library").setLevel(logging.ERROR)
    progress = Progress()
    result = build(request, progress)
    if result.unchanged:
        progress.say(f"{options.out}: nothing changed, nothing done.")
    else:
        progress.say(f"{options.out}: done, {progress.seconds:.0f} s, peak {progress.peak_bytes / 1e9:.2f} GB.")
    if options.report is not None:
        options.report.write_text(json.dumps(progress.report(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
