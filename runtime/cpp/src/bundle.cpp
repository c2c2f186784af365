#include "bundle.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "digest.hpp"
#include "failure.hpp"
#include "json.hpp"
#include "onnx_locations.hpp"
#include "paths.hpp"
#include "python_text.hpp"
#include "token_table.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

bool is_folder(const std::string& path) {
    struct stat info{};
    return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

bool exists(const std::string& path) {
    struct stat info{};
    return stat(path.c_str(), &info) == 0;
}

bool is_there(const std::string& path) {  // a dangling link is, too
    struct stat info{};
    return lstat(path.c_str(), &info) == 0;
}

// Put the old folder back if a writer was killed between the two renames of its swap. As engines.atomic.recover.
void recover(const std::string& folder) {
    const std::size_t slash = folder.rfind('/');
    const std::string parent = slash == folder.npos ? "." : slash == 0 ? "/" : folder.substr(0, slash);
    const std::string aside = joined(parent, "." + folder.substr(slash == folder.npos ? 0 : slash + 1) + ".old");
    if (is_there(folder) || !is_folder(aside)) return;
    const int lock = open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);  // a living writer between its renames holds it
    bool moved = lock >= 0 && flock(lock, LOCK_EX) == 0;
    if (moved && !is_there(folder) && is_folder(aside)) moved = std::rename(aside.c_str(), folder.c_str()) == 0;
    const int error = errno;
    if (lock >= 0) close(lock);
    if (!moved) {
        throw Failure(ErrorKind::kBundle, folder + ": a writer was killed and left the bundle in " + aside +
                                              ", which cannot be renamed back (" + std::strerror(error) + "). Run: mv " + aside +
                                              " " + folder);
    }
}

std::string first_characters(std::string_view text, std::size_t count) {
    std::size_t end = 0;
    for (std::size_t i = 0; i < count && end < text.size(); ++i) next_code_point(text, end);
    return std::string(text.substr(0, end));
}

}  // namespace

std::string read_bounded(const std::string& path, std::size_t limit) {
    struct stat info{};
    if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {  // opening a FIFO would wait for ever
        throw Failure(ErrorKind::kManifest,
                      path + ": got a folder or a special file; expected a regular file. Copy the bundle again.");
    }
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file && errno == ENOENT) {
        throw Failure(ErrorKind::kMissingFile, path + ": no such file. Is this the folder of a bundle, and was all of it copied?");
    }
    if (!file) throw Failure(ErrorKind::kManifest, path + ": cannot be read (" + std::strerror(errno) + ").");
    std::string data;
    char block[1 << 16];
    while (data.size() <= limit) {
        const std::size_t size = std::fread(block, 1, sizeof block, file.get());
        if (size == 0) break;
        data.append(block, size);
    }
    if (data.size() > limit) {
        throw Failure(ErrorKind::kManifest, path + ": got more than " + std::to_string(limit) +
                                                " bytes; expected at most that. This is not a file of ours.");
    }
    return data;
}

Bundle Bundle::open(const std::string& folder, bool verify, const Progress& progress) {
    Bundle bundle;
    bundle.path = plain_path(folder);
    if (!is_folder(bundle.path)) recover(bundle.path);
    if (!is_folder(bundle.path)) {
        throw Failure(ErrorKind::kMissingFile, bundle.path + ": got " + (exists(bundle.path) ? "a file" : "nothing") +
                                                   "; expected the folder of a bundle. Make one with: sana build --out " +
                                                   bundle.path + " …");
    }
    const std::string manifest = joined(bundle.path, kManifestName);
    const std::string data = read_bounded(manifest, kMaxJsonBytes);
    bundle.manifest = parse_manifest(data, manifest);
    bundle.digest = sha256(data);
    bundle.check_files();
    bundle.check_external_data();
    TokenTable::of(bundle);  // it is mapped and looked up as it is, so its header has to say what the manifest does
    if (verify) {
        std::vector<std::string> names;
        for (const auto& [name, entry] : bundle.manifest.files) names.push_back(name);
        bundle.verify(names, progress);
    }
    return bundle;
}

void Bundle::verify(const std::vector<std::string>& names, const Progress& progress) const {
    std::vector<Span> spans;
    std::uint64_t total = 0, done = 0;
    for (const std::string& name : names) {
        const std::string at = file(name);  // raises for a name that is not there
        const FileEntry& entry = *manifest.file(name);
        const std::vector<Span> parts = entry.parts.empty() ? std::vector{Span{at}} : parts_of(at, entry.size);
        spans.insert(spans.end(), parts.begin(), parts.end());
        total += static_cast<std::uint64_t>(entry.size);
    }
    const std::vector<std::string> digests = spans_sha256(spans, path, [&](std::size_t bytes) {
        done += bytes;
        if (progress) progress(done, total);
    });
    auto found = digests.begin();
    for (const std::string& name : names) {
        const FileEntry& entry = *manifest.file(name);
        const std::vector<std::string> expected = entry.parts.empty() ? std::vector{entry.sha256} : entry.parts;
        if (!std::equal(expected.begin(), expected.end(), found)) {
            const std::string got = entry.parts.empty() ? *found : spans_sha256({Span{file(name)}}, path).front();
            const std::string what =
                got == entry.sha256
                    ? " has the SHA-256 of the manifest, and its parts have not. Rebuild the bundle."
                    : " was changed: got SHA-256 " + got + "; expected " + entry.sha256 + ". Copy the file again, or rebuild.";
            throw Failure(ErrorKind::kDigest, path + ": " + name + what);
        }
        found += static_cast<std::ptrdiff_t>(expected.size());
    }
}

std::string Bundle::file(const std::string& name) const {
    if (manifest.file(name) == nullptr) {
        throw Failure(ErrorKind::kMissingFile,
                      path + ": the bundle has no " + repr(name) + ". Rebuild with a program that writes it.");
    }
    return inside(path, name, kManifestName);
}

std::string Bundle::onnx_path(const std::string& component) const { return file(graph_name(component)); }

std::vector<std::string> Bundle::portable_files(const std::string& component) const {
    std::vector<std::string> names = {graph_name(component)};
    for (const std::string& location : external_locations(onnx_path(component))) names.push_back(component + "/" + location);
    return names;
}

void Bundle::check_files() const {
    for (const auto& [name, entry] : manifest.files) {
        struct stat info{};
        if (stat(file(name).c_str(), &info) != 0 || info.st_size != entry.size) {
            throw Failure(ErrorKind::kDigest, path + ": " + name + " was changed or cut off: got " + std::to_string(info.st_size) +
                                                  " bytes; expected " + std::to_string(entry.size) +
                                                  ". Copy the file again, or rebuild.");
        }
    }
}

// A graph may name weights in files of the manifest only: what is not digested is not read.
void Bundle::check_external_data() const {
    for (const std::string& component : manifest.components()) {
        for (const std::string& location : external_locations(onnx_path(component))) {
            const bool beside = !location.empty() && location.find('/') == location.npos && location != "." && location != "..";
            if (!beside || manifest.file(component + "/" + location) == nullptr) {
                throw Failure(ErrorKind::kUnsafePath,
                              path + ": " + component + "/model.onnx keeps weights in " + repr(first_characters(location, 200)) +
                                  "; expected the name of a file beside it that the manifest lists. Do not use this bundle "
                                  "unless you know who made it.");
            }
        }
    }
}

}  // namespace sana
