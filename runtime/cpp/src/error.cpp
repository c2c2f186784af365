#include "sana/error.hpp"

namespace sana {

std::string_view kind_name(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kSana:
            return "SanaError";
        case ErrorKind::kSpec:
            return "SpecError";
        case ErrorKind::kRequest:
            return "RequestError";
        case ErrorKind::kCheckpoint:
            return "CheckpointError";
        case ErrorKind::kBundle:
            return "BundleError";
        case ErrorKind::kManifest:
            return "ManifestError";
        case ErrorKind::kSchemaVersion:
            return "SchemaVersionError";
        case ErrorKind::kMissingFile:
            return "MissingFileError";
        case ErrorKind::kDigest:
            return "DigestError";
        case ErrorKind::kUnsafePath:
            return "UnsafePathError";
        case ErrorKind::kTensorRTVersion:
            return "TensorRTVersionError";
        case ErrorKind::kArchitecture:
            return "ArchitectureError";
        case ErrorKind::kNoGpu:
            return "NoGpuError";
        case ErrorKind::kDiskFull:
            return "DiskFullError";
        case ErrorKind::kBuild:
            return "BuildError";
        case ErrorKind::kPluginMissing:
            return "PluginMissingError";
        case ErrorKind::kGpuMemory:
            return "GpuMemoryError";
        case ErrorKind::kCancelled:
            return "Cancelled";
    }
    return "SanaError";
}

}  // namespace sana
