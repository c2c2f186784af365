"""Build a bundle from a checkpoint.

    python export/build_engine.py --model models/sana-tiny --precision fp16 --target sm89,sm120 --out out/sana-tiny

What is left out comes from configs/build.yaml (`sana config show build`); --config NAME takes another file, key=value sets one key.
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

from engines.arguments import ArgumentParser
from engines.errors import SanaError, SpecError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    """Flags have no defaults here: one that is left out says nothing, and configs/build.yaml holds."""
    parser = ArgumentParser(
        prog="build_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("overrides", nargs="*", default=[], metavar="key=value", help="a key of the configuration: max_batch=2; flags win")
    add("--config", default="build", metavar="NAME", help="a file of configs/, without .yaml; build has all defaults")
    add("--config-dir", default=None, metavar="FOLDER", help="a folder to search before configs/ (also: SANA_CONFIG_DIR)")
    add("--model", dest="checkpoint", help="a folder in diffusers' layout, an original .pth, or owner/name on the Hugging Face Hub")
    add("--revision", help="commit, tag or branch on the Hub; a commit makes the build reproducible")
    add("--variant", choices=("fp16", "bf16"), help="prefer the checkpoint's files of this precision")
    add("--components-from", metavar="PATH_OR_ID", help="for a .pth, which holds the transformer alone: where the rest is")
    add("--vae", type=Path, metavar="FOLDER", help="an autoencoder in place of the checkpoint's, of the same latents: DC-AE-Lite")
    add(
        "--precision",
        help="fp32, fp16 (the denoiser's alone), bf16; its layers int8, fp8 (sm89 up), nvfp4 (sm120); a recipe's .yaml",
    )
    add(
        "--decoder-precision",
        choices=("fp32", "bf16", "fp8", "int8"),
        help="left out: fp8 beside --precision fp8 for sm89 up, else as the rest; int8 for all targets",
    )
    add(
        "--plan",
        type=Path,
        metavar="FILE",
        help="of a quantized denoiser, as a calibration wrote it: this build does not calibrate",
    )
    add(
        "--calibrate",
        action=argparse.BooleanOptionalAction,
        help="find scales on real sampling runs; without: cheap, and less exact",
    )
    add("--calibration-prompts", type=Path, metavar="FILE", help="a text file, a prompt a line")
    add("--recipe-key", dest="recipe_keys", action="append", metavar="KEY=VALUE", help="of the recipe: calibration.num_prompts=8")
    add("--recipe-out", type=Path, metavar="YAML", help="also write the recipe to this file")
    add("--budget", metavar="CLAUSES", help='choose formats for it: "lpips<=0.08, size<=0.4"; also psnr_db>=, error<=')
    add("--budget-formats", metavar="NAMES", help="what a group of layers may be then, besides fp16: nvfp4,fp8")
    add("--device", choices=("auto", "cpu", "cuda"), help="of PyTorch, for the calibration")
    add("--target", help="sm80,sm86,sm89,sm120,sm121; current: this machine's GPU; onnx: no engines")
    add("--out", type=Path, metavar="BUNDLE", help="the folder to write; a bundle there is replaced when all is done")
    add("--min-side", type=int, metavar="PX", help="smallest side, a multiple of 32")
    add("--default-side", type=int, metavar="PX", help="side that engines are tuned for")
    add("--max-side", type=int, metavar="PX", help="largest side")
    add("--max-batch", type=int, metavar="N", help="pictures in one go, 1 to 1024")
    add("--components", help="only these, for development")
    add("--cache", type=Path, help="where finished stages are kept")
    add("--report", type=Path, metavar="JSON", help="also write each stage's time and peak memory to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if the build failed; 2 if what was asked for cannot be built; 130 after Ctrl-C. Messages go to stderr."""
    options = _parser().parse_intermixed_args(arguments)  # overrides may stand anywhere between the flags
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
    from export.settings import load  # a wrong word is answered before PyTorch is loaded

    flags = {name: value for name, value in vars(options).items() if name not in ("overrides", "config", "config_dir")}
    settings = load(options.config, options.overrides, options.config_dir, flags=flags)
    if settings.checkpoint is None:
        raise SpecError("model: got none; expected one. Give it: --model …, or checkpoint=….")
    if settings.out is None:
        raise SpecError("out: got none; expected a folder for the bundle. Give it: --out ….")
    from engines.spec import Precision
    from export.quantization_request import quantization_of, weights_of
    from export.request import BuildRequest, parse_components, targets_of

    precision, quantization = quantization_of(settings)
    targets = targets_of(",".join(settings.target), precision)
    request = BuildRequest(
        model=settings.checkpoint,
        out=settings.out,
        precision=precision,
        targets=targets,
        revision=settings.revision,
        variant=settings.variant,
        components_from=settings.components_from,
        vae=settings.vae,
        min_side=settings.min_side,
        opt_side=settings.default_side,
        max_side=settings.max_side,
        max_batch=settings.max_batch,
        components=parse_components(",".join(settings.components)),
        cache=settings.cache,
        quantization=quantization,
        decoder_precision=None if settings.decoder_precision is None else Precision(settings.decoder_precision),
        weights=weights_of(settings),
        plan=settings.plan,
    )
    from export.build import build
    from export.progress import Progress

    # TensorRT's warnings about every int64 input; all it says is kept beside the engine in the cache, and its errors are raised
    logging.getLogger("engines.tensorrt_library").setLevel(logging.ERROR)
    progress = Progress()
    result = build(request, progress)
    if result.unchanged:
        progress.say(f"{settings.out}: nothing changed, nothing done.")
    else:
        progress.say(f"{settings.out}: done, {progress.seconds:.0f} s, peak {progress.peak_bytes / 1e9:.2f} GB.")
    if settings.report is not None:
        settings.report.write_text(json.dumps(progress.report(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
