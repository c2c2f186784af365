#include "json.hpp"

#include <cstdio>

#include <charconv>
#include <cstdlib>
#include <unordered_set>

#include "failure.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr int kPythonDepth = 980;    // about where Python's parser gives up; it depends on who called it
constexpr int kPydanticDepth = 201;  // of pydantic's parser
constexpr std::size_t kMaxDigits = 4300;

struct SyntaxError {  // JSONDecodeError
    std::string message;
    std::size_t at;  // byte
};
struct ValueError {
    std::string message;
};
struct TooDeep {};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// CPython's Modules/_json.c, step for step, so that a bad document is refused at the same place for the same reason.
class Parser {
  public:
    explicit Parser(std::string_view text) : text_(text) {}

    Json document() {
        if (text_.starts_with("\xEF\xBB\xBF")) throw SyntaxError{"Unexpected UTF-8 BOM (decode using utf-8-sig)", 0};
        skip_space();
        Json value = any(0);
        skip_space();
        if (at_ != text_.size()) throw SyntaxError{"Extra data", at_};
        return value;
    }

  private:
    char peek(std::size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }
    bool has(std::size_t ahead = 0) const { return at_ + ahead < text_.size(); }

    void skip_space() {
        while (has() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) ++at_;
    }

    bool skip_word(std::string_view word) {
        if (!text_.substr(at_).starts_with(word)) return false;
        at_ += word.size();
        return true;
    }

    Json any(int depth) {
        switch (peek()) {
            case '"':
                ++at_;
                return {string()};
            case '{':
                return object(depth + 1);
            case '[':
                return array(depth + 1);
            case 'n':
                if (skip_word("null")) return {nullptr};
                break;
            case 't':
                if (skip_word("true")) return {true};
                break;
            case 'f':
                if (skip_word("false")) return {false};
                break;
            case 'N':
                refuse_constant("NaN");
                break;
            case 'I':
                refuse_constant("Infinity");
                break;
            case '-':
                refuse_constant("-Infinity");
                break;
            default:
                break;
        }
        return number();
    }

    void refuse_constant(std::string_view word) {
        if (skip_word(word)) throw ValueError{"got " + std::string(word) + "; expected finite numbers"};
    }

    Json object(int depth) {
        if (depth > kPythonDepth) throw TooDeep{};
        JsonObject out;
        ++at_;
        skip_space();
        while (peek() != '}' || !out.empty()) {
            if (peek() != '"') throw SyntaxError{"Expecting property name enclosed in double quotes", at_};
            ++at_;
            std::string key = string();
            skip_space();
            if (peek() != ':') throw SyntaxError{"Expecting ':' delimiter", at_};
            ++at_;
            skip_space();
            out.emplace_back(std::move(key), any(depth));
            skip_space();
            if (peek() == '}') break;
            if (peek() != ',') throw SyntaxError{"Expecting ',' delimiter", at_};
            ++at_;
            skip_space();
        }
        ++at_;
        refuse_twice(out);
        return {std::move(out)};
    }

    static void refuse_twice(const JsonObject& object) {
        std::unordered_set<std::string_view> seen;
        for (const auto& [key, value] : object) {
            if (!seen.insert(key).second) {
                std::string_view shown = key;
                std::size_t end = 0;
                for (int i = 0; i < 80 && end < shown.size(); ++i) next_code_point(shown, end);
                throw ValueError{"the key " + repr(shown.substr(0, end)) + " is there twice"};
            }
        }
    }

    Json array(int depth) {
        if (depth > kPythonDepth) throw TooDeep{};
        JsonArray out;
        ++at_;
        skip_space();
        while (peek() != ']' || !out.empty()) {
            out.push_back(any(depth));
            skip_space();
            if (peek() == ']') break;
            if (peek() != ',') throw SyntaxError{"Expecting ',' delimiter", at_};
            ++at_;
            skip_space();
        }
        ++at_;
        return {std::move(out)};
    }

    Json number() {
        const std::size_t start = at_;
        if (peek() == '-') ++at_;
        if (!is_digit(peek())) throw SyntaxError{"Expecting value", start};
        if (peek() == '0') {
            ++at_;
        } else {
            while (is_digit(peek())) ++at_;
        }
        bool whole = true;
        if (peek() == '.' && is_digit(peek(1))) {
            whole = false;
            at_ += 2;
            while (is_digit(peek())) ++at_;
        }
        if (peek() == 'e' || peek() == 'E') {
            const std::size_t sign = peek(1) == '+' || peek(1) == '-' ? 2 : 1;
            if (is_digit(peek(sign))) {
                whole = false;
                at_ += sign;
                while (is_digit(peek())) ++at_;
            }
        }
        const std::string digits(text_.substr(start, at_ - start));
        return whole ? integer(digits) : Json{std::strtod(digits.c_str(), nullptr)};  // past the largest: infinity, as in Python
    }

    static Json integer(const std::string& digits) {
        if (const std::size_t count = digits.size() - (digits[0] == '-'); count > kMaxDigits) {
            throw ValueError{"Exceeds the limit (" + std::to_string(kMaxDigits) +
                             " digits) for integer string conversion: value has " + std::to_string(count) +
                             " digits; use sys.set_int_max_str_digits() to increase the limit"};
        }
        std::int64_t value = 0;
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        return error == std::errc() ? Json{value} : Json{BigInteger{digits}};
    }

    std::string string() {  // behind the opening quote
        const std::size_t begin = at_ - 1;
        std::string out;
        while (true) {
            const std::size_t from = at_;
            while (has() && peek() != '"' && peek() != '\\') {
                if (static_cast<unsigned char>(peek()) <= 0x1F) throw SyntaxError{"Invalid control character at", at_};
                ++at_;
            }
            out.append(text_, from, at_ - from);
            if (!has()) throw SyntaxError{"Unterminated string starting at", begin};
            if (peek() == '"') break;
            ++at_;
            if (!has()) throw SyntaxError{"Unterminated string starting at", begin};
            escape(out);
        }
        ++at_;
        return out;
    }

    void escape(std::string& out) {  // behind the backslash
        static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
        if (peek() != 'u') {
            const std::size_t found = kFrom.find(peek());
            if (found == kFrom.npos) throw SyntaxError{"Invalid \\escape", at_ - 1};
            out += kTo[found];
            ++at_;
            return;
        }
        ++at_;
        char32_t c = four_digits();
        if (c >= 0xD800 && c < 0xDC00 && peek() == '\\' && peek(1) == 'u' && has(6)) {
            const std::size_t back = at_;
            at_ += 2;
            const char32_t low = four_digits();
            if (low >= 0xDC00 && low < 0xE000) {
                c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
            } else {
                at_ = back;
            }
        }
        append(out, c);
    }

    char32_t four_digits() {
        unsigned value = 0;
        const std::size_t end = std::min(at_ + 4, text_.size());
        const auto [last, error] = std::from_chars(text_.data() + at_, text_.data() + end, value, 16);
        if (error != std::errc() || last != text_.data() + at_ + 4 || at_ + 4 >= text_.size())
            throw SyntaxError{"Invalid \\uXXXX escape", at_ - 1};
        at_ += 4;
        return value;
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

struct LineColumn {
    std::size_t line, column;  // from 1, in characters
};

LineColumn place_of(std::string_view text, std::size_t at) {
    const std::string_view before = text.substr(0, at);
    const std::size_t newline = before.rfind('\n');
    const std::size_t start = newline == before.npos ? 0 : newline + 1;
    std::size_t line = 1;
    for (const char c : before) line += c == '\n';
    return {line, count_code_points(before.substr(start)) + 1};
}

bool ends_with_brace(std::string_view text) {
    const std::string stripped = strip(text);
    return stripped.ends_with('}');
}

}  // namespace

const Json* Json::find(std::string_view key) const {
    if (const auto* object = get<JsonObject>()) {
        for (const auto& [name, inner] : *object) {
            if (name == key) return &inner;
        }
    }
    return nullptr;
}

Json parse_json(std::string_view data, const std::string& source, std::size_t limit) {
    const auto refuse = [&](const std::string& why) { return Failure(ErrorKind::kManifest, source + ": " + why); };
    if (data.size() > limit) {
        throw refuse("got " + std::to_string(data.size()) + " bytes; expected at most " + std::to_string(limit) + ".");
    }
    if (const std::string error = utf8_error(data); !error.empty()) throw refuse("not strict JSON (" + error + ").");
    try {
        return Parser(data).document();
    } catch (const SyntaxError& error) {
        const LineColumn place = place_of(data, error.at);
        const char* hint =
            ends_with_brace(data) ? "rebuild, or copy the file again." : "the file ends too early: copy it again, or rebuild.";
        throw refuse("not JSON at line " + std::to_string(place.line) + ", column " + std::to_string(place.column) + " (" +
                     error.message + "); " + hint);
    } catch (const TooDeep&) {
        throw refuse("nested too deeply. This is not a file of ours.");
    } catch (const ValueError& error) {
        throw refuse("not strict JSON (" + error.message + ").");
    }
}

std::string second_opinion(std::string_view data) {
    const auto complain = [&](const char* what, std::size_t at) {
        const std::size_t newline = data.substr(0, at).rfind('\n');
        std::size_t line = 1;
        for (const char c : data.substr(0, at)) line += c == '\n';
        const std::size_t column = newline == data.npos ? at + 1 : at - newline;  // in bytes
        return std::string("invalid JSON: ") + what + " at line " + std::to_string(line) + " column " + std::to_string(column);
    };
    const auto code = [&](std::size_t at) { return std::strtoul(std::string(data.substr(at, 4)).c_str(), nullptr, 16); };
    const auto low = [](unsigned long c) { return c >= 0xDC00 && c < 0xE000; };
    bool inside = false;
    int depth = 0;
    for (std::size_t at = 0; at < data.size(); ++at) {
        const char c = data[at];
        if (!inside) {
            if (c == '{' || c == '[') {
                if (++depth > kPydanticDepth) return complain("recursion limit exceeded", at);
            } else if (c == '}' || c == ']') {
                --depth;
            }
            inside = c == '"';
        } else if (c == '"') {
            inside = false;
        } else if (c == '\\' && data[++at] == 'u') {
            const unsigned long first = code(at + 1);
            at += 4;  // the last digit
            if (low(first)) return complain("lone leading surrogate in hex escape", at);
            if (first < 0xD800 || first >= 0xDC00) continue;
            if (data[at + 1] != '\\') return complain("unexpected end of hex escape", at + 1);
            if (data[at + 2] != 'u') return complain("unexpected end of hex escape", at + 2);
            const unsigned long second = code(at + 3);
            at += 6;
            if (!low(second)) return complain("lone leading surrogate in hex escape", at);
        }
    }
    return "";
}

std::string python_repr(const Json& json) {
    struct Visitor {
        std::string operator()(std::nullptr_t) const { return "None"; }
        std::string operator()(bool value) const { return value ? "True" : "False"; }
        std::string operator()(std::int64_t value) const { return std::to_string(value); }
        std::string operator()(const BigInteger& value) const { return value.digits; }
        std::string operator()(double value) const { return repr(value); }
        std::string operator()(const std::string& value) const { return repr(value); }
        std::string operator()(const JsonArray& value) const {
            std::vector<std::string> parts;
            for (const Json& each : value) parts.push_back(python_repr(each));
            return "[" + join(parts) + "]";
        }
        std::string operator()(const JsonObject& value) const {
            std::vector<std::string> parts;
            for (const auto& [key, inner] : value) parts.push_back(repr(key) + ": " + python_repr(inner));
            return "{" + join(parts) + "}";
        }
    };
    return std::visit(Visitor{}, json.value);
}

std::string json_string(std::string_view text) {
    static constexpr std::string_view kFrom = "\"\\\b\f\n\r\t", kTo = "\"\\bfnrt";
    std::string out = "\"";
    for (const char c : text) {
        if (const std::size_t at = kFrom.find(c); at != kFrom.npos) {
            out += {'\\', kTo[at]};
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char code[8];
            std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
            out += code;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

}  // namespace sana
