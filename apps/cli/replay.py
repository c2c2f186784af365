"""`sana replay PICTURE.png`: draws a picture again from its own metadata and compares the pixels."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apps.cli.generate import add_backend, open_engine
from apps.cli.output import printable
from engines.errors import ManifestError, MissingFileError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DESCRIPTION", "HELP", "NAME", "Difference", "add_arguments", "compare", "find_bundle", "run"]

NAME = "replay"
HELP = "draw a picture again from its own metadata"
DESCRIPTION = "Draw a picture again and compare. Exit code 0: the same pixels; 1: others, and how different."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", type=Path, metavar="picture.png", help="a PNG that sana drew")
    parser.add_argument(
        "--bundle", type=Path, help="the folder of its bundle (default: looked for by its digest, near the picture)"
    )
    add_backend(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="also save the new picture")


def run(arguments: argparse.Namespace) -> int:
    from runtime.image import read_picture, save_png

    original, info = read_picture(arguments.picture)
    folder = arguments.bundle or find_bundle(arguments.picture, info.bundle_digest)
    # Unless another was asked for, the back end that drew it: any other gives other last bits.
    backend = info.backend if arguments.backend == "auto" else arguments.backend
    there = f"{info.backend} on {printable(info.device)}"
    with open_engine(folder, arguments, backend=backend) as engine:
        if engine.backend != info.backend:  # asked for by name; alone, because not every back end has the same batches
            info = info.model_copy(update={"backend": engine.backend, "batch_size": 1, "batch_index": 0})
        again = engine.replay(info)
        here = f"{engine.backend} on {engine.device}"
    if arguments.out is not None:
        save_png(again, arguments.out)
    difference = compare(original, again)
    if difference is None:
        print(f"{arguments.picture}: identical, all {original.width}x{original.height} px (seed {info.seed})")
        return 0
    print(f"{arguments.picture}: different: {difference}")
    if there != here:
        print(f"it was drawn by {there}; this is {here}: the last bits of a sum depend on both")
    else:
        print("the picture was changed after it was drawn, or NumPy, ONNX Runtime or TensorRT were since")
    return 1


@dataclass(frozen=True)
class Difference:
    """Between two pictures of one size; values are 0 to 255."""

    share: float  # of pixels that differ in any channel
    largest: int
    mean: float  # of the absolute value, over all channels
    psnr_db: float

    def __str__(self) -> str:
        return (
            f"{self.share:.2%} of the pixels, by at most {self.largest} of 255, by {self.mean:.4f} in the mean "
            f"(PSNR {self.psnr_db:.1f} dB)"
        )


def compare(first: Image, second: Image) -> Difference | None:
    """None if all pixels are equal. Raises RequestError for pictures of different sizes."""
    import numpy as np

    if first.size != second.size:
        raise RequestError(
            f"the picture has {first.width}x{first.height} px, its metadata says {second.width}x{second.height}: "
            "it was resized after it was drawn. Replay the original."
        )
    a, b = (np.asarray(picture.convert("RGB")).astype(np.int64) for picture in (first, second))
    delta = np.abs(a - b)
    if not delta.any():
        return None
    return Difference(
        share=float(delta.any(axis=-1).mean()),
        largest=int(delta.max()),
        mean=float(delta.mean()),
        psnr_db=float(10 * np.log10(255**2 / np.mean(delta.astype(np.float64) ** 2))),
    )


def find_bundle(picture: Path, digest: str) -> Path:
    """The bundle with that digest in or beside the picture's folder, the folder above, the current one, or out/ in it.

    Raises MissingFileError, which says where it looked.
    """
    places = _places(picture)
    for place in places:
        for folder in _folders(place):
            if _digest(folder) == digest:
                return folder
    looked = ", ".join(str(place) for place in places)
    raise MissingFileError(
        f"no bundle with the digest {digest[:12]}… in {looked} or a folder of these. Say where it is: --bundle DIR"
    )


def _places(picture: Path) -> list[Path]:
    folder = picture.resolve().parent
    here = Path.cwd()
    return list(dict.fromkeys([folder, folder.parent, here, here / "out"]))


def _folders(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield place
        yield from sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _digest(folder: Path) -> str | None:
    from engines.manifest import MANIFEST_NAME
    from engines.strict import read_bounded

    try:
        return hashlib.sha256(read_bounded(folder / MANIFEST_NAME)).hexdigest()
    except (MissingFileError, ManifestError, PermissionError):  # not a bundle, or none for us
        return None
