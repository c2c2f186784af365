// Schedules as YAML files. As runtime/schedule_file.py, of whose YAML it reads what schedules are written in.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "schedule.hpp"

namespace sana {

// Read, check and compute. num_steps: in place of the file's. Raises SpecError naming the file and the key, RequestError for a
// number of steps from the caller.
Schedule read_schedule_file(const std::string& path, std::optional<long> num_steps = {});
Schedule parse_schedule_file(std::string_view text, const std::string& path, std::optional<long> num_steps = {});

}  // namespace sana
