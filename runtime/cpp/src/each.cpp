#include "each.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace sana {

void each(std::size_t count, unsigned threads, const std::function<void(std::size_t)>& work) {
    std::vector<std::exception_ptr> errors(count);
    std::atomic<std::size_t> next = 0;
    std::atomic<bool> stopped = false;
    const auto run = [&] {
        for (std::size_t i = next++; i < count && !stopped; i = next++) {
            try {
                work(i);
            } catch (...) {
                errors[i] = std::current_exception();
                stopped = true;
            }
        }
    };
    {
        std::vector<std::jthread> others;  // joined at the end of the block, also where one cannot be started
        for (std::size_t i = 1; i < std::min<std::size_t>(threads, count); ++i) others.emplace_back(run);
        run();
    }
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

unsigned picture_threads() { return std::min(std::thread::hardware_concurrency(), 16u); }

}  // namespace sana
