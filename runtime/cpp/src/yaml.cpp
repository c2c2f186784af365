#include "yaml.hpp"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <optional>

#include "failure.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

bool is_figure(char c) { return c >= '0' && c <= '9'; }
bool is_word_character(char c) { return is_figure(c) || c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

std::string_view trimmed(std::string_view text) {
    while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
    while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
    return text;
}

// Digits with or without a sign, a fraction and an exponent, as Python's and YAML's readers agree on them. How far it reaches.
struct Number {
    bool whole;
    std::size_t end;
};
std::optional<Number> number_in(std::string_view text) {
    std::size_t at = !text.empty() && (text[0] == '-' || text[0] == '+');
    const std::size_t begin = at;
    const auto digits = [&] {
        const std::size_t from = at;
        while (at < text.size() && is_figure(text[at])) ++at;
        return at > from;
    };
    if (!digits()) return {};
    if (text[begin] == '0' && at - begin > 1) return {};  // octal, for one of them
    if (at == text.size()) return Number{true, at};
    if (text[at] != '.') return {};
    ++at;
    digits();
    if (at + 1 < text.size() && text[at] == 'e' && (text[at + 1] == '-' || text[at + 1] == '+')) {  // YAML 1.1 wants the sign
        at += 2;
        if (!digits()) return {};
    }
    return Number{false, at};
}

class YamlParser {
  public:
    YamlParser(std::string_view text, const std::string& source) : text_(text), source_(source) {}

    Json document() {
        JsonObject out;
        while (next()) {
            if (line_ == "---" && out.empty()) continue;
            const std::size_t colon = line_.find(':');
            const std::string_view key = line_.substr(0, colon);
            const bool plain = !key.empty() && !is_figure(key[0]) && std::all_of(key.begin(), key.end(), is_word_character);
            if (colon == line_.npos || !plain) refuse();
            if (std::any_of(out.begin(), out.end(), [&](const auto& each) { return each.first == key; }))
                refuse("the key is there twice");
            std::string_view rest = line_.substr(colon + 1);
            if (!rest.empty() && rest[0] != ' ') refuse();
            rest = trimmed(rest);
            if (!rest.empty() && rest[0] == '[') {
                out.emplace_back(key, Json{flow_list(std::string(rest))});
            } else {
                out.emplace_back(key, rest.empty() ? block_list() : scalar(rest));
            }
        }
        return {std::move(out)};
    }

  private:
    [[noreturn]] void refuse(const std::string& why = "") const {
        throw Failure(ErrorKind::kSpec,
                      source_ + ": line " + std::to_string(number_) + ": got " + repr(line_) +
                          (why.empty() ? "; expected a key with a number, a word or a list of these" : "; " + why) +
                          ". The Python runtime reads all of YAML.");
    }

    // The next line that says something, without what is no part of it. False at the end.
    bool next() {
        while (at_ < text_.size()) {
            const std::size_t end = std::min(text_.find('\n', at_), text_.size());
            line_ = text_.substr(at_, end - at_);
            at_ = std::min(end + 1, text_.size());
            ++number_;
            if (line_.ends_with('\r')) line_.remove_suffix(1);
            char quote = 0;
            for (std::size_t i = 0; i < line_.size(); ++i) {
                const char c = line_[i];
                if (quote != 0 ? c == quote : c == '"' || c == '\'') quote = quote ? '\0' : c;
                if (c == '#' && quote == 0 && (i == 0 || line_[i - 1] == ' ')) {
                    line_ = line_.substr(0, i);
                    break;
                }
            }
            while (line_.ends_with(' ')) line_.remove_suffix(1);
            if (!line_.empty()) return true;
        }
        return false;
    }

    Json block_list() {  // the lines below a key that begin with a dash; null if there are none
        JsonArray items;
        std::size_t indent = 0;
        while (true) {
            const std::size_t at = at_, number = number_;
            const std::string_view line = line_;
            if (next()) {
                const std::string_view item = trimmed(line_);
                if (item.starts_with("- ")) {
                    const std::size_t here = line_.find('-');
                    if (items.empty()) indent = here;
                    if (here != indent) refuse();
                    items.push_back(scalar(trimmed(item.substr(2))));
                    continue;
                }
            }
            at_ = at;
            number_ = number;
            line_ = line;
            return items.empty() ? Json{nullptr} : Json{std::move(items)};
        }
    }

    JsonArray flow_list(std::string text) {  // may go on over several lines
        while (text.find(']') == text.npos) {
            if (!next()) refuse("the list has no end");
            text += " " + std::string(trimmed(line_));
        }
        if (text.find(']') + 1 != text.size()) refuse();
        std::string_view rest = trimmed(std::string_view(text).substr(1, text.size() - 2));
        JsonArray items;
        while (!rest.empty()) {
            const std::size_t comma = std::min(rest.find(','), rest.size());
            items.push_back(scalar(trimmed(rest.substr(0, comma))));
            rest.remove_prefix(std::min(comma + 1, rest.size()));
            rest = trimmed(rest);
        }
        return items;
    }

    Json scalar(std::string_view text) const {
        if (text.empty()) refuse();
        if (const char quote = text[0]; quote == '"' || quote == '\'') {
            const std::string_view inner = text.size() > 1 ? text.substr(1, text.size() - 2) : "";
            if (text.size() < 2 || text.back() != quote || inner.find_first_of("\"'\\") != inner.npos) refuse();
            return {std::string(inner)};
        }
        if (const auto number = number_in(text)) {
            if (number->end != text.size()) refuse();
            if (!number->whole) return {std::strtod(std::string(text).c_str(), nullptr)};
            const std::string_view digits = text[0] == '+' ? text.substr(1) : text;
            std::int64_t value = 0;
            if (std::from_chars(digits.data(), digits.data() + digits.size(), value).ec != std::errc()) refuse();
            return {value};
        }
        std::string word(text);
        if (is_figure(word[0]) || !std::all_of(word.begin(), word.end(), is_word_character)) {
            if (word != "~") refuse();
        }
        for (char& c : word) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
        if (word == "null" || word == "~") return {nullptr};
        if (word == "true" || word == "yes" || word == "on") return {true};
        if (word == "false" || word == "no" || word == "off") return {false};
        return {std::string(text)};
    }

    std::string_view text_;
    const std::string& source_;
    std::string_view line_;
    std::size_t at_ = 0, number_ = 0;
};

}  // namespace

Json parse_yaml(std::string_view text, const std::string& source) {
    if (const std::string error = utf8_error(text); !error.empty()) {
        throw Failure(ErrorKind::kSpec, source + ": not YAML (" + error + ").");
    }
    Json out = YamlParser(text, source).document();
    if (std::get<JsonObject>(out.value).empty()) {
        throw Failure(ErrorKind::kSpec, source + ": got a NoneType; expected keys such as 'scheduler: flow_euler'.");
    }
    return out;
}

}  // namespace sana
