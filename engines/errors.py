"""Every error that a user can meet, as one small tree.

    SanaError
    ├── SpecError                what was asked to be built cannot be: precision, target, shape range
    │   └── ConfigError          a configuration does not compose, or does not fit its schema
    ├── RequestError             a bad argument of generate(): prompt, size, seed, steps (also a ValueError)
    ├── CheckpointError          a checkpoint is missing, incomplete, or does not fit its config
    ├── BundleError              a bundle cannot be read or written
    │   ├── ManifestError        manifest.json (or another JSON file of ours) is not what the schema says
    │   ├── SchemaVersionError   written by a newer or an older program
    │   ├── MissingFileError     the manifest names a file that is not there
    │   ├── DigestError          a file is there and its bytes are not the ones that were written
    │   └── UnsafePathError      a path leads out of the bundle: in the manifest, by a link, or in ONNX external data
    ├── TensorRTVersionError     the engine was compiled by another TensorRT
    ├── ArchitectureError        the bundle holds no engine for this GPU
    ├── NoGpuError               no driver, no device, or a device that is too old
    ├── BuildError               export or compilation failed
    │   └── PluginMissingError   an expected plugin did not become a plugin layer
    ├── DiskFullError            no room left; says how much was needed, how much there was, and where
    └── ParityError              numbers differ from the reference by more than the bound

Each message says what was got, what was expected, and what to do. Programs print the message alone: no traceback.
This module imports nothing, so that every room can raise these.
"""

__all__ = [
    "ArchitectureError",
    "BuildError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DigestError",
    "DiskFullError",
    "ManifestError",
    "MissingFileError",
    "NoGpuError",
    "ParityError",
    "PluginMissingError",
    "RequestError",
    "SanaError",
    "SchemaVersionError",
    "SpecError",
    "TensorRTVersionError",
    "UnsafePathError",
]


class SanaError(Exception):
    """Base of all errors whose message is written for the user."""


class SpecError(SanaError):
    """What was asked to be built cannot be."""


class ConfigError(SpecError):
    """A configuration does not compose, or does not fit its schema."""


class RequestError(SanaError, ValueError):
    """A bad argument of a request for pictures."""


class CheckpointError(SanaError):
    """A checkpoint is missing, incomplete, or does not fit its config."""


class BundleError(SanaError):
    """A bundle cannot be read or written."""


class ManifestError(BundleError):
    """A JSON file of the bundle is not what its schema says."""


class SchemaVersionError(BundleError):
    """The bundle was written by a newer or an older program."""


class MissingFileError(BundleError):
    """The manifest names a file that is not there, or there is no manifest."""


class DigestError(BundleError):
    """A file's size or SHA-256 differs from the manifest's."""


class UnsafePathError(BundleError):
    """A path leads out of the bundle."""


class TensorRTVersionError(SanaError):
    """The engine was compiled by another TensorRT."""


class ArchitectureError(SanaError):
    """The bundle holds no engine for this GPU."""


class NoGpuError(SanaError):
    """No driver, no device, or a device that is too old."""


class BuildError(SanaError):
    """Export or compilation failed."""


class PluginMissingError(BuildError):
    """An expected plugin did not become a plugin layer of the engine."""


class DiskFullError(SanaError):
    """No room left on a disk."""


class ParityError(SanaError):
    """Numbers differ from the reference by more than the bound."""
