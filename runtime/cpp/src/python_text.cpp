#include "python_text.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <map>
#include <optional>

#include "unicode.hpp"

namespace sana {
namespace {

std::string hex(const char* format, unsigned value) {
    char text[16];
    std::snprintf(text, sizeof text, format, value);
    return text;
}

char quote_for(std::string_view text) { return text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\''; }

// The short escape of a character that has one in Python, or nothing.
std::string short_escape(char32_t c, char quote) {
    if (c == '\\' || c == static_cast<char32_t>(quote)) return {'\\', static_cast<char>(c)};
    return c == '\n' ? "\\n" : c == '\r' ? "\\r" : c == '\t' ? "\\t" : "";
}

// difflib.SequenceMatcher(None, a, b).ratio()
class Matcher {
  public:
    Matcher(const std::u32string& a, const std::u32string& b) : a_(a), b_(b) {
        for (std::size_t j = 0; j < b.size(); ++j) places_[b[j]].push_back(j);
        if (b.size() >= 200) {  // "autojunk": characters that are everywhere are no anchors
            const std::size_t most = b.size() / 100 + 1;
            std::erase_if(places_, [&](const auto& item) { return item.second.size() > most; });
        }
    }

    double ratio() const {
        const std::size_t length = a_.size() + b_.size();
        return length == 0 ? 1.0 : 2.0 * static_cast<double>(matches(0, a_.size(), 0, b_.size())) / static_cast<double>(length);
    }

  private:
    std::size_t matches(std::size_t a_low, std::size_t a_high, std::size_t b_low, std::size_t b_high) const {
        std::size_t best_a = a_low, best_b = b_low, size = 0;
        std::map<std::size_t, std::size_t> lengths;
        for (std::size_t i = a_low; i < a_high; ++i) {
            std::map<std::size_t, std::size_t> now;
            if (const auto found = places_.find(a_[i]); found != places_.end()) {
                for (const std::size_t j : found->second) {
                    if (j < b_low) continue;
                    if (j >= b_high) break;
                    const auto before = j > 0 ? lengths.find(j - 1) : lengths.end();
                    const std::size_t k = now[j] = (before == lengths.end() ? 0 : before->second) + 1;
                    if (k > size) best_a = i + 1 - k, best_b = j + 1 - k, size = k;
                }
            }
            lengths = std::move(now);
        }
        // popular characters extend a match, though they start none
        while (best_a > a_low && best_b > b_low && a_[best_a - 1] == b_[best_b - 1]) --best_a, --best_b, ++size;
        while (best_a + size < a_high && best_b + size < b_high && a_[best_a + size] == b_[best_b + size]) ++size;
        if (size == 0) return 0;
        return size + matches(a_low, best_a, b_low, best_b) + matches(best_a + size, a_high, best_b + size, b_high);
    }

    const std::u32string &a_, &b_;
    std::map<char32_t, std::vector<std::size_t>> places_;
};

}  // namespace

std::string repr(std::string_view text) {
    const char quote = quote_for(text);
    std::string out(1, quote);
    for (std::size_t at = 0; at < text.size();) {
        const char32_t c = next_code_point(text, at);
        if (const std::string escape = short_escape(c, quote); !escape.empty()) {
            out += escape;
        } else if (c == ' ' || is_printable(c)) {
            append(out, c);
        } else {
            out += hex(c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
        }
    }
    return out + quote;
}

std::string repr_bytes(std::string_view data) {
    const char quote = quote_for(data);
    std::string out{'b', quote};
    for (const char each : data) {
        const auto c = static_cast<unsigned char>(each);
        if (const std::string escape = short_escape(c, quote); !escape.empty()) {
            out += escape;
        } else {
            out += c >= 0x20 && c < 0x7F ? std::string(1, each) : hex("\\x%02x", c);
        }
    }
    return out + quote;
}

std::string repr(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
    char text[40];
    const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::scientific).ptr;
    const std::string_view shortest(text, static_cast<std::size_t>(end - text));
    const std::size_t e = shortest.find('e');
    int exponent = 0;
    const std::string_view power = shortest.substr(shortest[e + 1] == '+' ? e + 2 : e + 1);
    std::from_chars(power.data(), power.data() + power.size(), exponent);
    if (exponent < -4 || exponent >= 16) return std::string(shortest);
    const auto fixed = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed).ptr;
    const std::string out(text, fixed);
    return out.find('.') == out.npos ? out + ".0" : out;
}

std::string shape_repr(const std::vector<std::int64_t>& shape) {
    std::vector<std::string> parts;
    for (const std::int64_t each : shape) parts.push_back(std::to_string(each));
    return "(" + join(parts) + (shape.size() == 1 ? ",)" : ")");
}

std::string human_bytes(std::uint64_t size) {
    auto value = static_cast<double>(size);
    char text[32];
    for (const char* unit : {"B", "kB", "MB", "GB"}) {
        if (value < 1000) {
            std::snprintf(text, sizeof text, *unit == 'B' ? "%.0f %s" : "%.1f %s", value, unit);
            return text;
        }
        value /= 1000;
    }
    std::snprintf(text, sizeof text, "%.1f TB", value);
    return text;
}

std::string join(const std::vector<std::string>& words, std::string_view separator) {
    std::string out;
    for (std::size_t i = 0; i < words.size(); ++i) out += (i ? std::string(separator) : "") + words[i];
    return out;
}

std::string nearest(std::string_view word, const std::vector<std::string>& valid, double cutoff) {
    const std::u32string wanted = decode(word);
    std::optional<std::pair<double, std::string>> best;
    for (const std::string& each : valid) {
        const std::u32string candidate = decode(each);
        const double score = Matcher(candidate, wanted).ratio();
        if (score >= cutoff && (!best || std::pair(score, each) > *best)) best = {score, each};
    }
    return (best ? "did you mean " + repr(best->second) + "? " : "") + "Valid: " + join(valid);
}

}  // namespace sana
