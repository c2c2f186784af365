#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <vector>

#include "failure.hpp"
#include "ort_api.hpp"
#include "ort_memory.hpp"
#include "python_text.hpp"

#ifndef SANA_ONNXRUNTIME_LIBRARY
#define SANA_ONNXRUNTIME_LIBRARY ""
#endif

namespace sana::ort {
namespace {

struct ApiBase {
    const void* const* (*get_api)(std::uint32_t version);
    const char* (*version)();
};

std::vector<std::string> candidates(const std::string& path) {
    if (!path.empty()) return {path};  // one that was named is used, or its error is raised
    if (const char* named = std::getenv("SANA_ONNXRUNTIME"); named != nullptr && *named) return {named};
    std::vector<std::string> out = {"libonnxruntime.so.1", "libonnxruntime.so"};
    if (const std::string built = SANA_ONNXRUNTIME_LIBRARY; !built.empty()) out.insert(out.begin(), built);
    return out;
}

Library opened_library(const std::string& path) {
    std::string why;
    void* handle = nullptr;
    for (const std::string& each : candidates(path)) {
        handle = dlopen(each.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle != nullptr) break;
        why = dlerror();
    }
    if (handle == nullptr) {
        throw Failure(ErrorKind::kSana,
                      "ONNX Runtime: cannot be loaded (" + why +
                          "); expected libonnxruntime.so, which the Python package onnxruntime has in onnxruntime/capi. Set "
                          "SANA_ONNXRUNTIME to its path.");
    }
    const auto entry = reinterpret_cast<const ApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
    if (entry == nullptr)
        throw Failure(ErrorKind::kSana, "ONNX Runtime: the library has no OrtGetApiBase. Set SANA_ONNXRUNTIME to another.");
    Library library;
    library.version = entry()->version();
    library.table = entry()->get_api(kApiVersion);
    if (library.table == nullptr) {
        throw Failure(ErrorKind::kSana, "ONNX Runtime: got version " + library.version + "; expected 1." +
                                            std::to_string(kApiVersion) +
                                            " or newer. Install a newer one, or set SANA_ONNXRUNTIME to its path.");
    }
    if (Status* status = CreateEnv::call(library.table, kLogErrors, "sana", &library.env)) {
        const std::string message = GetErrorMessage::call(library.table, status);
        ReleaseStatus::call(library.table, status);
        throw Failure(ErrorKind::kSana, "ONNX Runtime failed (" + message + ").");
    }
    use_system_memory(library.table, library.env);
    return library;
}

}  // namespace

const Library& library(const std::string& path) {
    static std::mutex lock;
    static Library* opened = nullptr;  // never closed: its threads may outlive what is destroyed at exit
    static std::string opened_path;
    const std::lock_guard held(lock);
    if (opened == nullptr) {
        opened = new Library(opened_library(path));
        opened_path = path;
    } else if (!path.empty() && path != opened_path) {
        throw Failure(ErrorKind::kSana,
                      "ONNX Runtime: this process has loaded " + repr(opened_path) + " already; got " + repr(path) + ". Use one.");
    }
    return *opened;
}

}  // namespace sana::ort
