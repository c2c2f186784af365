"""Tensors on many processes: written in shares, read on any number of processes, and as one file for everything else.

The format is PyTorch's distributed checkpoint (DCP). A folder is written under a temporary name and renamed when every process has
written its share, so that one with its final name is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shares
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_shares

__all__ = ["is_sharded", "load", "save", "save_async", "shapes", "sync"]

T = TypeVar("T")


def is_sharded(folder: Path) -> bool:
    return (folder / ".metadata").is_file()


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    """One process is no mistake here: without PyTorch's warning that there is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield


def _together(what: Callable[[], T]) -> T:
    """Do `what`; if it fails on one process, all raise OSError, so that none waits for another."""
    result, said = None, None
    try:
        result = what()
    except (Exception, CheckpointException) as error:  # the latter is no Exception, and its text is a traceback for each process
        causes = [str(cause[0]) for cause in error.failures.values()] if isinstance(error, CheckpointException) else [str(error)]
        said = next(iter(causes), type(error).__name__)
    everybodys: list[str | None] = [said]
    if dist.is_initialized():
        everybodys = [None] * dist.get_world_size()
        dist.all_gather_object(everybodys, said)
    failed = [f"process {rank}: {text}" for rank, text in enumerate(everybodys) if text is not None]
    if failed:
        raise OSError(failed[0])
    return result  # type: ignore[return-value]


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def _clear(folder: Path) -> None:
    if _is_first():
        shutil.rmtree(_temporary(folder), ignore_errors=True)
        _temporary(folder).mkdir(parents=True)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish(folder: Path, texts: Mapping[str, str]) -> None:
    if _is_first():
        part = _temporary(folder)
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
            sync(part / name)
        sync(part)
        os.replace(part, folder)


@contextlib.contextmanager
def _removed_if_it_fails(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        if _is_first():
            shutil.rmtree(_temporary(folder), ignore_errors=True)
        raise


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `folder`, which is new, from this process alone. Raises OSError."""
    with _removed_if_it_fails(folder), _alone_is_fine():
        _together(lambda: _clear(folder))
        _together(lambda: save_shares(dict(tensors), checkpoint_id=_temporary(folder)))
        _together(lambda: _finish(folder, {}))


def save_async(
    folder: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str], group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """As save(), from all processes, while training goes on: tensors are copied to host memory before this returns, and written
    behind it, with small files beside them. group: of all processes, on CPUs, for the writing alone.

    All processes call the function that is returned, before the next save and before they end: it waits and renames. Either raises
    OSError on all of them if it fails on one; the folder is not there then.
    """
    with _removed_if_it_fails(folder):
        _together(lambda: _clear(folder))
        future: Any = _together(lambda: async_save(dict(tensors), checkpoint_id=_temporary(folder), process_group=group))

    def finish() -> None:
        with _removed_if_it_fails(folder):
            _together(future.result)
            _together(lambda: _finish(folder, texts))

    return finish


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a checkpoint. Raises FileNotFoundError if it is none."""
    if not is_sharded(folder):
        raise FileNotFoundError(f"{folder}: got no distributed checkpoint; expected a folder with .metadata and shares")
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(item.size) for name, item in found.items() if isinstance(item, TensorStorageMetadata)}


def load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Into `tensors`, whole or shares on any number of processes, whatever they were when they were saved. Raises OSError."""
    with _alone_is_fine():
        _together(lambda: load_shares(dict(tensors), checkpoint_id=folder))
