// TensorRT for RTX, or TensorRT: opened when it is first needed, given a logger, and asked for engines. As
// engines/tensorrt_library.py and what loads engines in engines/tensorrt.py.
//
// Only headers are needed to build. Which of the two it is, and how much of its interface there is, is decided by them:
// cmake/TensorRT.cmake.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

namespace sana::trt {

#ifdef TRT_MAJOR_RTX
constexpr const char *kFlavor = "rtx", *kName = "TensorRT for RTX";
#else
constexpr const char *kFlavor = "full", *kName = "TensorRT";
#endif

// One for the process, never closed.
struct Library {
    std::string version;  // "1.6.1.120", of what was opened
    std::string path;     // by which name it was found
    void* (*create_runtime)(void* logger, std::int32_t version) = nullptr;
    nvinfer1::IPluginRegistry* (*plugin_registry)() = nullptr;
};

// path: of libtensorrt_rtx.so or libnvinfer.so; "" for $SANA_TENSORRT, then what the build found, then where the system finds it.
// Raises TensorRTVersionError if there is none, or one of another interface than the headers'.
const Library& library(const std::string& path);

// Have the linker open what library() will open, and say nothing if it cannot.
void map_library(const std::string& path);

// Have TensorRT load the plugins, once for the process. path: of libsana_plugins.so; "" for $SANA_PLUGINS, then beside this
// library. Returns from where they were loaded. Raises SanaError if TensorRT does not take them.
std::string load_plugins(const Library& library, const std::string& path);

// Have the plugins that were loaded from there open the libraries that these ops run with: cuBLASLt. Says nothing if that fails.
void open_libraries_of(const std::vector<std::string>& ops, const std::string& plugins);

struct LoadedEngine {
    std::unique_ptr<nvinfer1::IRuntime> runtime;  // outlives its engine
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

// An engine's file, which is mapped while it loads. CUDA's context must be current, the plugins loaded. Raises BuildError if it is no engine,
// TensorRTVersionError, ArchitectureError or PluginMissingError if it was built for something else.
LoadedEngine load_engine(const Library& library, const std::string& path);

// The errors that were logged for this thread, and by TensorRT's own, since clear_errors(), as the end of a message.
std::string why();
void clear_errors();

}  // namespace sana::trt
