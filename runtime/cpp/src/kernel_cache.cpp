#include "kernel_cache.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "digest.hpp"
#include "failure.hpp"
#include "json.hpp"
#include "paths.hpp"

namespace sana {
namespace {

namespace fs = std::filesystem;

constexpr const char *kSuffix = ".kernels", *kPrefix = "new-";  // of files, of temporary folders
constexpr std::size_t kDigestBytes = 32;

std::string digest_bytes(const std::string& key, std::string_view content) {
    const std::string hex = sha256(key, content);
    std::string out;
    for (std::size_t i = 0; i < hex.size(); i += 2) out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    return out;
}

// A descriptor that holds the lock on the folder, which a killed process drops; -1 if somebody else holds it, or it went away.
int locked_folder(const std::string& path) {
    const int lock = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock < 0) return -1;
    struct stat held{}, there{};
    if (flock(lock, LOCK_EX | LOCK_NB) == 0 && fstat(lock, &held) == 0 && lstat(path.c_str(), &there) == 0 &&
        held.st_ino == there.st_ino && held.st_dev == there.st_dev) {
        return lock;
    }
    close(lock);
    return -1;
}

// As engines.atomic.make_temporary: a locked folder that the next writer deletes if this process is killed.
class TemporaryFolder {
  public:
    explicit TemporaryFolder(const std::string& parent) {
        std::random_device random;
        for (int tries = 0; lock_ < 0; ++tries) {
            char name[16];
            std::snprintf(name, sizeof name, "%s%08x", kPrefix, static_cast<unsigned>(random()));
            path = joined(parent, name);
            if (mkdir(path.c_str(), 0777) != 0) throw std::filesystem::filesystem_error("mkdir", path, {errno, std::generic_category()});
            lock_ = locked_folder(path);
            if (lock_ < 0 && tries == 16) throw std::filesystem::filesystem_error("lock", path, {ENOLCK, std::generic_category()});
        }
    }
    ~TemporaryFolder() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
        close(lock_);
    }
    TemporaryFolder(const TemporaryFolder&) = delete;

    std::string path;

  private:
    int lock_ = -1;
};

bool is_temporary(const std::string& name) {
    return name.size() == std::strlen(kPrefix) + 8 && name.starts_with(kPrefix) &&
           name.find_first_not_of("0123456789abcdef", std::strlen(kPrefix)) == name.npos;
}

void remove_dead(const std::string& folder) {
    for (const auto& entry : fs::directory_iterator(folder)) {
        if (!is_temporary(entry.path().filename().string()) || entry.is_symlink() || !entry.is_directory()) continue;
        const int lock = locked_folder(entry.path().string());
        if (lock < 0) continue;
        std::error_code ignored;
        fs::remove_all(entry.path(), ignored);
        close(lock);
    }
}

}  // namespace

std::string usual_kernel_folder() {
    if (const char* root = std::getenv("SANA_CACHE_DIR"); root != nullptr && *root) return joined(root, "kernels");
    const char* home = std::getenv("HOME");
    return home != nullptr && *home ? joined(home, ".cache/sana/kernels") : "";
}

KernelCache::KernelCache(std::string folder, Machine machine, Warn warn)
    : folder_(std::move(folder)), machine_(std::move(machine)), warn_(std::move(warn)) {}

// engines.digest.digest_of({"engine": …, "machine": {…}}): keys sorted, no spaces.
std::string KernelCache::key(const std::string& engine_sha256) const {
    return sha256("{\"engine\":" + json_string(engine_sha256) + ",\"machine\":{\"driver\":" + json_string(machine_.driver) +
                  ",\"gpu\":" + json_string(machine_.gpu) + ",\"sm\":" + json_string(machine_.sm) +
                  ",\"tensorrt\":" + json_string(machine_.tensorrt) + "}}");
}

std::string KernelCache::path(const std::string& key) const { return joined(folder_, key + kSuffix); }

std::optional<std::string> KernelCache::read(const std::string& key) const {
    const std::string file = path(key);
    std::string data;
    try {
        data = read_bounded(file, kMaxKernelFile);
    } catch (const Failure& failure) {
        if (failure.error().kind != ErrorKind::kMissingFile)
            warn("a file is ignored, and its kernels are compiled again: " + failure.error().message);
        return {};
    }
    const std::string_view content = std::string_view(data).substr(std::min(data.size(), kDigestBytes));
    if (data.substr(0, kDigestBytes) != digest_bytes(key, content)) {
        warn(file + " is damaged or another engine's; it is ignored, and its kernels are compiled again");
        return {};
    }
    utimensat(AT_FDCWD, file.c_str(), nullptr, 0);  // it was used just now; in a read-only folder nothing is removed either
    data.erase(0, kDigestBytes);
    return data;
}

void KernelCache::write(const std::string& key, std::string_view content) const {
    const std::string file = path(key);
    if (const std::size_t size = kDigestBytes + content.size(); size > kMaxKernelFile) {
        warn("got " + std::to_string(size) + " bytes for " + file + "; expected at most " + std::to_string(kMaxKernelFile) +
             ". They are not kept");
        return;
    }
    try {
        fs::create_directories(folder_);
        remove_dead(folder_);
        const TemporaryFolder temporary(folder_);
        const std::string made = joined(temporary.path, key + kSuffix);
        std::ofstream out(made, std::ios::binary);
        out << digest_bytes(key, content) << content;
        out.close();
        if (!out) throw fs::filesystem_error("write", made, {errno != 0 ? errno : EIO, std::generic_category()});
        fs::rename(made, file);
        remove_oldest(file);
    } catch (const fs::filesystem_error& error) {
        if (!unwritable_.exchange(true)) warn(folder_ + " cannot be written, so the next start compiles kernels again: " + error.what());
    }
}

void KernelCache::remove_oldest(const std::string& kept) const {
    std::vector<std::tuple<bool, std::int64_t, std::uint64_t, std::string>> found;  // the kept one first, then the latest used
    for (const auto& entry : fs::directory_iterator(folder_)) {
        struct stat seen{};
        const std::string file = entry.path().string();
        if (!file.ends_with(kSuffix) || lstat(file.c_str(), &seen) != 0) continue;  // another process was quicker
        const std::int64_t used = seen.st_mtim.tv_sec * 1'000'000'000L + seen.st_mtim.tv_nsec;
        found.emplace_back(file != kept, -used, static_cast<std::uint64_t>(seen.st_size), file);
    }
    std::sort(found.begin(), found.end());
    std::uint64_t total = 0;
    for (const auto& [other, used, size, file] : found) {
        total += size;
        if (total > kMaxKernelTotal) unlink(file.c_str());
    }
}

}  // namespace sana
