// Checks parsed JSON against a schema, and complains as pydantic and engines/strict.py do: every field that is wrong, by name.
#pragma once

#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"

namespace sana {

using Place = std::vector<std::string>;  // keys and indices from the document to a value

struct Limits {  // of an integer
    std::int64_t least = std::numeric_limits<std::int64_t>::min();
    std::int64_t most = std::numeric_limits<std::int64_t>::max();
    std::int64_t multiple_of = 1;
};
struct RealLimits {
    std::optional<double> above = std::nullopt, least = std::nullopt, most = std::nullopt;
};
constexpr RealLimits kPositive{.above = 0};
struct TextLimits {  // characters
    std::size_t least = 0, most = std::numeric_limits<std::size_t>::max();
};

class Reader {
  public:
    struct Field {
        const char* name;
        std::function<void(const Json&, const Place&)> read;
        bool required = true;
    };

    // False if something is wrong with it. `fields` in the order of the schema, which is the order of the complaints.
    bool object(const Json& value, const Place& at, const std::vector<Field>& fields);
    // Any keys; `read` gets each value with its place.
    void dictionary(const Json& value, const Place& at,
                    const std::function<void(const std::string&, const Json&, const Place&)>& read);
    void array(const Json& value, const Place& at, const std::function<void(const Json&, const Place&)>& read);
    void integer(const Json& value, const Place& at, const Limits& limits, std::int64_t& out);
    void integer(const Json& value, const Place& at, const Limits& limits, std::uint64_t& out);
    void real(const Json& value, const Place& at, const RealLimits& limits, double& out);
    void real_or_null(const Json& value, const Place& at, const RealLimits& limits, std::optional<double>& out);
    void boolean(const Json& value, const Place& at, bool& out);
    void text(const Json& value, const Place& at, const TextLimits& limits, std::string& out);
    void word(const Json& value, const Place& at, const std::vector<std::string>& valid, std::string& out);
    void number_word(const Json& value, const Place& at, std::int64_t valid);  // a literal number
    // A text of a form: `fits` decides, `pattern` is what the message shows.
    void pattern(const Json& value, const Place& at, const char* pattern, bool (*fits)(std::string_view), const TextLimits& limits,
                 std::string& out);

    void got(const Place& at, const Json& value, const std::string& expected);
    void complain(const Place& at, const std::string& message);
    void complain_of_bytes(std::string_view document, const std::string& message);  // of one that is not JSON for pydantic
    void add(const Reader& other);                                                  // its complaints
    bool clean() const { return complaints_.empty(); }
    std::size_t count() const { return complaints_.size(); }
    // Raises ManifestError if there was any complaint.
    void finish(const std::string& source) const;

  private:
    std::vector<std::string> complaints_;
};

Place operator/(const Place& at, std::string_view key);

bool is_sha256(std::string_view text);   // ^[0-9a-f]{64}$
bool is_version(std::string_view text);  // ^[0-9]+(\.[0-9]+){1,3}$

}  // namespace sana
