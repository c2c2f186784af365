// Kernels that TensorRT for RTX compiled, kept in files: the same files as runtime/kernel_cache.py's, which says why.
//
// What one process compiles, in Python or in C++, the next one loads. A file is 32 bytes of SHA-256 and then what TensorRT wrote.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace sana {

constexpr std::size_t kMaxKernelFile = 1 << 30;          // bytes that are read into memory, at most
constexpr std::uint64_t kMaxKernelTotal = 4ULL << 30;    // bytes of all files; those that were used longest ago go first

std::string usual_kernel_folder();  // `kernels` in $SANA_CACHE_DIR or ~/.cache/sana; "" where there is no home

// A folder of compiled kernels. Any number of processes may use one; of two that write one file, the last one's stays. Nothing
// raises for what is on the disk: `warn` is told, of a folder that cannot be written once, and kernels are compiled again.
class KernelCache {
  public:
    struct Machine {
        std::string gpu, sm, driver, tensorrt;  // what kernels depend on besides their engine
    };
    using Warn = std::function<void(const std::string&)>;

    // folder: "" keeps none.
    KernelCache(std::string folder, Machine machine, Warn warn);

    bool kept() const { return !folder_.empty(); }
    std::string key(const std::string& engine_sha256) const;
    std::string path(const std::string& key) const;
    std::optional<std::string> read(const std::string& key) const;      // what was written under `key`, to the bit
    void write(const std::string& key, std::string_view content) const;  // whole or not at all
    void warn(const std::string& what) const { warn_("kernel cache: " + what); }

  private:
    void remove_oldest(const std::string& kept) const;

    std::string folder_;
    Machine machine_;
    Warn warn_;
    mutable std::atomic<bool> unwritable_ = false;  // it was said
};

}  // namespace sana
