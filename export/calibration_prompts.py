"""Prompts that a calibration draws, one a line of a text file: the recipe's, the checkpoint's own, or the one that ships."""

from __future__ import annotations

from pathlib import Path

from engines.errors import SpecError
from runtime.prompt import MAX_PROMPT_CHARACTERS

__all__ = ["MAX_FILE_BYTES", "SHIPPED", "prompts_file", "read_prompts"]

SHIPPED = Path(__file__).with_suffix(".txt")
OWN = "calibration_prompts.txt"  # in a checkpoint's folder: what a model of a narrow world is asked for
MAX_FILE_BYTES = 16 << 20


def prompts_file(asked: Path | None, checkpoint: Path) -> Path:
    """The file to read: `asked`, else that in the checkpoint's folder, else the one that ships."""
    if asked is not None:
        return asked
    own = checkpoint / OWN
    return own if own.is_file() else SHIPPED


def read_prompts(path: Path, num: int, *, most: int | None = None) -> tuple[str, ...]:
    """The first `num` prompts, stripped; empty lines and those that begin with # are none. most: up to so many, if they are there.

    Raises SpecError: no such file, not UTF-8, too large, a line that is too long or has a NUL in it, fewer prompts than asked.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpecError(
            f"{path}: calibration prompts cannot be read ({error.strerror}); expected a text file with a prompt a line. "
            "Name one by calibration.prompts, or leave it null for those that ship."
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise SpecError(f"{path}: got more than {MAX_FILE_BYTES} bytes of prompts; expected at most that. Shorten the file.")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SpecError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}). Save the file as UTF-8.") from None
    prompts = []
    for number, whole in enumerate(lines, 1):
        if not (text := whole.strip()) or text.startswith("#"):
            continue
        if len(text) > MAX_PROMPT_CHARACTERS or "\0" in text:
            what = "a NUL character" if "\0" in text else f"{len(text)} characters"
            raise SpecError(f"{path}:{number}: got {what}; expected a prompt of at most {MAX_PROMPT_CHARACTERS} characters.")
        prompts.append(text)
    if len(prompts) < num:
        raise SpecError(
            f"{path}: got {len(prompts)} calibration prompts; expected {num} (calibration.num_prompts). "
            "Add prompts, or ask for fewer."
        )
    return tuple(prompts[: num if most is None else most])
