// YAML as schedules are written: one mapping of plain keys, with numbers, words, quoted text and lists of these.
//
// YAML has more, and some of it surprises: `1e-3` is text, `1:30` a number. What two readers could take for different things is
// refused by its line.
#pragma once

#include <string>
#include <string_view>

#include "json.hpp"

namespace sana {

// An object. Raises SpecError, which names `source`.
Json parse_yaml(std::string_view text, const std::string& source);

}  // namespace sana
