// Strict JSON, as engines/strict.py reads it: what Python's json refuses, and NaN, and a key written twice, with Python's own
// words.
//
// A library's parser would take the same documents, but not say the same of a bad one, at the same line and column.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace sana {

struct Json;
struct BigInteger {  // past 64 bits: nothing here takes one, but messages show it
    std::string digits;
};
using JsonArray = std::vector<Json>;
using JsonObject = std::vector<std::pair<std::string, Json>>;  // in the document's order; no key twice

struct Json {
    std::variant<std::nullptr_t, bool, std::int64_t, BigInteger, double, std::string, JsonArray, JsonObject> value = nullptr;

    template <class T>
    const T* get() const {
        return std::get_if<T>(&value);
    }
    const Json* find(std::string_view key) const;  // nullptr where there is none, or this is no object
};

constexpr std::size_t kMaxJsonBytes = 16 << 20;

// Raises ManifestError, which names `source`. limit: bytes.
Json parse_json(std::string_view data, const std::string& source, std::size_t limit = kMaxJsonBytes);

// What pydantic's own parser refuses of a document that the above takes: lone surrogates, more than 201 levels. Empty if nothing.
std::string second_opinion(std::string_view data);

std::string json_string(std::string_view text);  // as pydantic writes it; as json.dumps does, for ASCII
std::string python_repr(const Json& value);  // as Python's repr() of the parsed value

}  // namespace sana
