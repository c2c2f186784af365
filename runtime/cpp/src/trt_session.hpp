// One component as a TensorRT engine: shapes in, device addresses in, work queued on the stream. As runtime/trt_session.py, which
// says why kernels are compiled eagerly and why the engines of a bundle share one arena.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "cuda.hpp"
#include "kernel_cache.hpp"
#include "loops.hpp"
#include "session.hpp"
#include "token_table.hpp"
#include "trt_library.hpp"

namespace sana {

using Shape = std::vector<std::int64_t>;
using Shapes = std::map<std::string, Shape>;
using Addresses = std::map<std::string, Address>;

// Activation memory for engines that never run at the same time: as large as the largest need, not the sum.
using Arena = DeviceBuffer;

// The compiled kernels of one engine in this process, and the file that they come from and go to.
class Kernels {
  public:
    // Contexts made with `config` take their kernels from the file, as far as it has them, and leave theirs here. Does nothing for
    // headers without such a cache. The cache must outlive it, and it the contexts.
    Kernels(const KernelCache& cache, std::string key, nvinfer1::IRuntimeConfig& config);

    void save();  // write the file, if it lacks something. Not while a CUDA graph is captured

  private:
    [[maybe_unused]] const KernelCache& cache_;
    std::string key_;
#if SANA_TENSORRT_RTX_API
    std::unique_ptr<nvinfer1::IRuntimeCache> kernels_;
#endif
    std::size_t stored_ = 0;  // bytes of what the file has, or was given in vain
};

class TrtSession : public Session {
  public:
    // Loads at once. engine_sha256: of the file. tokens: their table, whose rows the engine takes in place of ids; nullptr: none.
    // CUDA's context must be current. Raises what trt::load_engine raises.
    TrtSession(std::string path, const trt::Library& library, Cuda& cuda, Arena& arena, const KernelCache& cache,
               const std::string& engine_sha256, std::unique_ptr<const TokenTable> tokens = nullptr);

    // Set the input shapes, and have the arena hold what they need. Returns the output shapes. Raises RequestError for a shape
    // outside the engine's range, BundleError if an input is missing; shapes that the engine does not have are left out.
    Shapes prepare(const Shapes& shapes);

    // Queue one run on the stream, for the shapes that were prepared. addresses: device memory of every input and output.
    void launch(const Addresses& addresses);

    std::size_t output_size(const std::string& name, const Shape& shape) const;  // bytes

    // Tensors in, tensors out, and wait. Floats are float32 here, whatever the engine takes and gives.
    Outputs run(const Inputs& inputs) override { return run(inputs, nullptr); }
    // loops: from the second time on with these shapes, one after the other, it is one launch of a CUDA graph, which is kept there.
    // They must be cleared before the session goes or its buffers are freed.
    Outputs run(const Inputs& given, Loops* loops);

    void free_buffers() noexcept;  // what run() holds for inputs and outputs
    void save_kernels();           // what was compiled since the last time

  private:
    void check_range(const std::string& name, const Shape& shape) const;
    DeviceBuffer& slot(const std::string& name);
    Address upload(const std::string& name, const Tensor& tensor);
    Tensor download(const std::string& name, const Shape& shape);

    std::string path_;
    Cuda& cuda_;
    Arena& arena_;
    trt::LoadedEngine loaded_;
    std::vector<std::string> inputs_, outputs_;
    std::map<std::string, nvinfer1::DataType> types_;  // on the device
    std::unique_ptr<nvinfer1::IRuntimeConfig> config_;  // lives as long as what it made
    std::unique_ptr<Kernels> kernels_;                  // nullptr: none are kept
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Shapes shapes_;
    bool settled_ = false;  // whether the context has run with those shapes
    std::size_t needed_ = 0;               // bytes of the arena, for those shapes
    Address arena_address_ = 0;            // of which the context was told
    std::size_t arena_size_ = 0;
    std::map<std::string, std::unique_ptr<DeviceBuffer>> slots_;
    std::set<Shapes> compiled_;  // shapes that have their kernels
    bool unsaved_ = true;        // kernels were compiled since they were last saved
    std::unique_ptr<const TokenTable> tokens_;
};

}  // namespace sana
