// Pictures from the portable graphs, one at a time. As runtime/ort_backend.py.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend.hpp"
#include "bundle.hpp"
#include "text_cache.hpp"

namespace sana {

// The session of a component, when it is first used.
using OpenSession = std::function<std::unique_ptr<Session>(const std::string& component)>;

OpenSession ort_sessions(const Bundle& bundle, int num_threads, std::string library);  // the bundle must outlive it

class OrtBackend : public Backend {
  public:
    // The bundle must outlive it. low_memory: the text encoder goes after each use.
    OrtBackend(const Bundle& bundle, OpenSession open, bool low_memory);

    std::vector<std::string> files() const override;
    std::vector<std::uint8_t> draw(const CheckedRequest& request, const Job& job, const Watch& watch) override;

  private:
    Session& session(const std::string& component);

    const Bundle& bundle_;
    OpenSession open_;
    bool low_memory_;
    std::map<std::string, std::unique_ptr<Session>> sessions_;
    TextCache texts_;
};

}  // namespace sana
