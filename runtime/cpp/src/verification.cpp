#include "verification.hpp"

#include <utility>

#include "failure.hpp"
#include "timings.hpp"

namespace sana {

void Verification::begin(std::vector<std::string> names) {
    thread_ = {};  // an earlier one is given up
    names_ = std::move(names);
    error_ = nullptr;
    thread_ = std::jthread([this](const std::stop_token& stop) {
        try {
            bundle_.verify(names_, [&stop](std::uint64_t, std::uint64_t) {
                if (stop.stop_requested()) throw Failure(ErrorKind::kCancelled, "nobody waits for the digests any more.");
            });
            timings::tell_part("files compared");
        } catch (...) {
            error_ = std::current_exception();
        }
    });
}

void Verification::finish(const std::vector<std::string>& names) {
    if (!thread_.joinable() || names != names_) begin(names);
    thread_.join();
    if (error_ != nullptr) std::rethrow_exception(error_);
}

}  // namespace sana
