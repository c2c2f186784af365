// Pictures from the portable graphs, one at a time. As runtime/ort_backend.py and runtime/text_cache.py.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "prompt.hpp"
#include "request.hpp"
#include "session.hpp"

namespace sana {

struct Job {                  // one picture, ready to be drawn
    std::vector<Text> texts;  // k: the negative prompt first
    std::size_t index;        // in the request
};

class OrtBackend {
  public:
    OrtBackend(const Bundle& bundle, int num_threads, bool low_memory, std::string library);

    std::vector<std::string> files() const;  // what it opens of the bundle, by the manifest's names
    // (1, 3, H, W), nominally -1 to 1. after_step: with the number of the step, from 1, and the latents (1, C, h, w).
    Tensor draw(const CheckedRequest& request, const Job& job, const std::function<void(int, std::span<const float>)>& after_step);

    std::string device;

  private:
    Session& session(const std::string& component);
    const Tensor& embed(const Text& text);             // (1, L, C)
    Tensor embed_all(const std::vector<Text>& texts);  // (k, 1, L, C)

    const Bundle& bundle_;
    int num_threads_;
    bool low_memory_;
    std::string library_;
    std::map<std::string, std::unique_ptr<Session>> sessions_;
    std::list<std::pair<std::vector<std::int64_t>, Tensor>> embedded_;  // the latest first
};

}  // namespace sana
