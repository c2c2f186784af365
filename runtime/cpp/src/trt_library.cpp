#include "trt_library.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "failure.hpp"
#include "gpu.hpp"
#include "paths.hpp"
#include "python_text.hpp"

#ifndef SANA_TENSORRT_LIBRARY
#define SANA_TENSORRT_LIBRARY ""
#endif

namespace sana::trt {
namespace {

#define SANA_TEXT_OF(number) SANA_TEXT(number)
#define SANA_TEXT(number) #number
#ifdef TRT_MAJOR_RTX
constexpr const char *kCore = "libtensorrt_rtx.so." SANA_TEXT_OF(TRT_MAJOR_RTX), *kWheel = "tensorrt-rtx-cu13";
#else
constexpr const char *kCore = "libnvinfer.so." SANA_TEXT_OF(TRT_MAJOR_ENTERPRISE), *kWheel = "tensorrt";
#endif

constexpr std::size_t kErrorsKept = 50;

// Engines load in several threads at once: each is told of its own errors, and of those of TensorRT's own threads.
class Logger final : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override {
        try {
            if (shown_ && severity != Severity::kVERBOSE) std::fprintf(stderr, "TensorRT: %s\n", message);
            if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
            const std::lock_guard held(lock_);
            errors_.emplace_back(asked ? std::this_thread::get_id() : std::thread::id(), message);
            if (errors_.size() > kErrorsKept) errors_.pop_front();
        } catch (const std::exception&) {  // no memory: a message less
        }
    }

    void clear() {
        asked = true;
        const std::lock_guard held(lock_);
        std::erase_if(errors_, [](const auto& each) { return mine(each.first); });
    }

    std::vector<std::string> found() {
        const std::lock_guard held(lock_);
        std::vector<std::string> out;
        for (const auto& [thread, message] : errors_) {
            if (mine(thread)) out.push_back(message);
        }
        return out;
    }

  private:
    static bool mine(std::thread::id thread) { return thread == std::thread::id() || thread == std::this_thread::get_id(); }

    static inline thread_local bool asked = false;  // this thread is one of ours
    const bool shown_ = std::getenv("SANA_TENSORRT_LOG") != nullptr;
    std::mutex lock_;
    std::deque<std::pair<std::thread::id, std::string>> errors_;
};

Logger& logger() {
    static auto* const made = new Logger;  // never destroyed: TensorRT keeps the first that it was given
    return *made;
}

std::string environment(const char* name) {
    const char* value = std::getenv(name);
    return value != nullptr ? value : "";
}

std::vector<std::string> library_candidates(const std::string& path) {
    if (!path.empty()) return {path};  // one that was named is used, or its error is raised
    if (const std::string named = environment("SANA_TENSORRT"); !named.empty()) return {named};
    std::vector<std::string> out = {kCore};
    if (const std::string built = SANA_TENSORRT_LIBRARY; !built.empty()) out.insert(out.begin(), built);
    return out;
}

template <class Function>
void find_in(void* handle, const std::string& path, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr) {
        throw Failure(ErrorKind::kTensorRTVersion,
                      path + ": the library has no " + name + "; expected " + kCore + ". Set SANA_TENSORRT to its path.");
    }
}

// The first candidate that opens, and its path; else nullptr, and what the linker said of each.
void* open_first(const std::string& wanted, std::string& path, std::string& tried) {
    for (const std::string& each : library_candidates(wanted)) {
        path = each;
        if (void* handle = dlopen(each.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
        tried += (tried.empty() ? "" : "; ") + std::string(dlerror());
    }
    return nullptr;
}

Library opened_tensorrt(const std::string& wanted) {
    Library out;
    std::string tried;
    void* handle = open_first(wanted, out.path, tried);
    if (handle == nullptr) {
        throw Failure(ErrorKind::kTensorRTVersion,
                      "got no TensorRT (" + tried + "); expected " + kCore + ", which the Python package " + kWheel +
                          " has. Set SANA_TENSORRT to its path, or use the onnxruntime back end.");
    }
    std::int32_t (*part[4])() = {};
    static constexpr const char* kParts[] = {"getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion",
                                             "getInferLibBuildVersion"};
    std::vector<std::string> numbers;
    for (std::size_t i = 0; i < std::size(kParts); ++i) {
        find_in(handle, out.path, kParts[i], part[i]);
        numbers.push_back(std::to_string(part[i]()));
    }
    out.version = join(numbers, ".");
    // A class of another version may have other functions in the same places. Within a major version functions are only appended.
    if (part[0]() != NV_TENSORRT_MAJOR || part[1]() < NV_TENSORRT_MINOR) {
        throw Failure(ErrorKind::kTensorRTVersion,
                      out.path + ": got " + kName + " " + out.version + "; this libsana_runtime was built with the headers of " +
                          std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) +
                          ", and expected that or a newer " + std::to_string(NV_TENSORRT_MAJOR) +
                          ".x. Set SANA_TENSORRT to one, or build libsana_runtime again.");
    }
    find_in(handle, out.path, "createInferRuntime_INTERNAL", out.create_runtime);
    find_in(handle, out.path, "getPluginRegistry", out.plugin_registry);
    return out;
}

// The folder of this library, or of the program that it is linked into.
std::string own_folder() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) return ".";
    const std::string path = info.dli_fname;
    const std::size_t slash = path.rfind('/');
    return slash == path.npos ? "." : path.substr(0, slash);
}

class Mapped {
  public:
    explicit Mapped(const std::string& path) {
        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat info{};
        if (file < 0 || fstat(file, &info) != 0) {
            if (file >= 0) close(file);
            throw Failure(ErrorKind::kMissingFile, path + ": cannot be opened. Was the bundle replaced? Open it again.");
        }
        size = static_cast<std::size_t>(info.st_size);
        data = size != 0 ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;
        close(file);
        if (size == 0)
            throw Failure(ErrorKind::kBuild, path + ": got an empty file; expected an engine. Build it again");
        if (data == MAP_FAILED) throw Failure(ErrorKind::kSana, path + ": cannot be mapped into memory.");
    }
    ~Mapped() { munmap(data, size); }
    Mapped(const Mapped&) = delete;

    void* data;
    std::size_t size;
};

// The TensorRT version in an engine's header, for messages: NVIDIA does not document where it stands. Empty if not found.
std::string built_by(const Mapped& engine) {
    const auto* bytes = static_cast<const unsigned char*>(engine.data);
    if (engine.size < 28 || std::memcmp(bytes, "vtrt", 4) != 0) return "";
    std::vector<std::string> numbers;
    for (std::size_t i = 24; i < 28; ++i) numbers.push_back(std::to_string(bytes[i]));
    return join(numbers, ".");
}

#if SANA_TENSORRT_RTX_API
using Diagnostics = nvinfer1::EngineInvalidityDiagnostics;

bool says(std::uint64_t flags, Diagnostics flag) { return (flags & static_cast<std::uint64_t>(flag)) != 0; }

std::string reasons_of(std::uint64_t flags) {
    static constexpr std::pair<Diagnostics, const char*> kNames[] = {
        {Diagnostics::kVERSION_MISMATCH, "VERSION_MISMATCH"}, {Diagnostics::kUNSUPPORTED_CC, "UNSUPPORTED_CC"},
        {Diagnostics::kOLD_CUDA_DRIVER, "OLD_CUDA_DRIVER"},   {Diagnostics::kOLD_CUDA_RUNTIME, "OLD_CUDA_RUNTIME"},
        {Diagnostics::kINSUFFICIENT_GPU_MEMORY, "INSUFFICIENT_GPU_MEMORY"},
        {Diagnostics::kMALFORMED_ENGINE, "MALFORMED_ENGINE"}, {Diagnostics::kCUDA_ERROR, "CUDA_ERROR"}};
    std::vector<std::string> out;
    for (const auto& [flag, name] : kNames) {
        if (says(flags, flag)) out.emplace_back(name);
    }
    return out.empty() ? "none given" : join(out);
}
#endif

bool contains_plugin(std::string text) {
    for (char& each : text) each = static_cast<char>(std::tolower(static_cast<unsigned char>(each)));
    return text.find("plugin") != text.npos;
}

}  // namespace

const Library& library(const std::string& path) {
    static std::mutex lock;
    static Library* opened = nullptr;
    const std::lock_guard held(lock);
    if (opened == nullptr) {
        opened = new Library(opened_tensorrt(path));
    } else if (!path.empty() && path != opened->path) {
        throw Failure(ErrorKind::kSana,
                      "TensorRT: this process has loaded " + repr(opened->path) + " already; got " + repr(path) + ". Use one.");
    }
    return *opened;
}

void map_library(const std::string& path) {
    std::string found, tried;
    open_first(path, found, tried);  // never closed: the library stays
}

std::string load_plugins(const Library& library, const std::string& wanted) {
    static std::mutex lock;
    static std::string loaded;  // from where
    const std::lock_guard held(lock);
    if (!loaded.empty()) {
        if (wanted.empty() || wanted == loaded) return loaded;
        throw Failure(ErrorKind::kSana, "plugins: this process has loaded " + repr(loaded) + " already; got " + repr(wanted) + ". Use one.");
    }
    const std::string named = wanted.empty() ? environment("SANA_PLUGINS") : wanted;
    const std::string path = named.empty() ? joined(own_folder(), "libsana_plugins.so") : named;
    struct stat info{};
    const bool there = stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
    clear_errors();
    nvinfer1::IPluginRegistry* registry = there ? library.plugin_registry() : nullptr;
    if (registry != nullptr && registry->loadLibrary(path.c_str()) != nullptr) {
        loaded = path;
        return loaded;
    }
    std::string reason = there ? why() : " There is no such file.";
    if (there) {  // TensorRT does not say what the linker said
        if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) dlclose(handle);
        else reason += std::string(" The linker says: ") + dlerror();
    }
    throw Failure(ErrorKind::kSana, path + ": TensorRT cannot load the plugins; expected the library that plugins/cpp builds. Build "
                                           "it again, or set SANA_PLUGINS to its path." + reason);
}

void open_libraries_of(const std::vector<std::string>& ops, const std::string& plugins) {
    void* handle = dlopen(plugins.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (handle == nullptr) return;
    if (const auto open = reinterpret_cast<void (*)(const char*)>(dlsym(handle, "sana_plugins_open_library_of"))) {
        for (const std::string& op : ops) open(op.c_str());
    }
    dlclose(handle);  // TensorRT has one of its own
}

LoadedEngine load_engine(const Library& library, const std::string& path) {
    const Mapped file(path);
    clear_errors();
    std::unique_ptr<nvinfer1::IRuntime> runtime(
        static_cast<nvinfer1::IRuntime*>(library.create_runtime(&logger(), NV_TENSORRT_VERSION)));
    if (runtime == nullptr) throw Failure(ErrorKind::kTensorRTVersion, "TensorRT " + library.version + ": made no runtime." + why());
#if SANA_TENSORRT_RTX_API
    std::uint64_t flags = 0;
    (void)runtime->getEngineValidity(file.data, static_cast<std::int64_t>(file.size), &flags);
    if (says(flags, Diagnostics::kMALFORMED_ENGINE)) {
        throw Failure(ErrorKind::kBuild, path + ": got bytes that are no engine of TensorRT " + library.version +
                                             ", or are damaged. Build it again");
    }
#endif
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(file.data, file.size));
    if (engine != nullptr) return {std::move(runtime), std::move(engine)};
    // TensorRT's diagnosis explains a refusal; it isn't asked for permission, since it also frowns at engines that run.
    const DeviceInfo device = device_info();
    const std::string builder = built_by(file);
    bool other_version = !builder.empty() && builder != library.version, other_gpu = false;
    std::string reasons = "none given";
#if SANA_TENSORRT_RTX_API
    other_version = other_version || says(flags, Diagnostics::kVERSION_MISMATCH);
    other_gpu = says(flags, Diagnostics::kUNSUPPORTED_CC);
    reasons = reasons_of(flags);
#endif
    if (other_version) {
        throw Failure(ErrorKind::kTensorRTVersion,
                      path + ": got an engine of TensorRT " + (builder.empty() ? "of another version" : builder) + "; expected " +
                          kFlavor + " " + library.version +
                          ", which is installed. Build it again with this version, or install the one that built it.");
    }
    if (other_gpu) {
        throw Failure(ErrorKind::kArchitecture, path + ": got " + device.name + " (" + device.sm() +
                                                    "), for which this engine has no code. Build it for " + device.sm() + ".");
    }
    if (contains_plugin(why())) {
        throw Failure(ErrorKind::kPluginMissing,
                      path + ": got an engine with a plugin that is not registered, or that cannot load." + why());
    }
    throw Failure(ErrorKind::kBuild, path + ": got an engine that TensorRT " + library.version + " cannot load on " + device.name +
                                         " (" + reasons + ")." + why());
}

std::string why() {
    const std::vector<std::string> errors = logger().found();
    return errors.empty() ? " TensorRT gave no reason." : " TensorRT says:\n  " + join(errors, "\n  ");
}

void clear_errors() { logger().clear(); }

}  // namespace sana::trt
