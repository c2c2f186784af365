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

constexpr std::int64_t kMaxBatch = 1;  // pictures drawn in one go: which never decides about their pixels then

struct Job {                  // one picture, ready to be drawn
    std::vector<Text> texts;  // k: the negative prompt first
    std::size_t index;        // in the request
};

// With the number of the step, from 1, and the latents (1, C, h, w). What it throws ends the work.
using AfterStep = std::function<void(int step, std::span<const float> latents)>;

// Not for several threads at once: the engine queues requests.
class Backend {
  public:
    explicit Backend(std::string device_in_words) : device(std::move(device_in_words)) {}
    virtual ~Backend() = default;

    virtual std::vector<std::string> files() const = 0;  // what it opens of the bundle, by the manifest's names
    // (1, 3, H, W), nominally -1 to 1.
    virtual Tensor draw(const CheckedRequest& request, const Job& job, const AfterStep& after_step) = 0;

    const std::string device;
};

}  // namespace sana
