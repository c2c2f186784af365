"""Prepare and look at training data.

    python -m train.data prepare FOLDER --model CHECKPOINT --out CACHE [--workers N]
    python -m train.data inspect FOLDER_OR_SHARDS --out SHEET.png

`sana data` is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from engines.errors import SanaError
from train.data.buckets import RESOLUTIONS
from train.data.errors import DataError
from train.data.settings import DataSettings

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for an error, in one message on stderr; 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stopped_once():
            return _prepare(options) if options.command == "prepare" else _inspect(options)
    except KeyboardInterrupt:
        kept = " Finished shards are kept; the same command goes on from there." if options.command == "prepare" else ""
        print(f"data: interrupted.{kept}", file=sys.stderr)
        return 130
    except (SanaError, OSError) as error:
        print(f"data: error: {error}", file=sys.stderr)
        return 2


def _prepare(options: argparse.Namespace) -> int:
    settings = _settings(options, shard_size=options.shard_size)
    from train.data.prepare import prepare, prepare_with, say, summary

    if options.workers > 1 and options.part is None:
        folder = prepare_with(options.workers, options.arguments)
    else:
        folder = prepare(
            settings, model=options.model, out=options.out, dtype=options.dtype, device=options.device, part=options.part
        )
    if options.part is None:
        say(summary(folder))
    print(folder)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from train.data.contact_sheet import ENDINGS, look, write_sheet
    from train.data.prepare import Progress
    from train.data.source import find

    settings = _settings(options)
    if options.out.suffix not in ENDINGS:  # said before a long look, not after it
        raise DataError(f"--out: got {options.out.name!r}; expected a name that ends with {' or '.join(ENDINGS)}.")
    progress = Progress("samples")
    statistics, pictures = look(find(settings), settings, pictures=options.pictures, most=options.most, on_sample=progress)
    write_sheet(options.out, str(options.data), statistics, pictures)
    for name, value in statistics.lines():
        print(f"{name:26} {''.join(c if c.isprintable() else repr(c)[1:-1] for c in value)}")
    print(f"{'contact sheet':26} {options.out}")
    return 0


def _settings(options: argparse.Namespace, **more: object) -> DataSettings:
    return DataSettings.checked(
        path=options.data,
        kind=options.kind,
        resolution=options.resolution,
        max_broken_share=options.max_broken_share,
        max_pixels=options.max_pixels,
        **more,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sana data", description="Prepare and look at training data.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    prepare = commands.add_parser("prepare", help="latents and text embeddings of a data set, cached ahead of training")
    inspect = commands.add_parser("inspect", help="statistics and a contact sheet of a data set")
    defaults = DataSettings.checked(path=Path())
    for command in (prepare, inspect):
        add = command.add_argument
        add("data", type=Path, help="a folder of pictures with JSON captions, a folder of WebDataset shards, or one shard")
        add("--kind", choices=("auto", "folder", "shards"), default="auto", help="default: by what the folder holds")
        add("--resolution", type=int, choices=RESOLUTIONS, default=defaults.resolution, help="px; default %(default)s")
        add("--max-pixels", type=int, default=defaults.max_pixels, metavar="N", help="of a picture; default %(default)s")
        add(
            "--max-broken-share",
            type=float,
            default=defaults.max_broken_share,
            metavar="X",
            help="stop when more than this share of the samples is broken; default %(default)s",
        )
    add = prepare.add_argument
    add("--model", required=True, help="the checkpoint whose autoencoder and text encoder are used: a folder or Hub id")
    add("--out", required=True, type=Path, metavar="CACHE", help="the folder that gets a folder for this data and these encoders")
    add("--workers", type=_positive, default=1, metavar="N", help="processes; with GPUs one a GPU; default 1")
    add("--part", type=_part, metavar="I/N", help="be worker I (from 0) of N, for several machines that share --out")
    add("--shard-size", type=int, default=defaults.shard_size, metavar="N", help="samples a shard; default %(default)s")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of encoders and cache; default %(default)s")
    add("--device", default="auto", help="cpu, cuda:0, …; default: a GPU for each worker, or the CPU")
    add = inspect.add_argument
    add("--out", required=True, type=Path, metavar="SHEET", help="the contact sheet, .png or .html")
    add("--pictures", type=_positive, default=48, metavar="N", help="on the sheet; default %(default)s")
    add("--most", type=_positive, metavar="N", help="look at N samples, evenly spread; default: at all")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; expected 1 or more")
    return number


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected I/N with I from 0 to N - 1")
    return int(number), int(parts)


@contextlib.contextmanager
def stopped_once() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt, but only the first of them, from then on for as long as the process lives.

    After Ctrl-C a worker gets both, the second from its parent, which was interrupted too: that came while the first was handled.
    """
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored: a shell does that behind &
        numbers.append(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in numbers:
            signal.signal(each, _nothing)  # not SIG_IGN: Python complains about a signal that is on its way
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
