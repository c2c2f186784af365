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
    int (*cuGetErrorName)(int code, const char** name);
    int (*cuGetErrorString)(int code, const char** text);
};

const Driver& driver();                                // raises DriverError if there is none
void driver_ok(int code, const std::string& call);     // raises DriverError with the call and CUDA's own words unless code is 0
unsigned long long current_context_id(const std::string& op);  // raises DriverError if no context is current

}  // namespace sana::plugins
