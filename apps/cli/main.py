"""The `sana` command. Each of COMMANDS is a module of this package, each of PROGRAMS another program; docs/cli.md shows them.

What a command makes goes to stdout, what it says to stderr. Exit codes: 0 done; 1 compared, and different (replay, verify);
2 an error, said in one message (SANA_DEBUG=1 shows where it came from); 130 interrupted. Loading this module loads nothing heavy.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from apps.cli import config, generate, inspect, replay, verify
from apps.cli.program import PROGRAMS
from engines.arguments import ArgumentParser
from engines.errors import SanaError

__all__ = ["COMMANDS", "main"]

COMMANDS = {module.NAME: module for module in (generate, replay, inspect, verify, config)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (that of the process unless given). Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _messages_on_stderr():
            return _run(arguments)
    except KeyboardInterrupt:
        print("sana: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `sana inspect … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit has somewhere to go
        return 0
    except (SanaError, OSError) as error:
        if os.environ.get("SANA_DEBUG") == "1":
            traceback.print_exc()
        print(f"sana: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in PROGRAMS:
        return PROGRAMS[arguments[0]].run(arguments[1:])
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        from engines.spec import nearest

        raise SanaError(f"unknown command {arguments[0]!r}; {nearest(arguments[0], [*COMMANDS, *PROGRAMS])}. Try: sana --help")
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:  # --help, --version, or a usage message that argparse has printed
        return int(stop.code or 0)
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return 2
    code: int = COMMANDS[parsed.command].run(parsed)
    sys.stdout.flush()  # here, where a closed pipe is expected
    return code


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="sana", description="From a checkpoint to pictures.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, program in PROGRAMS.items():
        commands.add_parser(name, help=program.help)  # for the list in --help; what follows is parsed by the program
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION, allow_abbrev=False))
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for: reading package metadata is slow."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: object) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and end")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"sana {version('sana-deploy')}")
        except PackageNotFoundError:
            print("sana (not installed)")
        parser.exit()


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """What the other rooms log and warn of, as plain lines; as it was before on the way out, for callers within a program."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("sana: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("runtime", "engines")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)  # each is about what the user asked for
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    print(f"sana: warning: {message}", file=sys.stderr)
