#include "unicode.hpp"

#include <algorithm>
#include <cstdio>
#include <iterator>

namespace sana {
namespace {

struct Range {
    char32_t first, last;
};
struct Lower {
    char32_t from, to;
};

#include "unicode_tables.inc"

template <std::size_t N>
bool in(const Range (&ranges)[N], char32_t c) {
    const Range* after = std::upper_bound(std::begin(ranges), std::end(ranges), c,
                                          [](char32_t value, const Range& range) { return value < range.first; });
    return after != std::begin(ranges) && c <= std::prev(after)->last;
}

bool continues(unsigned char byte) { return (byte & 0xC0) == 0x80; }

// A capital sigma ends a word: a cased letter before it and none behind, those that do not count left out.
bool is_final_sigma(const std::u32string& text, std::size_t at) {
    std::size_t before = at;
    while (before > 0 && in(kCaseIgnorable, text[before - 1])) --before;
    if (before == 0 || !in(kCased, text[before - 1])) return false;
    std::size_t behind = at + 1;
    while (behind < text.size() && in(kCaseIgnorable, text[behind])) ++behind;
    return behind == text.size() || !in(kCased, text[behind]);
}

}  // namespace

bool is_printable(char32_t c) { return !in(kUnprintable, c); }
bool is_letter(char32_t c) { return in(kLetter, c); }
bool is_number(char32_t c) { return in(kNumber, c); }
bool is_space(char32_t c) { return in(kSpace, c); }
bool is_word(char32_t c) { return c == U'_' || in(kWord, c); }

char32_t next_code_point(std::string_view text, std::size_t& at) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
    const unsigned char first = byte(0);
    const std::size_t length = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    char32_t c = length == 1 ? first : first & (0x7F >> length);
    for (std::size_t i = 1; i < length; ++i) c = c << 6 | (byte(i) & 0x3F);
    at += length;
    return c;
}

std::u32string decode(std::string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) out.push_back(next_code_point(text, at));
    return out;
}

void append(std::string& out, char32_t c) {
    if (c < 0x80) {
        out += static_cast<char>(c);
        return;
    }
    const int extra = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    static constexpr unsigned char kFirst[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(kFirst[extra] | c >> (6 * extra));
    for (int i = extra - 1; i >= 0; --i) out += static_cast<char>(0x80 | (c >> (6 * i) & 0x3F));
}

std::size_t count_code_points(std::string_view text) {
    return static_cast<std::size_t>(
        std::count_if(text.begin(), text.end(), [](char c) { return !continues(static_cast<unsigned char>(c)); }));
}

std::string lower(std::string_view text) {
    const std::u32string points = decode(text);
    std::string out;
    out.reserve(text.size());
    for (std::size_t i = 0; i < points.size(); ++i) {
        const char32_t c = points[i];
        if (c == 0x3A3) {
            append(out, is_final_sigma(points, i) ? 0x3C2 : 0x3C3);
        } else if (c == 0x130) {  // the only letter that becomes two: a small i and a dot above
            out += 'i';
            append(out, 0x307);
        } else {
            const Lower* found = std::lower_bound(std::begin(kLower), std::end(kLower), c,
                                                  [](const Lower& each, char32_t value) { return each.from < value; });
            append(out, found != std::end(kLower) && found->from == c ? found->to : c);
        }
    }
    return out;
}

std::string strip(std::string_view text) {
    const std::u32string points = decode(text);
    std::size_t first = 0, last = points.size();
    while (first < last && is_space(points[first])) ++first;
    while (last > first && is_space(points[last - 1])) --last;
    std::string out;
    for (std::size_t i = first; i < last; ++i) append(out, points[i]);
    return out;
}

std::string utf8_error(std::string_view bytes) {
    const std::size_t size = bytes.size();
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
    const auto complain = [&](std::size_t start, std::size_t end, const char* why) {
        char text[160];
        if (end - start == 1) {
            std::snprintf(text, sizeof text, "'utf-8' codec can't decode byte 0x%02x in position %zu: %s", byte(start), start, why);
        } else {
            std::snprintf(text, sizeof text, "'utf-8' codec can't decode bytes in position %zu-%zu: %s", start, end - 1, why);
        }
        return std::string(text);
    };
    for (std::size_t at = 0; at < size;) {
        const unsigned char first = byte(at);
        if (first < 0x80) {
            ++at;
            continue;
        }
        if (first < 0xC2 || first > 0xF4) return complain(at, at + 1, "invalid start byte");
        const std::size_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
        for (std::size_t i = 1; i < length; ++i) {
            if (at + i >= size) return complain(at, size, "unexpected end of data");
            const unsigned char next = byte(at + i);
            // the second byte's range is narrower where the first would else spell a longer form, a surrogate, or what is past the
            // end
            const bool narrow = i == 1 && ((first == 0xE0 && next < 0xA0) || (first == 0xED && next >= 0xA0) ||
                                           (first == 0xF0 && next < 0x90) || (first == 0xF4 && next >= 0x90));
            if (!continues(next) || narrow) return complain(at, at + i, "invalid continuation byte");
        }
        at += length;
    }
    return "";
}

}  // namespace sana
