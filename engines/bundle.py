"""Open a bundle: the folder that holds everything a picture needs. docs/bundle.md describes the format.

Opening never executes anything that is in it. In order, cheapest first: schema version, schema, paths, presence, sizes, where the
graphs say their weights are, digests. After that, a file of the bundle holds the bytes that its writer wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engines.digest import Span, file_sha256, parts_of, spans_sha256
from engines.errors import (
    ArchitectureError,
    DigestError,
    ManifestError,
    MissingFileError,
    SchemaVersionError,
    TensorRTVersionError,
    UnsafePathError,
)
from engines.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSIONS,
    BundleInfo,
    FileEntry,
    FileRole,
    LatentInfo,
    Manifest,
    PromptInfo,
    ScheduleInfo,
    TensorRTInfo,
    graph_name,
)
from engines.onnx_locations import external_locations
from engines.paths import inside
from engines.spec import ComponentName
from engines.strict import loads, read_bounded, validate_json
from engines.token_table import TABLE_NAME, table_offset

__all__ = [
    "Bundle",
    "BundleInfo",
    "FileEntry",
    "FileRole",
    "LatentInfo",
    "Manifest",
    "PromptInfo",
    "ScheduleInfo",
    "TensorRTInfo",
    "parse_manifest",
]

TotalProgress = Callable[[int, int], None]  # bytes done, bytes in all


def parse_manifest(data: bytes, *, source: str) -> Manifest:
    """Raises SchemaVersionError for another schema, ManifestError or UnsafePathError for anything else that is wrong."""
    document = loads(data, source=source)
    oldest, newest = SCHEMA_VERSIONS
    version = document.get("schema_version", oldest) if isinstance(document, dict) else oldest
    if type(version) is not int or version < 1:  # True equals 1
        raise ManifestError(f"{source}: schema_version: got {version!r}; expected {oldest} to {newest}.")
    if not oldest <= version <= newest:
        remedy = "upgrade, or rebuild the bundle here" if version > newest else "rebuild the bundle"
        raise SchemaVersionError(f"{source}: got schema {version}, this program reads {oldest} to {newest}: {remedy}.")
    return validate_json(Manifest, data, source=source)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle that was opened, and so checked."""

    path: Path
    manifest: Manifest
    digest: str  # SHA-256 of manifest.json, which names the SHA-256 of every other file: one string for the whole bundle

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, progress: TotalProgress | None = None) -> Bundle:
        """Check the folder at `path` and describe it. Finishes the work of a writer that was killed (docs/bundle.md).

        verify: also compare every file's SHA-256. Without it, a changed byte passes; everything else is still checked.
        progress: called with the bytes digested so far and the bytes in all.
        Raises a BundleError: MissingFileError, SchemaVersionError, ManifestError, UnsafePathError, DigestError.
        """
        path = Path(path)
        if not path.is_dir():
            from engines.atomic import recover  # only here: it needs POSIX, and reading a bundle does not

            recover(path)
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise MissingFileError(
                f"{path}: got {found}; expected the folder of a bundle. Make one with: sana build --out {path} …"
            )
        data = read_bounded(path / MANIFEST_NAME)
        manifest = parse_manifest(data, source=str(path / MANIFEST_NAME))
        bundle = cls(path=path, manifest=manifest, digest=hashlib.sha256(data).hexdigest())
        with bundle._still_there():
            bundle._check_files()
            bundle._check_external_data()
            bundle._check_token_table()
        if verify:
            bundle.verify(progress=progress)
        return bundle

    def verify(self, names: Iterable[str] | None = None, *, whole: bool = False, progress: TotalProgress | None = None) -> None:
        """Compare the SHA-256 of these files, or of every file, with the manifest's. Raises DigestError for one that differs.

        Of a file whose parts the manifest has, the parts, on all cores: where they are equal, the file is.
        whole: also of all of it, so that the manifest's digest of the file is known to be of the same bytes as those of its parts.
        progress: called with the bytes digested so far and the bytes in all, from other threads, one at a time.
        """
        names = dict.fromkeys(self.manifest.files if names is None else names)
        entries = [self.manifest.files[name] for name in names]
        total = sum(entry.size * (2 if whole and entry.parts else 1) for entry in entries)
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        with self._still_there():
            expected = {name: self._expected(name, whole=whole) for name in names}
            spans = [span for digests in expected.values() for span in digests]
            found = dict(zip(spans, spans_sha256(spans, progress=advance), strict=True))
            for name, digests in expected.items():
                if any(found[span] != digest for span, digest in digests.items()):
                    raise self._changed(name, found)

    def _expected(self, name: str, *, whole: bool) -> dict[Span, str]:
        """The digests to compare of a file: of its parts, if the manifest has them, or of all of it; `whole`: of both."""
        path, entry = self.file(name), self.manifest.files[name]
        parts = dict(zip(parts_of(path, entry.size), entry.parts, strict=True)) if entry.parts else {}
        return parts if parts and not whole else {Span(path): entry.sha256, **parts}

    def _changed(self, name: str, found: dict[Span, str]) -> DigestError:
        path, expected = self.file(name), self.manifest.files[name].sha256
        got = found.get(Span(path)) or file_sha256(path)
        if got == expected:
            return DigestError(f"{self.path}: {name} has the SHA-256 of the manifest, and its parts have not. Rebuild the bundle.")
        return DigestError(
            f"{self.path}: {name} was changed: got SHA-256 {got}; expected {expected}. Copy the file again, or rebuild."
        )

    def file(self, name: str) -> Path:
        """A file that the manifest names. Raises MissingFileError for any other, UnsafePathError if it leads out by now."""
        if name not in self.manifest.files:
            raise MissingFileError(f"{self.path}: the bundle has no {name!r}. Rebuild with a program that writes it.")
        return inside(self.path, name, source=MANIFEST_NAME)

    def onnx_path(self, component: ComponentName) -> Path:
        """The portable graph of `component`; its weights lie beside it. Raises MissingFileError."""
        return self.file(graph_name(component))

    def portable_files(self, component: ComponentName) -> tuple[str, ...]:
        """The portable graph of `component` and the files of its weights, as the manifest names them."""
        weights = (f"{component}/{location}" for location in external_locations(self.onnx_path(component)))
        return (graph_name(component), *sorted(weights))

    def engine_path(self, component: ComponentName, sm: str) -> Path | None:
        """The TensorRT engine that runs `component` on the architecture `sm` ("sm89"), or None if there is none."""
        name = self.manifest.engine_name(component, sm)
        return None if name is None else self.file(name)

    def require_engine(self, component: ComponentName, sm: str) -> Path:
        """As engine_path. Raises ArchitectureError where that gives None, MissingFileError if the bundle has not the component."""
        found = self.engine_path(component, sm)
        if found is None:
            self.onnx_path(component)
            targets = self.manifest.targets
            have = f"engines for {', '.join(targets)}" if targets else "no engines, only portable graphs"
            raise ArchitectureError(
                f"{self.path}: this GPU is {sm}, and the bundle has {have}. Rebuild on this machine with --target current, "
                "or run the portable graphs with --backend onnxruntime."
            )
        return found

    def check_tensorrt(self, *, flavor: str, version: str) -> None:
        """Raises TensorRTVersionError unless the engines were compiled by just this TensorRT: engines are not portable across
        versions. flavor: "rtx" or "full"; version: as TensorRT itself writes it."""
        built = self.manifest.tensorrt
        if built is not None and (built.flavor, built.version) != (flavor, version):
            names = {"rtx": "TensorRT for RTX", "full": "TensorRT"}
            raise TensorRTVersionError(
                f"{self.path}: the engines were compiled by {names[built.flavor]} {built.version}; "
                f"this program runs {names.get(flavor, flavor)} {version}. Install that version, rebuild the bundle with this one, "
                "or run the portable graphs with --backend onnxruntime."
            )

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:  # it was there a moment ago
            raise MissingFileError(
                f"{self.path}: the bundle was replaced while it was read ({error.filename}). Open it again."
            ) from None

    def _check_files(self) -> None:
        for name, entry in self.manifest.files.items():
            size = self.file(name).stat().st_size
            if size != entry.size:
                raise DigestError(
                    f"{self.path}: {name} was changed or cut off: got {size} bytes; expected {entry.size}. "
                    "Copy the file again, or rebuild."
                )

    def _check_token_table(self) -> None:
        """It is mapped and looked up as it is, so its header has to say what the manifest does."""
        m = self.manifest
        if m.token_table_rows:
            path, precision = self.file(TABLE_NAME), m.precision["text_encoder"]
            table_offset(path, rows=m.token_table_rows, channels=m.caption_channels, precision=precision)

    def _check_external_data(self) -> None:
        """A graph may name weights in files of the manifest only: what is not digested is not read."""
        for component in self.manifest.components:
            for location in external_locations(self.onnx_path(component)):
                name = str(PurePosixPath(component) / location)
                # checked as it is written: PurePosixPath would drop a "./", and join() everything before a "/"
                if location != PurePosixPath(name).name or name not in self.manifest.files:
                    raise UnsafePathError(
                        f"{self.path}: {component}/model.onnx keeps weights in {location[:200]!r}; expected the name of a file "
                        "beside it that the manifest lists. Do not use this bundle unless you know who made it."
                    )
