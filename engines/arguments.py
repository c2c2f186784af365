"""Command lines whose unknown options are answered with the nearest known one."""

import argparse
import difflib
from collections.abc import Iterator
from typing import NoReturn

__all__ = ["ArgumentParser"]

_UNKNOWN = "unrecognized arguments: "  # how argparse begins what it says of them


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with "did you mean" behind an option that neither it nor one of its commands has."""

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            for word in message.removeprefix(_UNKNOWN).split():
                close = difflib.get_close_matches(word.split("=")[0], [*_options(self)], n=1) if word.startswith("--") else []
                message += f"; did you mean {close[0]}?" if close else ""
        super().error(message)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
