// What draws the pictures of a bundle on one kind of device. As Backend of runtime/session.py.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "prompt.hpp"
#include "request.hpp"
#include "session.hpp"

namespace sana {

struct Job {                               // pictures that are drawn in one go
    std::vector<std::vector<Text>> texts;  // k rows of B: the negative prompts first
    std::size_t first;                     // of them in the request

    std::size_t size() const { return texts[0].size(); }
};

struct Watch {
    bool latents;  // somebody looks at them after each step
    // After each step with its number, from 1, and the latents (B, C, h, w), which are empty if nobody looks at them. What it throws
    // ends the work.
    std::function<void(int step, std::span<const float> latents)> after_step;
};

// Not for several threads at once: the engine queues requests.
class Backend {
  public:
    // max_batch: pictures in one job.
    Backend(std::string device_in_words, std::size_t pictures) : device(std::move(device_in_words)), max_batch(pictures) {}
    virtual ~Backend() = default;

    virtual std::vector<std::string> files() const = 0;  // what it opens of the bundle, by the manifest's names
    // (B, H, W, 3), RGB.
    virtual std::vector<std::uint8_t> draw(const CheckedRequest& request, const Job& job, const Watch& watch) = 0;

    virtual std::vector<std::string> take_warnings() { return {}; }  // since the last time: what drawing went without

    const std::string device;
    const std::size_t max_batch;
};

Tensor taken(Outputs& outputs, const std::string& name);  // raises BundleError if it is not there

std::vector<float> prompt_mask(const Job& job);  // (k, B, L)

// Standard normal, (B, count): of each picture of the job. stream: as normal().
std::vector<float> noise_of(const CheckedRequest& request, const Job& job, std::size_t count, std::uint32_t stream);

}  // namespace sana
