// Pictures from the portable graphs, one at a time. As runtime/ort_backend.py and runtime/text_cache.py.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend.hpp"
#include "bundle.hpp"

namespace sana {

// The session of a component, when it is first used.
using OpenSession = std::function<std::unique_ptr<Session>(const std::string& component)>;

OpenSession ort_sessions(const Bundle& bundle, int num_threads, std::string library);  // the bundle must outlive it

class OrtBackend : public Backend {
  public:
    // The bundle must outlive it. low_memory: the text encoder goes after each use.
    OrtBackend(const Bundle& bundle, OpenSession open, bool low_memory);

    std::vector<std::string> files() const override;
    Tensor draw(const CheckedRequest& request, const Job& job, const AfterStep& after_step) override;

  private:
    Session& session(const std::string& component);
    const Tensor& embed(const Text& text);             // (1, L, C)
    Tensor embed_all(const std::vector<Text>& texts);  // (k, 1, L, C)

    const Bundle& bundle_;
    OpenSession open_;
    bool low_memory_;
    std::map<std::string, std::unique_ptr<Session>> sessions_;
    std::list<std::pair<std::vector<std::int64_t>, Tensor>> embedded_;  // the latest first
};

}  // namespace sana
