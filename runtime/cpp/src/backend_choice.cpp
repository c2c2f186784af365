#include "backend_choice.hpp"

#include <algorithm>
#include <vector>

#include "failure.hpp"
#include "gpu.hpp"
#include "python_text.hpp"

namespace sana {
namespace {

// Raises ArchitectureError if a component has no engine for `sm`.
void require_engines(const Bundle& bundle, const std::string& sm) {
    for (const std::string& component : component_names()) {
        if (bundle.manifest.engine_name(component, sm) != nullptr) continue;
        std::string have;
        for (const std::string& target : bundle.manifest.targets) have += (have.empty() ? "engines for " : ", ") + target;
        throw Failure(ErrorKind::kArchitecture,
                      bundle.path + ": this GPU is " + sm + ", and the bundle has " +
                          (have.empty() ? "no engines, only portable graphs" : have) +
                          ". Rebuild on this machine with --target current, or run the portable graphs with --backend onnxruntime.");
    }
}

}  // namespace

std::string choose_backend(const std::string& wanted, const Bundle& bundle) {
    static const std::vector<std::string> words = {"auto", "tensorrt", "onnxruntime"};
    if (std::find(words.begin(), words.end(), wanted) == words.end()) {
        throw Failure(ErrorKind::kRequest, "backend: got " + repr(wanted) + "; " + nearest(wanted, words) + ".");
    }
    if (wanted == "onnxruntime") return "it was asked for";
    if (wanted == "tensorrt") {
        require_engines(bundle, device_info().sm());
        throw Failure(ErrorKind::kRequest,
                      "backend: got 'tensorrt', which this libsana_runtime was built without. Use 'onnxruntime', or the Python runtime.");
    }
    if (bundle.manifest.targets.empty()) return "the bundle has portable graphs only";
    try {
        require_engines(bundle, device_info().sm());
    } catch (const Failure& failure) {
        const bool none = failure.error().kind == ErrorKind::kNoGpu;
        return (none ? "TensorRT has nothing to run on: " : "TensorRT cannot run this bundle here: ") + failure.error().message;
    }
    return "this libsana_runtime was built without TensorRT";
}

}  // namespace sana
