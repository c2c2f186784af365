#include "cuda.hpp"

#include <cstring>
#include <string>
#include <type_traits>

#include "gpu.hpp"
#include "python_text.hpp"

namespace sana {
namespace {

// By the names that cuda.h's macros stand for. Handles are pointers.
struct CudaFunctions {
    int (*cuInit)(unsigned);
    int (*cuDeviceGet)(int*, int);
    int (*cuDevicePrimaryCtxRetain)(void**, int);
    int (*cuDevicePrimaryCtxRelease_v2)(int);
    int (*cuCtxSetCurrent)(void*);
    int (*cuStreamCreate)(void**, unsigned);
    int (*cuStreamDestroy_v2)(void*);
    int (*cuStreamSynchronize)(void*);
    int (*cuStreamQuery)(void*);
    int (*cuMemAlloc_v2)(Address*, std::size_t);
    int (*cuMemFree_v2)(Address);
    int (*cuMemGetInfo_v2)(std::size_t*, std::size_t*);
    int (*cuMemAllocHost_v2)(void**, std::size_t);
    int (*cuMemFreeHost)(void*);
    int (*cuMemcpyHtoDAsync_v2)(Address, const void*, std::size_t, void*);
    int (*cuMemcpyDtoHAsync_v2)(void*, Address, std::size_t, void*);
    int (*cuMemsetD8Async)(Address, unsigned char, std::size_t, void*);
    int (*cuStreamBeginCapture_v2)(void*, int);
    int (*cuStreamEndCapture)(void*, void**);
    int (*cuGraphInstantiateWithFlags)(void**, void*, unsigned long long);
    int (*cuGraphDestroy)(void*);
    int (*cuGraphLaunch)(void*, void*);
    int (*cuGraphExecDestroy)(void*);
    int (*cuGetErrorString)(int, const char**);
};

constexpr int kOutOfMemory = 2, kNotReady = 600;
constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING
constexpr int kThreadLocal = 1;       // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

CudaFunctions found_functions() {
    CudaFunctions out{};
    const auto find = [](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(driver_function(name));
    };
#define SANA_FIND(name) find(out.name, #name)
    SANA_FIND(cuInit);
    SANA_FIND(cuDeviceGet);
    SANA_FIND(cuDevicePrimaryCtxRetain);
    SANA_FIND(cuDevicePrimaryCtxRelease_v2);
    SANA_FIND(cuCtxSetCurrent);
    SANA_FIND(cuStreamCreate);
    SANA_FIND(cuStreamDestroy_v2);
    SANA_FIND(cuStreamSynchronize);
    SANA_FIND(cuStreamQuery);
    SANA_FIND(cuMemAlloc_v2);
    SANA_FIND(cuMemFree_v2);
    SANA_FIND(cuMemGetInfo_v2);
    SANA_FIND(cuMemAllocHost_v2);
    SANA_FIND(cuMemFreeHost);
    SANA_FIND(cuMemcpyHtoDAsync_v2);
    SANA_FIND(cuMemcpyDtoHAsync_v2);
    SANA_FIND(cuMemsetD8Async);
    SANA_FIND(cuStreamBeginCapture_v2);
    SANA_FIND(cuStreamEndCapture);
    SANA_FIND(cuGraphInstantiateWithFlags);
    SANA_FIND(cuGraphDestroy);
    SANA_FIND(cuGraphLaunch);
    SANA_FIND(cuGraphExecDestroy);
    SANA_FIND(cuGetErrorString);
#undef SANA_FIND
    return out;
}

const CudaFunctions& cuda() {
    static const CudaFunctions found = found_functions();
    return found;
}

void cuda_ok(int status, const char* call) {
    if (status == 0) return;
    const char* text = nullptr;
    cuda().cuGetErrorString(status, &text);
    throw Failure(ErrorKind::kSana, std::string("CUDA, ") + call + ": " + (text != nullptr ? text : std::to_string(status)) +
                                        ". Work that was queued before may be the cause.");
}

#define SANA_CUDA(name, ...) cuda_ok(cuda().name(__VA_ARGS__), #name)

}  // namespace

void Cuda::find_functions() { cuda(); }

Cuda::Cuda() {
    SANA_CUDA(cuInit, 0U);
    SANA_CUDA(cuDeviceGet, &device_, 0);
    SANA_CUDA(cuDevicePrimaryCtxRetain, &context_, device_);
    try {
        make_current();
        SANA_CUDA(cuStreamCreate, &stream_, kNonBlocking);
    } catch (...) {
        cuda().cuDevicePrimaryCtxRelease_v2(device_);
        throw;
    }
}

Cuda::~Cuda() {
    cuda().cuStreamDestroy_v2(stream_);
    cuda().cuDevicePrimaryCtxRelease_v2(device_);
}

void Cuda::make_current() const { SANA_CUDA(cuCtxSetCurrent, context_); }

Address Cuda::allocate(std::size_t size) {
    Address out = 0;
    const int status = cuda().cuMemAlloc_v2(&out, size);
    if (status == kOutOfMemory) {
        std::size_t free = 0, total = 0;
        cuda().cuMemGetInfo_v2(&free, &total);
        throw Failure(ErrorKind::kGpuMemory, "GPU memory: got " + human_bytes(free) + " free of " + human_bytes(total) +
                                                 "; expected " + human_bytes(size) +
                                                 ". Draw smaller pictures, or fewer at a time, or close other programs that use the "
                                                 "GPU.");
    }
    cuda_ok(status, "cuMemAlloc");
    return out;
}

void Cuda::free(Address address) noexcept {
    cuda().cuMemFree_v2(address);
    ++num_freed_;
}

void* Cuda::allocate_pinned(std::size_t size) {
    void* out = nullptr;
    SANA_CUDA(cuMemAllocHost_v2, &out, size);
    return out;
}

void Cuda::free_pinned(void* memory) noexcept { cuda().cuMemFreeHost(memory); }

void Cuda::to_device(Address device, const void* host, std::size_t size) {
    SANA_CUDA(cuMemcpyHtoDAsync_v2, device, host, size, stream_);
}

void Cuda::to_host(void* host, Address device, std::size_t size) { SANA_CUDA(cuMemcpyDtoHAsync_v2, host, device, size, stream_); }

void Cuda::zero(Address device, std::size_t size) { SANA_CUDA(cuMemsetD8Async, device, 0, size, stream_); }

void Cuda::synchronize() { SANA_CUDA(cuStreamSynchronize, stream_); }

bool Cuda::idle() {
    const int status = cuda().cuStreamQuery(stream_);
    if (status == kNotReady) return false;
    cuda_ok(status, "cuStreamQuery");
    return true;
}

void* Cuda::capture(const std::function<void()>& work) {
    void *graph = nullptr, *made = nullptr;
    SANA_CUDA(cuStreamBeginCapture_v2, stream_, kThreadLocal);
    try {
        work();
    } catch (...) {
        cuda().cuStreamEndCapture(stream_, &graph);  // the stream must be a usual one again
        if (graph != nullptr) cuda().cuGraphDestroy(graph);
        throw;
    }
    SANA_CUDA(cuStreamEndCapture, stream_, &graph);
    const int status = cuda().cuGraphInstantiateWithFlags(&made, graph, 0);
    cuda().cuGraphDestroy(graph);
    cuda_ok(status, "cuGraphInstantiate");
    return made;
}

void Cuda::launch_graph(void* graph) { SANA_CUDA(cuGraphLaunch, graph, stream_); }

void Cuda::destroy_graph(void* graph) noexcept { cuda().cuGraphExecDestroy(graph); }

#undef SANA_CUDA

Address DeviceBuffer::reserve(std::size_t size) {
    if (size > size_) {
        if (size_ != 0) cuda_->synchronize();
        close();
        address_ = cuda_->allocate(size);
        size_ = size;
    }
    return address_;
}

Address DeviceBuffer::write(const void* data, std::size_t size) {
    reserve(size);
    if (written_) cuda_->synchronize();  // twice without reading in between: the first copy must have left the twin
    std::memcpy(twin(), data, size);
    cuda_->to_device(address_, host_, size);
    written_ = true;
    return address_;
}

void DeviceBuffer::read(void* data, std::size_t size) {
    cuda_->to_host(twin(), address_, size);
    cuda_->synchronize();
    written_ = false;
    std::memcpy(data, host_, size);
}

void* DeviceBuffer::twin() {
    if (host_ == nullptr) host_ = cuda_->allocate_pinned(size_);
    return host_;
}

void DeviceBuffer::close() noexcept {
    if (size_ != 0) cuda_->free(address_);
    if (host_ != nullptr) cuda_->free_pinned(host_);
    address_ = 0;
    size_ = 0;
    host_ = nullptr;
    written_ = false;
}

}  // namespace sana
