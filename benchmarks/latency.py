"""How long a bundle takes on this machine, next to others' programs and a fixed GEMM in the same run; and whether it became slower.

    python benchmarks/latency.py                                                # sana-tiny; on a CPU through ONNX Runtime
    python benchmarks/latency.py --bundle out/sana --model CHECKPOINT --sizes 1024,2048 --batches 1,2 --peers eager,max-autotune
    python benchmarks/latency.py --bundle out/sana --check                      # exit code 1: slower than the last accepted run
    python benchmarks/latency.py --accept RUN                                   # from now on, that run is what others are judged by
    python benchmarks/latency.py --report out/latency.html                      # everything under benchmarks/history as one page

Correctness first, by the bundle's own golden inputs; and where engines run beside a checkpoint, at every size and batch: their
error against PyTorch in fp32 may be at most twice that of PyTorch at their precision. If it is more, nothing is timed, and the exit
code is 1.
Each peer is held to the same. Then every component, and pictures from prompt to PNG, by turns with a GEMM and the peers
(latency_timing.py). Each run is appended to benchmarks/history. --record appends figures to benchmarks/results/figures.jsonl; of an
fp16 bundle and a quantised one of the same model (--bundle A B) also step_ratio_FORMAT, a step's time of fp16's.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.latency_history import HISTORY, History, new_run
from benchmarks.latency_run import GEMM
from benchmarks.latency_work import WORKS
from benchmarks.writable import check_writable
from engines.arguments import ArgumentParser
from engines.errors import RequestError, SanaError
from engines.spec import nearest

THIS_RUN = "this run"


def sizes(text: str) -> list[tuple[int, int]]:
    """ "512,1024x768" as widths and heights."""
    found = []
    for word in text.split(","):
        sides = word.split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise argparse.ArgumentTypeError(f"got {word!r}; expected pixels, such as 512,1024x768")
        found.append((int(sides[0]), int(sides[-1])))
    return list(dict.fromkeys(found))


def numbers(text: str) -> list[int]:
    if not all(word.isdecimal() and int(word) for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected numbers from 1, such as 1,2,4")
    return list(dict.fromkeys(int(word) for word in text.split(",")))


def components(text: str) -> list[str]:
    words = text.split(",")
    if wrong := [word for word in words if word not in WORKS]:
        raise argparse.ArgumentTypeError(f"got {', '.join(wrong)}; {nearest(wrong[0], WORKS)}")
    return list(dict.fromkeys(words))


def parser() -> argparse.ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = made.add_argument_group("what is measured")
    what.add_argument(
        "--bundle", type=Path, nargs="+", default=[], help="folders; sana-tiny unless given, built if it is not there"
    )
    what.add_argument("--model", type=Path, help="the checkpoint's folder, for PyTorch and the peers")
    what.add_argument("--backend", default="auto", help="auto, tensorrt or onnxruntime")
    what.add_argument("--components", type=components, default=list(WORKS), help=f"some of {','.join(WORKS)} (default: all)")
    what.add_argument("--sizes", type=sizes, help="px: 512,1024x768 (default: what the bundle is best at)")
    what.add_argument("--width", type=int, help="px, of one size")
    what.add_argument("--height", type=int)
    what.add_argument("--text-tokens", type=int, default=0, help="of the text encoder (default: a prompt with its instruction)")
    what.add_argument("--batches", type=numbers, default=[1], help="pictures: 1,2,4")
    what.add_argument("--steps", type=int, default=20, help="of a picture")
    what.add_argument("--peers", help="some of eager,reduce-overhead,max-autotune, or none (default: eager where --model is given)")
    what.add_argument("--kernels", action="store_true", help="also time each kernel, for the report's roofline")
    how = made.add_argument_group("how")
    how.add_argument(
        "--rounds", type=int, default=60, help="samples of a component, each beside one of the yardstick and the peers"
    )
    how.add_argument("--pictures", type=int, default=10, help="samples of a picture")
    how.add_argument("--threads", type=int, default=1, help="of ONNX Runtime and of peers on a CPU; one is the least noisy")
    how.add_argument("--note", default="", help="said beside the numbers, for example: random weights")
    then = made.add_argument_group("what becomes of it")
    then.add_argument("--history", type=Path, default=HISTORY, help="the folder that runs are appended to")
    then.add_argument("--no-history", action="store_true", help="append nothing")
    then.add_argument("--check", action="store_true", help="exit code 1 if something is slower than in the last accepted run")
    then.add_argument(
        "--against",
        default=GEMM,
        help=f"what --check takes ratios to: {GEMM} or a peer, such as diffusers_eager",
    )
    then.add_argument("--percent", type=float, default=2.0, help="a regression is more than this for certain, and …")
    then.add_argument("--floor-ms", type=float, default=0.02, help="… more than this")
    then.add_argument("--confirm", type=int, default=1, help="how often what looks slower is measured again")
    then.add_argument("--accept", nargs="?", const=THIS_RUN, metavar="RUN", help="accept this run; or one that was measured before")
    then.add_argument(
        "--record", action="store_true", help="append what was measured at the first size to benchmarks/results/figures.jsonl"
    )
    then.add_argument(
        "--report", type=Path, metavar="HTML", help="write the history as a page; without --bundle or --check, only that"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 if something is not exact enough or slower, and for nothing else; 2 if it could not be measured, or not
    compared with what is accepted; 130 after Ctrl-C."""
    options = parser().parse_args(arguments)
    try:
        check(options)
        return run(options)
    except (SanaError, OSError) as error:
        print(f"latency: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("latency: interrupted", file=sys.stderr)
        return 130
    except Exception:  # Python's own exit code would be 1, which says that something is slower
        traceback.print_exc()
    return 2


def check(options: argparse.Namespace) -> None:
    """What can be told before anything is measured. Raises SanaError."""
    for name, least in {"rounds": 3, "pictures": 3, "steps": 1, "threads": 1, "confirm": 0}.items():
        if (number := getattr(options, name)) < least:
            raise RequestError(f"--{name}: got {number}; expected at least {least}.")
    for name in ("percent", "floor_ms"):
        if not (math.isfinite(number := getattr(options, name)) and number >= 0):
            raise RequestError(f"--{name.replace('_', '-')}: got {number}; expected a number from 0.")
    if options.sizes and (options.width or options.height):
        raise RequestError("--sizes: got --width or --height as well; expected one of them. Use --sizes 1024x768.")
    if options.accept is not None and options.no_history:
        raise RequestError("--accept: got --no-history as well; expected one of them.")
    if options.accept not in (None, THIS_RUN) and (options.bundle or options.check or options.record):
        raise RequestError(f"--accept {options.accept}: got more to do; a run of before is accepted without measuring. Call twice.")
    if not options.no_history:
        check_writable("--history", options.history, folder=True)
    if options.report:
        check_writable("--report", options.report)
    if options.check or not options.no_history:
        History(options.history).read()


def run(options: argparse.Namespace) -> int:
    """Raises SanaError."""
    history, code = History(options.history), 0
    if options.accept not in (None, THIS_RUN):
        print(f"{history.accept(options.accept)} records of run {options.accept} are accepted")
    elif options.bundle or options.check or options.accept or not options.report:
        code = _measured(options)
    if options.report:
        from benchmarks.latency_report import write_report
        from benchmarks.scaling_sweep import FILE, read, section

        found = read(options.history / FILE.name)
        more = [section(found)] if found else ["<h2>Growth</h2><p>Not there: benchmarks/scaling_sweep.py was not run.</p>"]
        print(f"report: {write_report(options.report, history.read(), more)}")
    return code


def _measured(options: argparse.Namespace) -> int:
    from benchmarks.latency_session import TINY, Session, has_gpu, tiny_bundle

    gpu = has_gpu() and options.backend != "onnxruntime"
    if not options.bundle:
        options.model = options.model or TINY
    prepare_torch(gpu, options.threads)
    words = options.peers if options.peers is not None else "eager" if options.model else "none"
    if words != "none":
        from benchmarks.latency_peers import PEERS, parse_peers

        options.peers = parse_peers(words)
        if options.model is None:
            raise RequestError(f"--peers: got {words}; expected a --model as well: peers have its weights.")
        known = [PEERS[word] for word in options.peers]
    else:
        options.peers, known = [], []
    if options.against not in (GEMM, *known):
        raise RequestError(f"--against: got {options.against!r}; expected {', '.join([GEMM, *known])}. Add it to --peers.")
    if options.record and options.model is None:
        raise RequestError("--record: expected --model as well: figures say how exact they are.")
    options.bundle = options.bundle or [tiny_bundle()]  # which may take minutes to build: last
    run_name = new_run()
    sessions = [Session(options, bundle, run_name) for bundle in options.bundle]
    codes = [session() for session in sessions]
    code = 1 if 1 in codes else max(codes)
    if options.record and code != 1 and (checkpoint := sessions[0].checkpoint) is not None:
        from benchmarks.latency_figures import record_step_ratios

        record_step_ratios(checkpoint, [found for session in sessions for found in session.records], note=options.note)
    return code


def prepare_torch(gpu: bool, num_threads: int) -> None:
    """fp32 is the truth here; and the peers' convolutions get the best algorithm."""
    import torch

    if gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(num_threads)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as after Ctrl-C, what was measured is kept
    raise SystemExit(main())
