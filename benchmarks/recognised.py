"""How many held-out captions a bundle draws so that the recogniser sees what they say.

    python benchmarks/recognised.py --bundle out/sana-tiny --model models/sana-tiny --captions 200 --record

The captions are of combinations that training never saw (held_out_captions.json of the model folder); whatever back end the runtime
chooses draws them. The judge is the recogniser that ships with the model: the likeliest of a closed set of emoji counts, so a high
share says that the right emoji is the nearest one and nothing about beauty. Look at the sheet of pictures too; misses come first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.figures import record
from engines.errors import SanaError
from runtime import SanaEngine
from train import recogniser
from train.captions import KIND_NAMES, LANGUAGES, Scene
from train.evaluate import Question, Verdict, grid, judge

FIGURE = "tiny_single_object_recognised"
Z = 1.959964  # of a normal distribution: 95 % lie within


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson's score interval); unlike the usual one it is right near 0 and 1."""
    share, spread = right / total, Z * Z / total
    centre = share + spread / 2
    reach = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (centre - reach) / (1 + spread)), min(1.0, (centre + reach) / (1 + spread))


def share(hits: Sequence[bool]) -> str:
    """ "198 of 200, 99.0 % (95 %: 96.4 to 99.7)"."""
    right, total = sum(hits), len(hits)
    low, high = wilson(right, total)
    return f"{right} of {total}, {100 * right / total:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"


def held_out(model: Path, kind: str, num: int) -> list[Question]:
    """The first `num` captions of a kind, or all where there are fewer."""
    rows = json.loads((model / "held_out_captions.json").read_text(encoding="utf-8"))[kind][:num]
    return [
        Question(row["caption"], row["language"], Scene(KIND_NAMES.index(kind), row["first"], row["second"], row["colour"]))
        for row in rows
    ]


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 3, H, W) fp32, -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def report(kind: str, questions: Sequence[Question], verdicts: Sequence[Verdict]) -> None:
    print(f"{kind}: {share([verdict.right for verdict in verdicts])}")
    print(f"  background: {share([verdict.colour for verdict in verdicts])}")
    for language in LANGUAGES:
        hits = [verdict.right for question, verdict in zip(questions, verdicts, strict=True) if question.language == language]
        if hits:
            print(f"  {language}: {share(hits)}")


def sheet(pictures: Tensor, questions: Sequence[Question], verdicts: Sequence[Verdict], classes: Sequence[str], path: Path) -> None:
    """A PNG of all pictures, misses first and with what was seen."""
    order = sorted(range(len(questions)), key=lambda index: verdicts[index].right and verdicts[index].colour)
    texts = []
    for index in order:
        question, verdict = questions[index], verdicts[index]
        seen = ", ".join(classes[guess] for guess in verdict.guess)
        problem = "" if verdict.right else f"[{seen}] "
        texts.append(problem + ("" if verdict.colour else "[background] ") + question.text)
    grid(pictures[order], texts, path)


def measure(
    generate: Callable[..., list[Image.Image]], model: Path, kinds: Sequence[str], num: int, *, seed: int, sheets: Path
) -> dict[str, list[Verdict]]:
    """Draw, judge, print, write sheets/<kind>.png. generate: as SanaEngine.generate."""
    eye, classes = recogniser.load(model / "recogniser")
    found = {}
    for kind in kinds:
        questions = held_out(model, kind, num)
        pictures = as_tensor(generate([question.text for question in questions], seed=seed))
        found[kind] = judge(eye, pictures, questions)
        report(kind, questions, found[kind])
        sheet(pictures, questions, found[kind], classes, sheets / f"{kind}.png")
        print(f"  pictures: {sheets / f'{kind}.png'}")
    return found


def note(model: Path, verdicts: Sequence[Verdict], engine: SanaEngine) -> str:
    """What must be known beside the figure: its interval, what drew, and how good the judge is itself."""
    accuracy: dict[str, Any] = json.loads((model / "metrics.json").read_text(encoding="utf-8"))["recogniser"]
    own = " and ".join(f"{100 * accuracy[how]['emoji']:.1f} % of {how}" for how in ("composed", "decoded"))
    return (
        f"{share([verdict.right for verdict in verdicts])}; held-out captions, drawn by {engine.backend} on {engine.device}; "
        f"the recogniser itself names {own} scenes that it has not seen"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("out/sana-tiny"))
    parser.add_argument("--model", type=Path, default=Path("models/sana-tiny"), help="the folder that the bundle was built from")
    parser.add_argument(
        "--captions", type=int, default=200, metavar="N", help="of each kind; all where there are fewer; default 200"
    )
    parser.add_argument("--kind", choices=(*KIND_NAMES, "all"), default="single")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next; default 0")
    parser.add_argument("--sheets", type=Path, default=Path("out/recognised"), help="folder of the sheets of pictures, one a kind")
    parser.add_argument("--record", action="store_true", help=f"append {FIGURE} to benchmarks/results/figures.jsonl")
    options = parser.parse_args(arguments)
    if options.captions < 1:
        parser.error(f"--captions: got {options.captions}; expected at least 1")
    if options.record and options.kind not in ("single", "all"):
        parser.error(f"--record: the figure is of single objects; got --kind {options.kind}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if the bundle or the model cannot be used; 130 after Ctrl-C."""
    options = parse(arguments)
    kinds = KIND_NAMES if options.kind == "all" else (options.kind,)
    try:
        with SanaEngine(options.bundle) as engine:
            print(f"{engine.manifest.model}, bundle {engine.bundle.digest[:12]}, {engine.backend} on {engine.device}")
            found = measure(engine.generate, options.model, kinds, options.captions, seed=options.seed, sheets=options.sheets)
            if options.record:
                single = found["single"]
                value = 100 * sum(verdict.right for verdict in single) / len(single)
                print(json.dumps(record(FIGURE, value, "%", note=note(options.model, single, engine))))
    except (SanaError, FileNotFoundError) as error:
        print(f"recognised: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("recognised: interrupted; nothing was recorded", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
