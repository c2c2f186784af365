#include "paths.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <vector>

#include "failure.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr int kMaxLinks = 40;  // as the kernel

std::vector<std::string> split(std::string_view path) {
    std::vector<std::string> parts;
    while (true) {
        const std::size_t slash = path.find('/');
        parts.emplace_back(path.substr(0, slash));
        if (slash == path.npos) return parts;
        path.remove_prefix(slash + 1);
    }
}

// A list of what is allowed leaves nothing to forget: no drives, control characters, look-alikes, spaces, hidden names.
bool is_plain(std::string_view part) {
    static constexpr std::string_view kFirst = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+-";
    if (part.empty() || kFirst.find(part[0]) == kFirst.npos) return false;
    for (const char c : part) {
        if (c != '.' && kFirst.find(c) == kFirst.npos) return false;
    }
    return true;
}

struct Followed {
    std::string path;
    int error = 0;  // ELOOP, ENOENT, …: what the kernel said first; `path` goes on all the same, as os.path.realpath does
};

Followed follow(const std::string& from) {
    Followed out;
    std::vector<std::string> left = split(from);
    int links = 0;
    for (std::size_t i = 0; i < left.size(); ++i) {
        const std::string part = left[i];
        if (part.empty() || part == ".") continue;
        if (part == "..") {
            const std::size_t slash = out.path.rfind('/');
            out.path.erase(slash == out.path.npos ? 0 : slash);
            continue;
        }
        const std::string next = out.path + "/" + part;
        struct stat info{};
        if (lstat(next.c_str(), &info) != 0) {
            if (out.error == 0) out.error = errno;
            out.path = next;
            continue;
        }
        if (!S_ISLNK(info.st_mode)) {
            if (!S_ISDIR(info.st_mode) && i + 1 < left.size() && out.error == 0) out.error = ENOTDIR;
            out.path = next;
            continue;
        }
        if (++links > kMaxLinks) return {from, ELOOP};
        std::error_code error;
        const std::string target = std::filesystem::read_symlink(next, error).string();
        if (error) return {next, error.value()};
        std::vector<std::string> rest = split(target);
        rest.insert(rest.end(), left.begin() + static_cast<long>(i) + 1, left.end());
        if (target.starts_with('/')) out.path.clear();
        left = std::move(rest);
        i = static_cast<std::size_t>(-1);
    }
    if (out.path.empty()) out.path = "/";
    return out;
}

std::string leads_out(const std::string& source, const std::string& path, const std::string& real) {
    return source + ": " + repr(path) + " is a link that leads out of the bundle, to " + real +
           "; expected a file inside it. Copy the bundle with its links followed (cp -rL), if you trust where they lead.";
}

}  // namespace

void check_relative(std::string_view path, std::string_view source) {
    const std::string where(source);
    const std::size_t length = count_code_points(path);
    if (length == 0 || length > kMaxPathLength) {
        throw Failure(ErrorKind::kUnsafePath, where + ": got a path of " + std::to_string(length) + " characters; expected 1 to " +
                                                  std::to_string(kMaxPathLength) + ".");
    }
    const std::vector<std::string> parts = split(path);
    bool out = path[0] == '/' || path.find('\\') != path.npos;
    std::size_t second = 0;
    next_code_point(path, second);
    out = out || path.substr(second, 1) == ":";
    for (const std::string& part : parts) out = out || part == "..";
    if (out) {
        throw Failure(ErrorKind::kUnsafePath,
                      where + ": got the path " + repr(path) +
                          ", which leads out of the bundle; expected a relative path inside it, with '/' between "
                          "names. Do not use this bundle unless you know who made it.");
    }
    for (const std::string& part : parts) {
        if (!is_plain(part)) {
            throw Failure(ErrorKind::kUnsafePath,
                          where + ": got the path " + repr(path) +
                              "; expected names of letters, digits and '._+-' that do not start with a dot, joined by "
                              "single '/'.");
        }
    }
}

std::string inside(const std::string& root, const std::string& path, const std::string& source) {
    check_relative(path, source);
    std::error_code error;
    const std::string real_root = follow(std::filesystem::absolute(root, error).string()).path;
    const Followed real = follow(real_root + "/" + path);
    const bool contained = real.path == real_root || real.path.starts_with(real_root == "/" ? "/" : real_root + "/");
    if (real.error == ELOOP) {
        throw Failure(ErrorKind::kUnsafePath,
                      source + ": " + repr(path) + " cannot be followed (Symlink loop from " + repr(real.path) + ").");
    }
    if (real.error != 0 && real.error != ENOENT && real.error != ENOTDIR) {
        throw Failure(ErrorKind::kUnsafePath, source + ": " + repr(path) + " cannot be followed ([Errno " +
                                                  std::to_string(real.error) + "] " + std::strerror(real.error) + ": " +
                                                  repr(real.path) + ").");
    }
    if (!contained) throw Failure(ErrorKind::kUnsafePath, leads_out(source, path, real.path));
    struct stat info{};
    if (real.error != 0 || stat(real.path.c_str(), &info) != 0) {
        throw Failure(ErrorKind::kMissingFile,
                      source + " names " + repr(path) + ", which is not in " + root + ". Copy the whole folder again, or rebuild.");
    }
    if (!S_ISREG(info.st_mode)) {
        throw Failure(ErrorKind::kUnsafePath,
                      source + ": " + repr(path) + " is not a regular file. Copy the whole folder again, or rebuild.");
    }
    return real.path;
}

std::string plain_path(std::string_view path) {
    std::string out = path.starts_with('/') ? "/" : "";
    for (const std::string& part : split(path)) {
        if (part.empty() || part == ".") continue;
        if (!out.empty() && out.back() != '/') out += '/';
        out += part;
    }
    return out.empty() ? "." : out;
}

std::string joined(const std::string& folder, const std::string& name) {
    return name.starts_with('/') ? plain_path(name) : plain_path(folder + "/" + name);
}

}  // namespace sana
