"""Options that are misspelt."""

import pytest

from engines.arguments import ArgumentParser


@pytest.fixture
def parser() -> ArgumentParser:
    made = ArgumentParser(prog="sana", allow_abbrev=False)
    made.add_argument("--verbose", action="store_true")
    commands = made.add_subparsers()
    commands.add_parser("draw", allow_abbrev=False).add_argument("--steps", type=int)
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["draw", "--setps", "4"], "unrecognized arguments: --setps 4; did you mean --steps?"),
        (["draw", "--setps=4"], "unrecognized arguments: --setps=4; did you mean --steps?"),
        (["--verbos", "draw"], "unrecognized arguments: --verbos; did you mean --verbose?"),
        (["draw", "--frobnicate"], "unrecognized arguments: --frobnicate\n"),
        (["draw", "--steps", "x"], "invalid int value: 'x'\n"),
    ],
)
def test_the_nearest_is_named(parser, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
