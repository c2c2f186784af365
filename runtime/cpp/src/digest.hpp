// SHA-256, by OpenSSL.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace sana {

std::string sha256(std::string_view data, std::string_view more = {});  // of both, in hexadecimal

// Of each file, in order; several at the same time. Raises MissingFileError, in the words of engines/bundle.py, for a file of
// `bundle` that went away. progress: called with the bytes done since the last call, by one thread at a time.
std::vector<std::string> files_sha256(const std::vector<std::string>& paths, const std::string& bundle,
                                      const std::function<void(std::size_t)>& progress = {});

}  // namespace sana
