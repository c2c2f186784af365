// The GPU that is there, asked of the CUDA driver: no context made, no memory taken. As engines/gpu.py.
#pragma once

#include <string>

namespace sana {

struct DeviceInfo {
    std::string name;  // "NVIDIA H100 80GB HBM3"
    int major = 0, minor = 0;
    std::string driver_cuda;  // the newest CUDA that the driver knows, "13.0"

    std::string sm() const { return "sm" + std::to_string(major) + std::to_string(minor); }
};

// The first visible GPU. Raises NoGpuError, saying which: no driver, no device, a broken driver, a GPU too old.
DeviceInfo device_info();

// A function of the driver, by its name in the library. Raises NoGpuError if there is no driver, or none with it.
void* driver_function(const char* name);

}  // namespace sana
