#include "driver.hpp"

#include <dlfcn.h>

namespace sana::plugins {
namespace {

template <class Function>
void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) throw DriverError(std::string("got an NVIDIA driver without ") + name + "; expected one of CUDA 12 or newer");
}

Driver opened() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr)
        throw DriverError(std::string("got no NVIDIA driver library (") + dlerror() + "); expected libcuda.so.1");
    Driver out{};
    find(library, "cuCtxGetCurrent", out.cuCtxGetCurrent);
    find(library, "cuCtxGetDevice", out.cuCtxGetDevice);
    find(library, "cuCtxGetId", out.cuCtxGetId);
    find(library, "cuDeviceGetAttribute", out.cuDeviceGetAttribute);
    find(library, "cuModuleLoadData", out.cuModuleLoadData);
    find(library, "cuModuleGetFunction", out.cuModuleGetFunction);
    find(library, "cuFuncSetAttribute", out.cuFuncSetAttribute);
    find(library, "cuLaunchKernel", out.cuLaunchKernel);
    find(library, "cuGetErrorName", out.cuGetErrorName);
    find(library, "cuGetErrorString", out.cuGetErrorString);
    return out;
}

}  // namespace

const Driver& driver() {
    static const Driver found = opened();
    return found;
}

void driver_ok(int code, const std::string& call) {
    if (code == 0) return;
    const char *name = nullptr, *text = nullptr;
    driver().cuGetErrorName(code, &name);
    driver().cuGetErrorString(code, &text);
    throw DriverError(call + ": got " + (name ? name : "?") + ": " + (text ? text : "?"));
}

unsigned long long current_context_id(const std::string& op) {
    void* context = nullptr;
    driver_ok(driver().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
    if (context == nullptr)
        throw DriverError(op + ": no CUDA context is current in this thread; expected TensorRT to have made one");
    unsigned long long id = 0;
    driver_ok(driver().cuCtxGetId(context, &id), "cuCtxGetId");
    return id;
}

}  // namespace sana::plugins
