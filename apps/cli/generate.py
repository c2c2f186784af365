"""`sana generate BUNDLE PROMPT…`: draws pictures and prints where they are."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apps.cli.output import ByteBar
from engines.errors import RequestError

if TYPE_CHECKING:
    from runtime.engine import SanaEngine
    from runtime.schedule import Schedule
    from runtime.settings import RuntimeSettings

__all__ = ["DESCRIPTION", "HELP", "NAME", "add_arguments", "add_backend", "open_engine", "run", "settings_of"]

NAME = "generate"
HELP = "draw pictures"
DESCRIPTION = "Draw pictures and print their paths. What is not given comes from --config, then from the bundle."
_NOT_PNG = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the folder of a bundle")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help="what to draw; several give several pictures")
    parser.add_argument("--negative", metavar="TEXT", help="what to keep away from")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next one gets the next integer (default: 0)")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="how closely to follow the prompt; 1 and below draw without guidance")
    parser.add_argument("--width", type=int, help="px, a multiple of 32")
    parser.add_argument("--height", type=int, help="px, a multiple of 32")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--scheduler", metavar="NAME", help="flow_euler, flow_dpm_solver or scm")
    how.add_argument(
        "--schedule",
        dest="schedule_file",
        type=Path,
        metavar="FILE.yaml|NAME",
        help="a schedule of your own, or one of configs/schedule",
    )
    add_backend(parser)
    parser.set_defaults(backend=None)  # so that one that is given can be told from one that is not
    parser.add_argument("--batch", type=int, help="pictures drawn in one go, at most (default: as many as the bundle allows)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR|FILE.png", help="where to (default: this folder)")
    parser.add_argument("--config", metavar="NAME", help="defaults from configs/NAME.yaml, as runtime, which has all of them")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder to search before configs/ (also: SANA_CONFIG_DIR)")


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto, tensorrt or onnxruntime (default: auto)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files of the bundle with their digests")


def open_engine(bundle: Path, arguments: argparse.Namespace, *, backend: str | None = None) -> SanaEngine:
    """The engine that --backend and --no-verify ask for. Raises as Bundle.open and SanaEngine do."""
    return _open(bundle, verify=not arguments.no_verify, backend=backend or arguments.backend)


def _open(bundle: Path, *, verify: bool, backend: str, num_threads: int | None = None) -> SanaEngine:
    from engines.bundle import Bundle
    from runtime.engine import SanaEngine

    with ByteBar("verifying") as bar:
        opened = Bundle.open(bundle, verify=verify, progress=bar)
    return SanaEngine(opened, backend=backend, num_threads=num_threads)


def run(arguments: argparse.Namespace) -> int:
    from runtime.image import save_png

    prompts = [prompt for prompt in arguments.prompts for _ in range(_at_least_one("count", arguments.count))]
    seeds = [arguments.seed + number for number in range(len(prompts))]
    paths = picture_paths(arguments.out, prompts, seeds)
    settings = settings_of(arguments)
    batch = len(prompts) if settings.batch is None else _at_least_one("batch", settings.batch)
    scheduler, steps = _schedule(settings)
    with _open(arguments.bundle, verify=settings.verify, backend=settings.backend, num_threads=settings.num_threads) as engine:
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            pictures = engine.generate(
                prompts[part],
                negative_prompts=settings.negative,
                seed=seeds[part],
                steps=steps,
                guidance=settings.guidance,
                width=settings.width,
                height=settings.height,
                scheduler=scheduler,
            )
            for picture, path in zip(pictures, paths[part], strict=True):
                print(save_png(picture, path), flush=True)  # as soon as it is there
    return 0


def picture_paths(out: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where each picture goes: `out` itself if it names a PNG, else <prompt>-<seed>.png in the folder `out`.

    Raises RequestError for several pictures and one file, and for a file that is not a PNG.
    """
    suffix = out.suffix.lower()
    if suffix in _NOT_PNG:
        raise RequestError(f"--out: got {str(out)!r}; expected a .png file, which can say how it was drawn, or a folder.")
    if suffix == ".png" and not out.is_dir():
        if len(prompts) > 1:
            raise RequestError(f"--out: got one file, {str(out)!r}, for {len(prompts)} pictures; expected a folder.")
        return [out]
    return [out / f"{_slug(prompt)}-{seed}.png" for prompt, seed in zip(prompts, seeds, strict=True)]


def _slug(prompt: str) -> str:
    """Letters (of any language) and digits of the prompt, in a form that every file system takes: at most 180 bytes."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words.encode()[:180].decode(errors="ignore").strip("-") or "picture"


def settings_of(arguments: argparse.Namespace) -> RuntimeSettings:
    """Flags over --config over what is built in. Values of flags are checked where they are used. Raises ConfigError."""
    from runtime.settings import RuntimeSettings, load

    base = RuntimeSettings() if arguments.config is None else load(arguments.config, config_dir=arguments.config_dir)
    given = {name: getattr(arguments, name, None) for name in RuntimeSettings.model_fields}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.no_verify:
        given["verify"] = False
    if "scheduler" in given or "schedule_file" in given:  # one flag replaces whichever of the two the file has
        given = {"scheduler": None, "schedule_file": None} | given
    return base.model_copy(update=given)


def _schedule(settings: RuntimeSettings) -> tuple[str | Schedule | None, int | None]:
    """What to give to generate() as scheduler and as steps: a schedule from a file already has its steps."""
    if settings.schedule_file is None:
        return settings.scheduler, settings.steps
    from runtime.schedule import load_schedule

    return load_schedule(settings.schedule_file, num_steps=settings.steps), None


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise RequestError(f"--{name}: got {value}; expected 1 or more.")
    return value
