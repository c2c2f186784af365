// Pictures from TensorRT engines. Between the text's projection and the pixels nothing leaves the GPU and nobody waits for it. As
// runtime/trt_backend.py.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.hpp"
#include "bundle.hpp"
#include "cuda.hpp"
#include "engine_parts.hpp"
#include "gpu.hpp"
#include "loops.hpp"
#include "text_cache.hpp"
#include "trt_session.hpp"

namespace sana {

struct EngineOptions;

// The backend for the GPU that is here; the bundle must outlive it. Nothing of TensorRT is opened where there is no NVIDIA driver,
// and no engine before the first picture. files: told of the engines before CUDA's context is made. Raises NoGpuError,
// ArchitectureError if the bundle has no engine for this GPU, TensorRTVersionError; of several errors the first in this order.
std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle, const EngineOptions& options, const EngineParts::Files& files);

// Engines load for the first picture, all at the same time, and stay; its text is encoded as soon as the text encoder is there. With
// low_memory the text encoder is never there at the same time as the others: a new text takes their place, and they come back.
class TrtBackend : public Backend {
  public:
    struct Options {
        bool cuda_graphs = true;  // launch a picture's work as one graph from its second time on
        bool low_memory = false;
    };
    // The bundle must outlive it. kernel_folder: "" keeps no kernels.
    TrtBackend(const Bundle& bundle, const DeviceInfo& device, const trt::Library& library, std::string kernel_folder, Options options);
    ~TrtBackend() override;

    std::vector<std::string> files() const override { return files_; }
    std::vector<std::uint8_t> draw(const CheckedRequest& request, const Job& job, const Watch& watch) override;
    std::vector<std::string> take_warnings() override;

  private:
    std::vector<std::uint8_t> draw_now(const CheckedRequest& request, const Job& job, const Watch& watch);
    TrtSession& session(const std::string& component);
    struct Loading;
    std::vector<std::unique_ptr<Loading>> begin_to_load(const std::vector<std::string>& components);
    void finish_to_load(std::vector<std::unique_ptr<Loading>> loading);
    void load(const std::vector<std::string>& components);
    Tensor embedded(const Job& job);
    DeviceBuffer& slot(const std::string& name);
    std::vector<Address> upload_noise(const CheckedRequest& request, const Job& job, std::size_t count);
    void follow(std::size_t num_steps, const Watch& watch);
    void free_buffers() noexcept;

    const Bundle& bundle_;
    const trt::Library& library_;
    std::mutex warning_;  // engines load in several threads
    std::vector<std::string> warnings_;
    KernelCache kernels_;
    Options options_;
    std::int64_t channels_;
    std::vector<std::string> files_;
    std::map<std::string, std::string> paths_, digests_;  // of each component's engine
    Cuda cuda_;  // before all that has memory of it
    Arena arena_;
    std::map<std::string, std::unique_ptr<TrtSession>> sessions_;
    std::map<std::string, std::unique_ptr<DeviceBuffer>> slots_;
    Loops loops_, text_loops_;
    float* steps_done_ = nullptr;  // page-locked: a graph counts in it
    TextCache texts_;
};

}  // namespace sana
