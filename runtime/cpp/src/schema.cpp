#include "schema.hpp"

#include <algorithm>
#include <cmath>

#include "failure.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr std::size_t kMaxComplaints = 5;  // of one document: the rest usually follows from the first
constexpr std::size_t kMaxShown = 80;

std::string short_repr(const std::string& text) {
    if (count_code_points(text) <= kMaxShown) return text;
    std::size_t end = 0;
    for (std::size_t i = 0; i < kMaxShown - 3; ++i) next_code_point(text, end);
    return text.substr(0, end) + "...";
}

// 'a', 'b' or 'c'
std::string alternatives(const std::vector<std::string>& words) {
    std::string out;
    for (std::size_t i = 0; i < words.size(); ++i) out += (i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + repr(words[i]);
    return out;
}

// A number as pydantic writes a bound in a message.
std::string bound(double value) {
    const std::string text = repr(value);
    return text.ends_with(".0") ? text.substr(0, text.size() - 2) : text;
}

bool all_digits(std::string_view text) {
    return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

Place operator/(const Place& at, std::string_view key) {
    Place inner = at;
    inner.emplace_back(key);
    return inner;
}

void Reader::complain(const Place& at, const std::string& message) {
    const std::string where = join(at, ".");
    complaints_.push_back((where.empty() ? "the document" : where) + ": " + message + ".");
}

void Reader::got(const Place& at, const Json& value, const std::string& expected) {
    complain(at, "got " + short_repr(python_repr(value)) + "; " + expected);
}

void Reader::complain_of_bytes(std::string_view document, const std::string& message) {
    std::string shown = repr_bytes(document);
    if (shown.size() > kMaxShown) shown = shown.substr(0, kMaxShown - 3) + "...";
    complain({}, "got " + shown + "; " + message);
}

void Reader::add(const Reader& other) { complaints_.insert(complaints_.end(), other.complaints_.begin(), other.complaints_.end()); }

void Reader::finish(const std::string& source) const {
    if (complaints_.empty()) return;
    const std::vector<std::string> shown(complaints_.begin(),
                                         complaints_.begin() + static_cast<long>(std::min(kMaxComplaints, complaints_.size())));
    const std::size_t more = complaints_.size() - shown.size();
    throw Failure(ErrorKind::kManifest, source + ": does not fit the schema:\n  " + join(shown, "\n  ") +
                                            (more ? "\n  and " + std::to_string(more) + " more" : ""));
}

bool Reader::object(const Json& value, const Place& at, const std::vector<Field>& fields) {
    const std::size_t before = count();
    const auto* members = value.get<JsonObject>();
    if (members == nullptr) {
        got(at, value, "input should be an object");
        return false;
    }
    for (const Field& field : fields) {
        if (const Json* found = value.find(field.name)) {
            field.read(*found, at / field.name);
        } else if (field.required) {
            complain(at / field.name, "missing. Rebuild with a program that writes it");
        }
    }
    std::vector<std::string> names;
    for (const Field& field : fields) names.emplace_back(field.name);
    for (const auto& [key, inner] : *members) {
        if (std::find(names.begin(), names.end(), key) == names.end()) complain(at / key, "unknown key; " + nearest(key, names));
    }
    return count() == before;
}

void Reader::dictionary(const Json& value, const Place& at,
                        const std::function<void(const std::string&, const Json&, const Place&)>& read) {
    const auto* members = value.get<JsonObject>();
    if (members == nullptr) return got(at, value, "input should be an object");
    for (const auto& [key, inner] : *members) read(key, inner, at / key);
}

void Reader::array(const Json& value, const Place& at, const std::function<void(const Json&, const Place&)>& read) {
    const auto* items = value.get<JsonArray>();
    if (items == nullptr) return got(at, value, "input should be a valid array");
    for (std::size_t i = 0; i < items->size(); ++i) read((*items)[i], at / std::to_string(i));
}

void Reader::integer(const Json& value, const Place& at, const Limits& limits, std::int64_t& out) {
    const auto* found = value.get<std::int64_t>();
    const auto* big = value.get<BigInteger>();
    if (found == nullptr && big == nullptr) return got(at, value, "input should be a valid integer");
    const bool negative = big != nullptr && big->digits[0] == '-';
    if (found != nullptr && *found % limits.multiple_of != 0) {
        return got(at, value, "input should be a multiple of " + std::to_string(limits.multiple_of));
    }
    if (big != nullptr ? !negative : *found > limits.most) {
        return got(at, value, "input should be less than or equal to " + std::to_string(limits.most));
    }
    if (negative || *found < limits.least)
        return got(at, value, "input should be greater than or equal to " + std::to_string(limits.least));
    out = *found;
}

void Reader::integer(const Json& value, const Place& at, const Limits& limits, std::uint64_t& out) {  // to 2^64 - 1
    if (const auto* big = value.get<BigInteger>(); big != nullptr && big->digits[0] != '-') {
        const std::string& digits = big->digits;
        const std::string most = std::to_string(std::numeric_limits<std::uint64_t>::max());
        if (digits.size() > most.size() || (digits.size() == most.size() && digits > most)) {
            return got(at, value, "input should be less than or equal to " + most);
        }
        out = std::stoull(digits);
        return;
    }
    std::int64_t small = 0;
    integer(value, at, limits, small);
    out = static_cast<std::uint64_t>(small);
}

void Reader::real(const Json& value, const Place& at, const RealLimits& limits, double& out) {
    double found = 0;
    if (const auto* number = value.get<double>()) {
        found = *number;
    } else if (const auto* whole = value.get<std::int64_t>()) {
        found = static_cast<double>(*whole);
    } else if (const auto* big = value.get<BigInteger>()) {
        found = std::stod(big->digits);
    } else {
        return got(at, value, "input should be a valid number");
    }
    if (!std::isfinite(found)) return got(at, value, "input should be a finite number");
    if (limits.most && found > *limits.most) return got(at, value, "input should be less than or equal to " + bound(*limits.most));
    if (limits.least && found < *limits.least)
        return got(at, value, "input should be greater than or equal to " + bound(*limits.least));
    if (limits.above && found <= *limits.above) return got(at, value, "input should be greater than " + bound(*limits.above));
    out = found;
}

void Reader::real_or_null(const Json& value, const Place& at, const RealLimits& limits, std::optional<double>& out) {
    if (value.get<std::nullptr_t>()) return out.reset();
    double found = 0;
    real(value, at, limits, found);
    out = found;
}

void Reader::boolean(const Json& value, const Place& at, bool& out) {
    const bool* found = value.get<bool>();
    if (found == nullptr) return got(at, value, "input should be a valid boolean");
    out = *found;
}

void Reader::text(const Json& value, const Place& at, const TextLimits& limits, std::string& out) {
    const auto* found = value.get<std::string>();
    if (found == nullptr) return got(at, value, "input should be a valid string");
    const auto characters = [](std::size_t number) {
        return std::to_string(number) + (number == 1 ? " character" : " characters");
    };
    const std::size_t length = count_code_points(*found);
    if (length > limits.most) return got(at, value, "string should have at most " + characters(limits.most));
    if (length < limits.least) return got(at, value, "string should have at least " + characters(limits.least));
    out = *found;
}

void Reader::word(const Json& value, const Place& at, const std::vector<std::string>& valid, std::string& out) {
    const auto* found = value.get<std::string>();
    if (found == nullptr || std::find(valid.begin(), valid.end(), *found) == valid.end()) {
        return got(at, value, "input should be " + alternatives(valid));
    }
    out = *found;
}

void Reader::number_word(const Json& value, const Place& at, std::int64_t valid) {
    if (value.get<BigInteger>() != nullptr)
        return got(at, value, "unable to parse input string as an integer, exceeded maximum size");
    const auto* whole = value.get<std::int64_t>();
    const auto* real = value.get<double>();
    const auto* flag = value.get<bool>();  // 1.0 and true are 1, for pydantic
    const bool equal = (whole != nullptr && *whole == valid) || (real != nullptr && *real == static_cast<double>(valid)) ||
                       (flag != nullptr && static_cast<std::int64_t>(*flag) == valid);
    if (!equal) got(at, value, "input should be " + std::to_string(valid));
}

void Reader::pattern(const Json& value, const Place& at, const char* pattern, bool (*fits)(std::string_view),
                     const TextLimits& limits, std::string& out) {
    const std::size_t before = count();
    text(value, at, limits, out);
    if (count() == before && !fits(out)) got(at, value, std::string("string should match pattern '") + pattern + "'");
}

bool is_sha256(std::string_view text) { return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == text.npos; }

bool is_version(std::string_view text) {
    int parts = 0;
    while (true) {
        const std::size_t dot = text.find('.');
        if (!all_digits(text.substr(0, dot)) || ++parts > 4) return false;
        if (dot == text.npos) return parts >= 2;
        text.remove_prefix(dot + 1);
    }
}

}  // namespace sana
