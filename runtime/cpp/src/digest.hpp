// SHA-256, by OpenSSL.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sana {

std::string sha256(std::string_view data, std::string_view more = {});  // of both, in hexadecimal

struct Span {  // bytes of a file
    std::string path;
    std::int64_t start = 0;
    std::optional<std::int64_t> size = std::nullopt;  // none: to the end of the file
};

constexpr std::int64_t kPartBytes = 64 << 20;  // of the format (docs/bundle.md)

// How many parts a file of `size` bytes has that is digested in parts: one for each 64 MiB. A file of one has none.
std::size_t num_parts(std::int64_t size);
// The parts of a file of `size` bytes, in order. The last reaches to its end, so that what was added to it is seen.
std::vector<Span> parts_of(const std::string& path, std::int64_t size);

// Of each span, in order; several at the same time, on all cores. Raises MissingFileError, in the words of engines/bundle.py, for a
// file of `bundle` that went away. progress: called with the bytes done since the last call, by one thread at a time.
std::vector<std::string> spans_sha256(const std::vector<Span>& spans, const std::string& bundle,
                                      const std::function<void(std::size_t)>& progress = {});

}  // namespace sana
