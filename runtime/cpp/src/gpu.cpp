#include "gpu.hpp"

#include <dlfcn.h>

#include <array>

#include "failure.hpp"

namespace sana {
namespace {

constexpr int kNoDevice = 100;                          // CUDA_ERROR_NO_DEVICE
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
constexpr int kOldestMajor = 8;                         // Ampere, the first with bf16

class CudaDriver {
  public:
    CudaDriver() : library_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL)) {  // never closed: it does not support that
        if (library_ != nullptr) return;
        throw Failure(ErrorKind::kNoGpu, std::string("got no NVIDIA driver library (") + dlerror() +
                                             "); expected libcuda.so.1. Install an NVIDIA driver, or give the container access to "
                                             "the GPU (docker run --gpus all).");
    }

    void* function(const char* name) const {
        void* found = dlsym(library_, name);
        if (found == nullptr) throw failed(name, "no such function");
        return found;
    }

    template <class... Arguments>
    int call(const char* name, Arguments... arguments) const {
        return reinterpret_cast<int (*)(Arguments...)>(function(name))(arguments...);
    }

    template <class... Arguments>
    void ask(const char* name, Arguments... arguments) const {
        const int code = call(name, arguments...);
        if (code == 0) return;
        const char* text = nullptr;
        call("cuGetErrorName", code, &text);
        throw failed(name, text != nullptr ? text : std::to_string(code));
    }

  private:
    static Failure failed(const std::string& name, const std::string& what) {
        return Failure(ErrorKind::kNoGpu, name + ": got " + what +
                                              " from the NVIDIA driver; expected success. nvidia-smi may say more; a driver that "
                                              "was updated under a running system needs a reboot.");
    }

    void* library_;
};

}  // namespace

void* driver_function(const char* name) { return CudaDriver().function(name); }

DeviceInfo device_info() {
    const CudaDriver driver;
    int count = 0;
    const int code = driver.call("cuInit", 0U);
    if (code != kNoDevice) {
        if (code != 0) driver.ask("cuInit", 0U);
        driver.ask("cuDeviceGetCount", &count);
    }
    if (count == 0) {
        throw Failure(ErrorKind::kNoGpu, "got an NVIDIA driver and no GPU; expected at least one. Is CUDA_VISIBLE_DEVICES empty, or "
                                         "the GPU not passed on to the container?");
    }
    DeviceInfo out;
    int device = 0, version = 0;
    driver.ask("cuDeviceGet", &device, 0);
    driver.ask("cuDriverGetVersion", &version);
    out.driver_cuda = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    driver.ask("cuDeviceGetAttribute", &out.major, kCapabilityMajor, device);
    driver.ask("cuDeviceGetAttribute", &out.minor, kCapabilityMinor, device);
    std::array<char, 128> name{};
    driver.ask("cuDeviceGetName", name.data(), static_cast<int>(name.size()) - 1, device);
    out.name = name.data();
    if (out.major < kOldestMajor) {
        throw Failure(ErrorKind::kNoGpu, "got " + out.name + ", compute capability " + std::to_string(out.major) + "." +
                                             std::to_string(out.minor) + "; expected 8.0 or newer (Ampere: A100, RTX 30). This GPU "
                                             "is too old for bf16; use the onnxruntime back end.");
    }
    return out;
}

}  // namespace sana
