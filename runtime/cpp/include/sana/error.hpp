// Every error that a user can meet: the classes of engines/errors.py by their names, with the same texts.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "sana/export.h"

namespace sana {

enum class ErrorKind {
    kSana,  // none of the others
    kSpec,
    kRequest,
    kCheckpoint,
    kBundle,
    kManifest,
    kSchemaVersion,
    kMissingFile,
    kDigest,
    kUnsafePath,
    kTensorRTVersion,
    kArchitecture,
    kNoGpu,
    kDiskFull,
    kBuild,          // an engine that TensorRT does not take
    kPluginMissing,  // a plugin of an engine that TensorRT was not given
    kGpuMemory,
    kCancelled,  // a step callback asked for it; in Python its own exception comes out
};

SANA_EXPORT std::string_view kind_name(ErrorKind kind);  // "ManifestError"

struct Error {
    ErrorKind kind;
    std::string message;  // UTF-8: what was got, what was expected, what to do
};

// A value, or why there is none.
template <class T>
class [[nodiscard]] Result {
  public:
    Result(T value) : held_(std::in_place_index<0>, std::move(value)) {}
    Result(Error error) : held_(std::in_place_index<1>, std::move(error)) {}

    explicit operator bool() const { return held_.index() == 0; }
    T& operator*() { return std::get<0>(held_); }
    T* operator->() { return &std::get<0>(held_); }
    const Error& error() const { return std::get<1>(held_); }

  private:
    std::variant<T, Error> held_;
};

}  // namespace sana
