// Code points, and what Python says of them. Strings are UTF-8; a lone surrogate (only JSON can spell one) is kept as three bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace sana {

bool is_printable(char32_t c);  // as str.isprintable
bool is_letter(char32_t c);     // \p{L}
bool is_number(char32_t c);     // \p{N}
bool is_space(char32_t c);      // as str.isspace
bool is_word(char32_t c);       // as \w of Python's re

// The code point at `at`, which is moved past it. `text` is valid but for lone surrogates.
char32_t next_code_point(std::string_view text, std::size_t& at);
std::u32string decode(std::string_view text);
void append(std::string& out, char32_t c);
std::size_t count_code_points(std::string_view text);

std::string lower(std::string_view text);  // as str.lower, with the Greek final sigma
std::string strip(std::string_view text);  // as str.strip

// Empty if `bytes` is UTF-8; else what Python's UnicodeDecodeError says.
std::string utf8_error(std::string_view bytes);

}  // namespace sana
