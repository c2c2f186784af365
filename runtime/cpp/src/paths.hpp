// Paths that come from a file: which are allowed, and where they may lead. As engines/paths.py.
#pragma once

#include <string>
#include <string_view>

namespace sana {

constexpr std::size_t kMaxPathLength = 240;  // characters

// Raises UnsafePathError, which names `source`, unless `path` is a plain relative POSIX path.
void check_relative(std::string_view path, std::string_view source);

// The regular file that `path` names below `root`, following links only as long as they stay below it. Raises UnsafePathError,
// MissingFileError.
std::string inside(const std::string& root, const std::string& path, const std::string& source);

std::string plain_path(std::string_view path);  // as str(pathlib.Path(path)): without "." and doubled slashes
std::string joined(const std::string& folder, const std::string& name);  // as str(Path(folder) / name)

}  // namespace sana
