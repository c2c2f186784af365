// The GPU that is there, asked of the CUDA driver: no context made, no memory taken. As engines/gpu.py.
#pragma once

#include <string>

namespace sana {

struct DeviceInfo {
    std::string name;  // "NVIDIA H100 80GB HBM3"
    int major = 0, minor = 0;

    std::string sm() const { return "sm" + std::to_string(major) + std::to_string(minor); }
};

// The first visible GPU. Raises NoGpuError, saying which: no driver, no device, a broken driver, a GPU too old.
DeviceInfo device_info();

}  // namespace sana
