// Where an ONNX file says its weights are. As engines/onnx_locations.py, which says why.
#pragma once

#include <set>
#include <string>

namespace sana {

// Every `location` of external data. Raises BundleError if the file is not ONNX, or too large to be a graph.
std::set<std::string> external_locations(const std::string& path);

}  // namespace sana
