"""`sana config show EXPERIMENT [key=value…]`: the composed configuration, and where each value was written."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from apps.cli.output import add_row, make_console, make_table, printable
from engines.errors import SanaError

if TYPE_CHECKING:
    from runtime.config import Composed

__all__ = ["DESCRIPTION", "HELP", "NAME", "add_arguments", "run"]

NAME = "config"
HELP = "show an experiment's composed configuration, and where each value was written"
DESCRIPTION = HELP
PROGRAM = "train.schema"  # knows what a training run accepts; a process of its own, because an app must not import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    show = actions.add_parser("show", help=HELP, description=DESCRIPTION, allow_abbrev=False)
    show.add_argument("experiment", help="a file of configs/experiment, without .yaml")
    show.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a value, or a group's file: trainer.steps=10 env=cluster optimizer=adamw"
    )
    show.add_argument("--config-dir", metavar="FOLDER", help="a folder to search before configs/ (also: SANA_CONFIG_DIR)")
    show.add_argument("--json", action="store_true", help='print {key: {"value": …, "origin": …}}')
    show.add_argument("--check", action="store_true", help="also hold it against the schema of training")


def run(arguments: argparse.Namespace) -> int:
    from runtime.config import compose_experiment

    composed = compose_experiment(arguments.experiment, arguments.overrides, arguments.config_dir)
    if arguments.json:
        found = {key: {"value": value, "origin": str(origin)} for key, value, origin in composed.leaves()}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show(composed)
    return _check(arguments) if arguments.check else 0


def _show(composed: Composed) -> None:
    rows = [
        (key, _text(value), f"{origin}  {origin.expression}" if origin and origin.expression else str(origin))
        for key, value, origin in composed.leaves()
    ]
    if sys.stdout.isatty():
        table = make_table(composed.name, "key", "value", "from")
        for row in rows:
            add_row(table, *row)
        make_console().print(table)
        return
    keys, values = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for key, value, origin in rows:
        print(printable(f"{key:{keys}} = {value:{values}}  {origin}"))


def _text(value: Any) -> str:
    """As it could be written in YAML."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _check(arguments: argparse.Namespace) -> int:
    """The exit code of `python -m train.schema`, whose message is shown."""
    if importlib.util.find_spec("train") is None:
        raise SanaError("config: the package 'train' is not installed, which has the schema. Leave --check out, or use a checkout.")
    sys.stdout.flush()
    folder = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    command = [sys.executable, "-m", PROGRAM, *folder, "--", arguments.experiment, *arguments.overrides]
    return subprocess.run(command, check=False).returncode
