// Open a bundle: the folder that holds everything a picture needs. docs/bundle.md describes it; this is engines/bundle.py once
// more.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.hpp"

namespace sana {

// The bytes of a small file. Raises MissingFileError, or ManifestError for a special file and for more than `limit` bytes.
std::string read_bounded(const std::string& path, std::size_t limit);

class Bundle {
  public:
    using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;  // bytes digested

    // Check the folder and describe it. verify: also compare every file's SHA-256. Raises MissingFileError, SchemaVersionError,
    // ManifestError, UnsafePathError, DigestError, BundleError.
    static Bundle open(const std::string& folder, bool verify = true, const Progress& progress = {});

    // Compare the SHA-256 of these files of the manifest with it; of a file whose parts it has, the parts, on all cores. Raises
    // DigestError for the first that differs.
    void verify(const std::vector<std::string>& names, const Progress& progress = {}) const;

    std::string file(const std::string& name) const;  // its path. Raises MissingFileError, UnsafePathError
    std::string onnx_path(const std::string& component) const;
    std::vector<std::string> portable_files(
        const std::string& component) const;  // the graph and its weights, by the manifest's names

    std::string path;
    Manifest manifest;
    std::string digest;  // SHA-256 of manifest.json, and so of the whole bundle

  private:
    void check_files() const;
    void check_external_data() const;
};

}  // namespace sana
