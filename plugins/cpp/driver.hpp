// The CUDA driver, opened when it is first needed: no CUDA headers, and no GPU where engines are built.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace sana::plugins {

// A CUDA driver call failed.
struct DriverError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// CUlaunchAttribute and CUlaunchConfig of cuda.h, CUDA 12; 13 has the same.
struct LaunchAttribute {
    int id;
    char pad[4];
    union {  // CUlaunchAttributeValue: of its members, the one that is used
        char bytes[64];
        int programmatic_stream_serialization_allowed;
    } value;
};
struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void* stream;
    LaunchAttribute* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, value) == 8);
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32 && offsetof(LaunchConfig, attributes) == 40 &&
              offsetof(LaunchConfig, num_attributes) == 48);
constexpr int kProgrammaticStreamSerialization = 6;  // CU_LAUNCH_ATTRIBUTE_…

// The functions that are used, by the ABI names of cuda.h. Handles are pointers.
struct Driver {
    int (*cuCtxGetCurrent)(void** context);
    int (*cuCtxGetDevice)(int* device);
    int (*cuCtxGetId)(void* context, unsigned long long* id);
    int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
    int (*cuModuleLoadData)(void** module, const void* image);
    int (*cuModuleGetFunction)(void** function, void* module, const char* name);
    int (*cuFuncSetAttribute)(void* function, int attribute, int value);
    int (*cuLaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                          unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra);
    int (*cuLaunchKernelEx)(const LaunchConfig* config, void* function, void** arguments, void** extra);
    int (*cuGetErrorName)(int code, const char** name);
    int (*cuGetErrorString)(int code, const char** text);
};

const Driver& driver();                                // raises DriverError if there is none
void driver_ok(int code, const std::string& call);     // raises DriverError with the call and CUDA's own words unless code is 0
unsigned long long current_context_id(const std::string& op);  // raises DriverError if no context is current

}  // namespace sana::plugins
