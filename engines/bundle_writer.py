"""Write a bundle so that a kill at any point leaves the old one or the new one. docs/bundle.md says how.

    with write_bundle(out) as writer:
        writer.add(graph, "denoiser/model.onnx")     # or write below writer.path
        bundle = writer.finish(info)                 # digests, manifest, checks, swap

Leaving the block without finish(), or by an error, leaves `out` as it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath

from engines.atomic import TemporaryFolder, fsync_tree, make_temporary, recover, remove_dead, replace_folder
from engines.bundle import Bundle, TotalProgress
from engines.digest import Span, parts_of, spans_sha256
from engines.disk import DiskErrors
from engines.errors import BundleError
from engines.manifest import MANIFEST_NAME, BundleInfo, FileEntry, FileRole, Manifest
from engines.paths import check_relative
from engines.quantization_report import RECIPE_NAME
from engines.spec import COMPONENTS
from engines.token_table import TABLE_NAME
from engines.weight_report import weights_name

__all__ = ["BundleWriter", "write_bundle"]

_REMEDY = "Free some space, or choose a folder on another disk (--out)."


class BundleWriter:
    """Made by write_bundle. `path` is the folder to fill; it is not yet where the bundle will be."""

    def __init__(self, out: Path, temporary: TemporaryFolder) -> None:
        self.out, self.path = out, temporary.path

    def add(self, source: Path, name: str) -> None:
        """Copy a file into the bundle as `name`. A copy, not a link: who edits the bundle must not edit the source with it.

        Raises UnsafePathError for a name that no bundle may have, DiskFullError.
        """
        target = self.path / check_relative(name, source="the bundle's writer")
        target.parent.mkdir(parents=True, exist_ok=True)
        with DiskErrors(self.path, needed=source.stat().st_size, remedy=_REMEDY):
            shutil.copyfile(source, target)

    def finish(self, info: BundleInfo, *, progress: TotalProgress | None = None) -> Bundle:
        """Describe what is in `path`, check it as a reader would, and swap it into place.

        progress: called with the bytes digested so far and the bytes in all. Raises a BundleError for files that do not make a
        bundle, DiskFullError, pydantic's ValidationError for an `info` that does not fit the files.
        """
        paths = sorted(path for path in self.path.rglob("*") if not path.is_dir() or path.is_symlink())
        names = [check_relative(path.relative_to(self.path).as_posix(), source="the bundle's writer") for path in paths]
        for path, name in zip(paths, names, strict=True):
            if path.is_symlink() or not path.is_file():
                raise BundleError(f"{name}: got a link or a special file; expected regular files only. Copy what it points to.")
        roles = [_role(name) for name in names]
        sizes = [path.stat().st_size for path in paths]
        parts = [parts_of(path, size) for path, size in zip(paths, sizes, strict=True)]
        total = sum(size * (2 if spans else 1) for size, spans in zip(sizes, parts, strict=True))
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        # a file and its parts at once: read twice, the second time from the page cache, in the time that the file alone takes
        whole = [Span(path) for path in paths]
        found = iter(spans_sha256([*whole, *(span for spans in parts for span in spans)], progress=advance))
        digests = list(islice(found, len(paths)))
        files = {
            name: FileEntry(sha256=digest, size=size, role=role, parts=tuple(islice(found, len(spans))))
            for name, digest, size, role, spans in zip(names, digests, sizes, roles, parts, strict=True)
        }
        manifest = Manifest(**dict(info), files=files)
        (self.path / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        bundle = Bundle.open(self.path, verify=False)  # never swap in what a reader would refuse
        fsync_tree(self.path)
        try:
            replace_folder(self.path, self.out)
        except OSError as error:  # a mount point; a folder of an image's lower layer; somebody else's
            raise BundleError(
                f"{self.out}: cannot be replaced ({error.strerror}). Remove it first, or choose another --out; nothing was changed."
            ) from error
        return replace(bundle, path=self.out)


@contextmanager
def write_bundle(out: str | Path) -> Iterator[BundleWriter]:
    """Write the bundle at `out`, which may exist. Also deletes what writers of the same bundle left that were killed.

    Raises BundleError if something else than a bundle is at `out`, DiskFullError if the disk is full, also from inside the block.
    """
    out = Path(os.path.realpath(out))  # a link to a bundle stays a link
    out.parent.mkdir(parents=True, exist_ok=True)
    recover(out)
    _check_replaceable(out)
    prefix = f".{out.name}.new-"
    remove_dead(out.parent, prefix)
    temporary = make_temporary(out.parent, prefix)
    try:
        with DiskErrors(temporary.path, remedy=_REMEDY):
            yield BundleWriter(out, temporary)
    finally:
        temporary.remove()  # half a bundle; after the swap, the old one
        remove_dead(out.parent, prefix)  # the older one that a writer left which was killed in the middle of its swap


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise BundleError(f"{out}: got a file; expected a folder, or nothing. Choose another --out.")
    if any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise BundleError(
            f"{out}: got a folder with files and no {MANIFEST_NAME}; expected a bundle to replace, an empty folder, or nothing. "
            "Choose another --out: replacing deletes what is there."
        )


def _role(name: str) -> FileRole:
    path = PurePosixPath(name)
    by_place: dict[str, FileRole] = {
        **dict.fromkeys(("parity.json", RECIPE_NAME, *map(weights_name, COMPONENTS)), "report"),
        **dict.fromkeys(("LICENSE", "LICENCE", "NOTICE"), "licence"),
        TABLE_NAME: "weights",
    }
    if name in by_place:
        return by_place[name]
    if path.parts[0] == "tokenizer":
        return "tokenizer"
    if path.parts[0] == "parity":
        return "golden"
    if path.parts[0] == "quality":
        return "report"
    by_suffix: dict[str, FileRole] = {".onnx": "graph", ".data": "weights", ".engine": "engine"}
    if path.suffix in by_suffix:
        return by_suffix[path.suffix]
    raise BundleError(f"{name}: got a file of no known role; expected one that docs/bundle.md names. Leave it out.")
