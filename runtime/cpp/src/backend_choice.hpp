// Which backend draws, and why. As runtime/choose.py.
#pragma once

#include <string>

#include "bundle.hpp"

namespace sana {

// Why ONNX Runtime draws, which is the one backend of this library. Raises RequestError for a word that names none, and, if
// "tensorrt" was named, NoGpuError or ArchitectureError where Python raises them, else RequestError.
std::string choose_backend(const std::string& wanted, const Bundle& bundle);

}  // namespace sana
