#include "timings.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>

namespace sana::timings {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<bool> asked = false, starting = false;
Clock::time_point began;  // set before `asked` is

}  // namespace

void begin() {
    began = Clock::now();
    starting = true;
    asked = true;
}

void start_is_over() { starting = false; }

void tell(const char* what) {
    if (!asked) return;
    const std::chrono::duration<double> passed = Clock::now() - began;
    std::fprintf(stderr, "sana: %s after %.6f s\n", what, passed.count());
}

void tell_part(const std::string& what) {
    if (starting) tell(what.c_str());
}

void tell_memory(const char* when) {
    if (!asked) return;
    std::ifstream status("/proc/self/status");
    double anonymous = 0, files = 0, peak = 0;
    for (std::string line; std::getline(status, line);) {
        const auto read = [&line](const char* name, double& out) {
            const std::string start = std::string(name) + ":";
            if (line.starts_with(start)) out = std::stod(line.substr(start.size())) * 1024 / 1e6;  // the kernel says KiB
        };
        read("RssAnon", anonymous);
        read("RssFile", files);
        read("VmHWM", peak);
    }
    std::fprintf(stderr, "sana: memory, %s: %.1f MB of its own, %.1f MB of mapped files; the most until now %.1f MB\n", when, anonymous,
                 files, peak);
}

}  // namespace sana::timings
