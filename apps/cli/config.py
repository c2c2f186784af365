"""`sana config show NAME [key=value…]`: the composed configuration, and where each value was written.

NAME: an experiment, or a file right in configs/: build, runtime.
"""

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
HELP = "show a composed configuration, and where each value was written"
DESCRIPTION = HELP
# Programs that know what a configuration may say; processes of their own, because an app must not import their rooms.
SCHEMAS = {"build": "export.settings", "experiment": "train.schema"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    show = actions.add_parser("show", help=HELP, description=DESCRIPTION, allow_abbrev=False)
    show.add_argument("name", help="a file of configs/experiment without .yaml; or build, runtime")
    show.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a value, or a group's file: trainer.steps=10 env=cluster optimizer=adamw"
    )
    show.add_argument("--config-dir", metavar="FOLDER", help="a folder to search before configs/ (also: SANA_CONFIG_DIR)")
    show.add_argument("--json", action="store_true", help='print {key: {"value": …, "origin": …}}')
    show.add_argument("--check", action="store_true", help="also hold it against its schema")


def run(arguments: argparse.Namespace) -> int:
    from runtime.config import compose, compose_experiment

    kind = _kind(arguments.name, arguments.config_dir)
    composed = (compose_experiment if kind == "experiment" else compose)(arguments.name, arguments.overrides, arguments.config_dir)
    if arguments.json:
        found = {key: {"value": value, "origin": str(origin)} for key, value, origin in composed.leaves()}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show(composed)
    return _check(arguments, kind, composed) if arguments.check else 0


def _kind(name: str, config_dir: str | None) -> str:
    """What `name` configures: "experiment"; or else the first word of a file right in a folder of configurations."""
    from runtime.config import names_in_group

    if name in names_in_group("experiment", config_dir) or name not in names_in_group("", config_dir):
        return "experiment"
    return name.partition("_")[0]  # one's own build_4k.yaml inherits from build.yaml


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


def _check(arguments: argparse.Namespace, kind: str, composed: Composed) -> int:
    """The exit code of the program that has the schema, whose message is shown."""
    if kind == "runtime":
        from runtime.config import validate
        from runtime.settings import RuntimeSettings

        validate(composed, RuntimeSettings)
        print(f"{composed.name}: fits the schema of the runtime", file=sys.stderr)
        return 0
    if kind not in SCHEMAS:
        raise SanaError(
            f"config: {composed.name}: no schema for it; expected an experiment, build… or runtime…. Leave --check out."
        )
    room = SCHEMAS[kind].partition(".")[0]
    if importlib.util.find_spec(room) is None:
        raise SanaError(
            f"config: the package {room!r} is not installed, which has the schema. Leave --check out, or use a checkout."
        )
    sys.stdout.flush()
    folder = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    command = [sys.executable, "-m", SCHEMAS[kind], *folder, "--", arguments.name, *arguments.overrides]
    return subprocess.run(command, check=False).returncode
