// Which backend draws, and why. As runtime/choose.py.
#pragma once

#include <string>

#include "bundle.hpp"
#include "engine_parts.hpp"

namespace sana {

// One that was named is used or its error raised; "auto" says what it took and for what reason. Raises RequestError for a word that
// names none; for "tensorrt" NoGpuError, ArchitectureError or, also from a library that was built without its headers,
// TensorRTVersionError.
EngineParts::Chosen choose_backend(const Bundle& bundle, const EngineOptions& options, const EngineParts::Files& files);

std::string built_with();  // what of TensorRT this library has, in words

// Raises ArchitectureError if a component has no engine for `sm`.
void require_engines(const Bundle& bundle, const std::string& sm);

// Raises TensorRTVersionError unless the engines were compiled by just this TensorRT. flavor: "rtx" or "full".
void check_tensorrt(const Bundle& bundle, const std::string& flavor, const std::string& version);

}  // namespace sana
