// The digests of a bundle's files, compared in a thread of their own while other things are opened.
#pragma once

#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "bundle.hpp"

namespace sana {

class Verification {
  public:
    explicit Verification(const Bundle& bundle) : bundle_(bundle) {}

    void begin(std::vector<std::string> names);  // by the manifest's names; does not wait, and raises nothing about them

    // Waits for what was begun, or compares other names now. Raises what Bundle::verify raises. Without it, what was begun is
    // given up, and its errors are nobody's.
    void finish(const std::vector<std::string>& names);

  private:
    const Bundle& bundle_;
    std::vector<std::string> names_;
    std::exception_ptr error_;
    std::jthread thread_;  // the last member: it ends before the others
};

}  // namespace sana
