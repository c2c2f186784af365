// The CUDA driver, as far as a runtime needs it: one context, one stream, memory, copies and graphs. As runtime/cuda.py.
//
// All work goes to one stream, in order. Addresses are plain integers. The driver is opened when it is first needed, so neither
// CUDA's headers nor its libraries are needed to build.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "failure.hpp"

namespace sana {

using Address = std::uint64_t;

constexpr std::size_t kDeviceAlignment = 256;  // bytes; what TensorRT asks of the addresses it is given

// The primary context of the first visible GPU.
class Cuda {
  public:
    // After device_info(), which says what is wrong where there is no GPU. Raises SanaError for the rest, as all that follow.
    Cuda();
    ~Cuda();
    static void find_functions();  // all of the driver's that are used. Raises NoGpuError; no later call needs the linker
    Cuda(const Cuda&) = delete;

    void make_current() const;  // CUDA's current context belongs to the thread: each thread calls this before it works

    Address allocate(std::size_t size);  // aligned. Raises GpuMemoryError, saying how much there was, if it is not to be had
    void free(Address address) noexcept;
    std::size_t num_freed() const { return num_freed_; }  // allocations
    void* allocate_pinned(std::size_t size);
    void free_pinned(void* memory) noexcept;

    // Queue a copy. The host memory must stay as it is until the stream has done it.
    void to_device(Address device, const void* host, std::size_t size);
    void to_host(void* host, Address device, std::size_t size);
    void zero(Address device, std::size_t size);

    void synchronize();  // wait until the stream is empty
    bool idle();         // whether it is; does not wait

    // What `work` queues on the stream, as a graph that can be launched again and again; it does not run now.
    void* capture(const std::function<void()>& work);
    void launch_graph(void* graph);
    void destroy_graph(void* graph) noexcept;

    void* stream() const { return stream_; }

  private:
    int device_ = 0;
    void *context_ = nullptr, *stream_ = nullptr;
    std::atomic<std::size_t> num_freed_ = 0;
};

// Device memory of one tensor, and its page-locked twin. It grows and never shrinks.
class DeviceBuffer {
  public:
    explicit DeviceBuffer(Cuda& cuda) : cuda_(&cuda) {}
    ~DeviceBuffer() { close(); }
    DeviceBuffer(const DeviceBuffer&) = delete;

    Address address() const { return address_; }
    std::size_t size() const { return size_; }  // bytes

    Address reserve(std::size_t size);                      // at least as much; what it held may be lost
    Address write(const void* data, std::size_t size);      // queue a copy to the device
    void read(void* data, std::size_t size);                // wait for the stream, and copy from the device
    void settled() { written_ = false; }                    // the stream is known to be empty: the twin is free to be written
    void close() noexcept;                                  // after the stream is done with it

    template <class T>
    Address write(const std::vector<T>& values) {
        return write(values.data(), values.size() * sizeof(T));
    }
    template <class T>
    std::vector<T> read(std::size_t count) {
        std::vector<T> out(count);
        read(out.data(), count * sizeof(T));
        return out;
    }

  private:
    void* twin();

    Cuda* cuda_;
    Address address_ = 0;
    std::size_t size_ = 0;
    void* host_ = nullptr;
    bool written_ = false;  // a copy from the twin may still be under way
};

}  // namespace sana
