#include "schedule_file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "failure.hpp"
#include "python_text.hpp"
#include "schema.hpp"
#include "unicode.hpp"
#include "yaml.hpp"

namespace sana {
namespace {

constexpr std::size_t kMaxCharacters = 64 << 10;

const std::vector<std::string> kKeys = {"scheduler", "num_steps", "flow_shift", "spacing", "max_timestep", "intermediate_timestep"};

struct ScheduleFile {
    std::string scheduler, spacing = "linear";
    std::optional<long> num_steps;
    std::optional<double> flow_shift, max_timestep, intermediate_timestep;
    std::optional<std::vector<double>> times;
    bool even = false;  // intermediate_timestep: no special middle
};

// The first complaint of a key, as pydantic has it, with the whole value: in a union, of its first member.
void check_key(const std::string& path, const std::string& key, const Json& value, const std::string& expected) {
    throw Failure(ErrorKind::kSpec, path + ": " + key + ": got " + python_repr(value) + "; " + expected + ".");
}

void read_real(const std::string& path, const std::string& key, const Json* value, std::optional<double>& out) {
    if (value == nullptr || value->get<std::nullptr_t>()) return;
    const auto* whole = value->get<std::int64_t>();
    const auto* real = value->get<double>();
    if (whole == nullptr && real == nullptr) check_key(path, key, *value, "input should be a valid number");
    out = whole != nullptr ? static_cast<double>(*whole) : *real;
    if (!(*out > 0)) check_key(path, key, *value, "input should be greater than 0");
}

ScheduleFile read_keys(const Json& document, const std::string& path) {
    ScheduleFile out;
    const Json* value = document.find("scheduler");
    if (value == nullptr) throw Failure(ErrorKind::kSpec, path + ": scheduler is missing.");
    const auto one_of = [](const Json& json, const std::vector<std::string>& words) {
        const auto* word = json.get<std::string>();
        return word != nullptr && std::find(words.begin(), words.end(), *word) != words.end();
    };
    if (!one_of(*value, scheduler_names())) {
        check_key(path, "scheduler", *value, "input should be 'flow_euler', 'flow_dpm_solver' or 'scm'");
    }
    out.scheduler = *value->get<std::string>();
    if (value = document.find("num_steps"); value != nullptr && !value->get<std::nullptr_t>()) {
        const auto* steps = value->get<std::int64_t>();
        if (steps == nullptr) check_key(path, "num_steps", *value, "input should be a valid integer");
        if (*steps > kMaxSteps) check_key(path, "num_steps", *value, "input should be less than or equal to 1000");
        if (*steps < 1) check_key(path, "num_steps", *value, "input should be greater than or equal to 1");
        out.num_steps = *steps;
    }
    read_real(path, "flow_shift", document.find("flow_shift"), out.flow_shift);
    if (value = document.find("spacing"); value != nullptr) {
        static const std::vector<std::string> words = {"linear", "exponential", "karras"};
        const auto* list = value->get<JsonArray>();
        if (one_of(*value, words)) {
            out.spacing = *value->get<std::string>();
        } else {
            Reader reader;
            out.times.emplace();
            if (list != nullptr) {
                for (const Json& each : *list) reader.real(each, {}, kPositive, out.times->emplace_back());
            }
            if (!reader.clean() || out.times->empty() || out.times->size() > static_cast<std::size_t>(kMaxSteps))
                check_key(path, "spacing", *value, "input should be 'linear', 'exponential' or 'karras'");
        }
    }
    read_real(path, "max_timestep", document.find("max_timestep"), out.max_timestep);
    value = document.find("intermediate_timestep");
    out.even = value != nullptr && one_of(*value, {"even"});
    if (!out.even) read_real(path, "intermediate_timestep", value, out.intermediate_timestep);
    for (const auto& [key, unused] : std::get<JsonObject>(document.value)) {
        if (std::find(kKeys.begin(), kKeys.end(), key) == kKeys.end())
            throw Failure(ErrorKind::kSpec, path + ": unknown key " + repr(key) + "; " + nearest(key, kKeys) + ".");
    }
    return out;
}

}  // namespace

Schedule parse_schedule_file(std::string_view text, const std::string& path, std::optional<long> num_steps) {
    const ScheduleFile file = read_keys(parse_yaml(text, path), path);
    const auto no_meaning = [&](const char* key, bool given) {
        if (given)
            throw Failure(ErrorKind::kSpec, path + ": " + key + " has no meaning for " + repr(file.scheduler) + ". Leave it out.");
    };
    if (file.scheduler == "scm") {
        no_meaning("flow_shift", file.flow_shift.has_value());
    } else {
        no_meaning("max_timestep", file.max_timestep.has_value());
        no_meaning("intermediate_timestep", file.even || file.intermediate_timestep);
    }
    Recipe recipe;
    recipe.scheduler = file.scheduler;
    recipe.num_steps = num_steps ? num_steps : file.num_steps;
    recipe.flow_shift = file.flow_shift.value_or(recipe.flow_shift);
    recipe.spacing = file.spacing;
    recipe.times = file.times;
    recipe.max_timestep = file.max_timestep;
    if (file.even) recipe.intermediate_timestep.reset();
    if (file.intermediate_timestep) recipe.intermediate_timestep = file.intermediate_timestep;
    try {
        return make_schedule(recipe);
    } catch (const Failure& failure) {
        if (failure.error().kind == ErrorKind::kRequest && num_steps) throw;  // the number came from the caller
        throw Failure(ErrorKind::kSpec, path + ": " + failure.error().message);
    }
}

Schedule read_schedule_file(const std::string& path, std::optional<long> num_steps) {
    const auto unreadable = [&] {
        return Failure(ErrorKind::kSpec,
                       path + ": cannot be read (" + std::strerror(errno) + "); expected a schedule's YAML file.");
    };
    errno = 0;
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) throw unreadable();
    std::string text(4 * kMaxCharacters + 4, '\0');
    text.resize(std::fread(text.data(), 1, text.size(), file.get()));
    if (std::ferror(file.get())) throw unreadable();
    if (count_code_points(text) > kMaxCharacters) {
        throw Failure(ErrorKind::kSpec,
                      path + ": more than " + std::to_string(kMaxCharacters) + " characters; a schedule is a few lines.");
    }
    return parse_schedule_file(text, path, num_steps);
}

}  // namespace sana
