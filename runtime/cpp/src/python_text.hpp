// Values as Python writes them in messages.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sana {

std::string repr(std::string_view text);        // of a str
std::string repr_bytes(std::string_view data);  // of a bytes
std::string repr(double value);
std::string shape_repr(const std::vector<std::int64_t>& shape);  // of a tuple: "(1, 2)", "(3,)"
std::string human_bytes(std::uint64_t size);                     // as people write sizes of disks: powers of 1000
std::string join(const std::vector<std::string>& words, std::string_view separator = ", ");

// "did you mean 'x'? Valid: a, b": the end of a message about an unknown word. As engines.spec.nearest, whose difflib it follows.
std::string nearest(std::string_view word, const std::vector<std::string>& valid, double cutoff = 0.5);

}  // namespace sana
