#include "backend_choice.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "failure.hpp"
#include "gpu.hpp"
#include "ort_backend.hpp"
#include "python_text.hpp"
#if SANA_TENSORRT
#include "trt_backend.hpp"
#endif

namespace sana {
namespace {

EngineParts::Chosen on_cpu(const Bundle& bundle, const EngineOptions& options, std::string reason) {
    auto sessions = ort_sessions(bundle, options.num_threads, options.onnxruntime_library);
    return {"onnxruntime", std::move(reason), std::make_unique<OrtBackend>(bundle, std::move(sessions), options.low_memory)};
}

std::unique_ptr<Backend> on_gpu(const Bundle& bundle, [[maybe_unused]] const EngineOptions& options,
                                [[maybe_unused]] const EngineParts::Files& files) {
#if SANA_TENSORRT
    return open_tensorrt(bundle, options, files);
#else
    require_engines(bundle, device_info().sm());
    throw Failure(ErrorKind::kTensorRTVersion,
                  "this libsana_runtime was built without TensorRT. Build it with TENSORRT_ROOT set to an SDK, or use the "
                  "onnxruntime back end.");
#endif
}

}  // namespace

void require_engines(const Bundle& bundle, const std::string& sm) {
    for (const std::string& component : bundle.manifest.components()) {
        if (bundle.manifest.engine_name(component, sm) != nullptr) continue;
        std::string have;
        for (const std::string& target : bundle.manifest.targets) have += (have.empty() ? "engines for " : ", ") + target;
        throw Failure(ErrorKind::kArchitecture,
                      bundle.path + ": this GPU is " + sm + ", and the bundle has " +
                          (have.empty() ? "no engines, only portable graphs" : have) +
                          ". Rebuild on this machine with --target current, or run the portable graphs with --backend onnxruntime.");
    }
}

void check_tensorrt(const Bundle& bundle, const std::string& flavor, const std::string& version) {
    const auto& built = bundle.manifest.tensorrt;
    if (!built || (built->flavor == flavor && built->version == version)) return;
    const auto name = [](const std::string& which) { return std::string(which == "rtx" ? "TensorRT for RTX " : "TensorRT "); };
    throw Failure(ErrorKind::kTensorRTVersion, bundle.path + ": the engines were compiled by " + name(built->flavor) + built->version +
                                                   "; this program runs " + name(flavor) + version +
                                                   ". Install that version, rebuild the bundle with this one, or run the portable "
                                                   "graphs with --backend onnxruntime.");
}

std::string built_with() {
#if SANA_TENSORRT
    const std::string headers = std::string("with the headers of ") + trt::kName + " " + std::to_string(NV_TENSORRT_MAJOR) + "." +
                                std::to_string(NV_TENSORRT_MINOR);
    return headers + (SANA_TENSORRT_RTX_API ? "; kernels that it compiles are kept for the next start"
                                            : "; without a cache of compiled kernels, which those headers do not have");
#else
    return "without TensorRT";
#endif
}

EngineParts::Chosen choose_backend(const Bundle& bundle, const EngineOptions& options, const EngineParts::Files& files) {
    static const std::vector<std::string> words = {"auto", "tensorrt", "onnxruntime"};
    const std::string& wanted = options.backend;
    if (std::find(words.begin(), words.end(), wanted) == words.end()) {
        throw Failure(ErrorKind::kRequest, "backend: got " + repr(wanted) + "; " + nearest(wanted, words) + ".");
    }
    if (wanted == "onnxruntime") return on_cpu(bundle, options, "it was asked for");
    if (wanted == "tensorrt") return {"tensorrt", "it was asked for", on_gpu(bundle, options, files)};
    if (bundle.manifest.targets.empty()) return on_cpu(bundle, options, "the bundle has portable graphs only");
    try {
        return {"tensorrt", "the bundle has engines for this GPU", on_gpu(bundle, options, files)};
    } catch (const Failure& failure) {
        const ErrorKind kind = failure.error().kind;
        if (kind == ErrorKind::kNoGpu) return on_cpu(bundle, options, "TensorRT has nothing to run on: " + failure.error().message);
        if (kind != ErrorKind::kArchitecture && kind != ErrorKind::kTensorRTVersion) throw;
        return on_cpu(bundle, options, "TensorRT cannot run this bundle here: " + failure.error().message);
    }
}

}  // namespace sana
