// What a node does when it runs: a kernel, or a product. The classes of plugins/work.py by their names.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "cublas_lt.hpp"
#include "launch.hpp"

namespace sana::plugins {

using Addresses = std::vector<std::uint64_t>;  // on the device

class Work {
  public:
    virtual ~Work() = default;
    virtual void prepare(const Dims& dims) = 0;  // fills in what shapes decide. Raises LaunchError
    // Neither allocates on the device, waits nor loads anything.
    virtual void queue(const Addresses& inputs, const Addresses& outputs, std::uint64_t workspace, void* stream) = 0;
};

// A kernel's arguments as cuLaunchKernel takes them: 8 bytes for each, and the array of their addresses.
class Arguments {
  public:
    explicit Arguments(const Launch& launch);

    void set_shapes(const Dims& dims);  // raises LaunchError for a number that 32 bits do not hold
    void set_addresses(const Addresses& inputs, const Addresses& outputs);  // raises LaunchError unless all are aligned
    void** at() { return addresses_.data(); }

  private:
    const Launch& launch_;
    std::vector<std::uint64_t> values_;
    std::vector<void*> addresses_;
};

// For the current CUDA context's device. `launch` must outlive it. Raises LaunchError, DriverError, CublasError.
std::unique_ptr<Work> make_work(const Launch& launch, std::string_view cubins);

}  // namespace sana::plugins
