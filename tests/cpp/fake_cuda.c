/* As much of the CUDA driver as the plugins use: writes what it is told to stdout. FAKE_CUDA_ARGS: arguments of the kernel. */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FAKE __attribute__((visibility("default")))

static int asked(const char* call, int otherwise) { /* FAKE_CUDA_BREAKS: a call that fails with FAKE_CUDA_CODE */
    const char* breaks = getenv("FAKE_CUDA_BREAKS");
    return breaks != NULL && strcmp(breaks, call) == 0 ? atoi(getenv("FAKE_CUDA_CODE")) : otherwise;
}

FAKE int cuInit(unsigned flags) { return (void)flags, asked("cuInit", 0); }
FAKE int cuDeviceGetCount(int* count) { return *count = getenv("FAKE_CUDA_SM") != NULL, asked("cuDeviceGetCount", 0); }
FAKE int cuDriverGetVersion(int* version) { return *version = 13000, asked("cuDriverGetVersion", 0); }
FAKE int cuDeviceGet(int* device, int index) { return *device = index, asked("cuDeviceGet", 0); }
FAKE int cuDeviceGetName(char* name, int size, int device) {
    return (void)device, snprintf(name, (size_t)size, "NVIDIA Fake"), asked("cuDeviceGetName", 0);
}

FAKE int cuCtxGetCurrent(void** context) { return *context = getenv("FAKE_CUDA_NO_CONTEXT") ? NULL : (void*)1, 0; }
FAKE int cuCtxGetId(void* context, unsigned long long* id) { return (void)context, *id = 1, 0; }
FAKE int cuCtxGetDevice(int* device) { return *device = 0, 0; }
FAKE int cuDeviceGetAttribute(int* value, int which, int device) {
    const char* sm = getenv("FAKE_CUDA_SM");
    (void)device;
    if (which != 75 && which != 76) return 1;
    return *value = sm[which - 75] - '0', 0;
}
FAKE int cuModuleLoadData(void** module, const void* image) { return printf("load %.6s\n", (const char*)image), *module = (void*)2, 0; }
FAKE int cuModuleGetFunction(void** function, void* module, const char* name) {
    return (void)module, printf("function %s\n", name), *function = (void*)3, 0;
}
FAKE int cuFuncSetAttribute(void* function, int which, int value) {
    return (void)function, printf("attribute %d %d\n", which, value), 0;
}
FAKE int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void* stream, void** arguments, void** extra) {
    printf("launch %u %u %u %u %u %u %u %d %d %d", gx, gy, gz, bx, by, bz, shared, function == (void*)3, stream == (void*)7, extra == NULL);
    for (int i = 0; i < atoi(getenv("FAKE_CUDA_ARGS")); ++i) printf(" %016llx", *(unsigned long long*)arguments[i]);
    return printf("\n"), getenv("FAKE_CUDA_FAILS") != NULL ? 719 : 0;
}
FAKE int cuGetErrorName(int code, const char** name) { return (void)code, *name = "CUDA_ERROR_OF_SOME_KIND", 0; }
FAKE int cuGetErrorString(int code, const char** text) { return (void)code, *text = "some kind", 0; }
/* cuda.bindings finds all the others through this one. */
FAKE int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t flags, int* status) {
    (void)version, (void)flags, (void)status;
    return *found = dlsym(RTLD_DEFAULT, name), *found == NULL ? 500 : 0;
}
