#include "request.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "failure.hpp"
#include "prompt.hpp"
#include "python_text.hpp"
#include "unicode.hpp"

namespace sana {
namespace {

constexpr double kMaxGuidance = 100;

Failure refused(const std::string& message) { return {ErrorKind::kRequest, message}; }

void check_prompts(const std::vector<std::string>& prompts, const std::string& name, bool list) {
    if (prompts.empty() || prompts.size() > kMaxPrompts) {
        throw refused(name + ": got " + std::to_string(prompts.size()) + "; expected 1 to " + std::to_string(kMaxPrompts) +
                      " in one request. Split the list.");
    }
    for (std::size_t i = 0; i < prompts.size(); ++i) {
        const std::string where = list ? name + "[" + std::to_string(i) + "]" : name;
        if (!utf8_error(prompts[i]).empty()) {  // Python's strings have halves of surrogate pairs in the place of such bytes
            throw refused(where + ": got half of a surrogate pair, which is not text. Decode the prompt as UTF-8.");
        }
        if (const std::size_t length = count_code_points(prompts[i]); length > kMaxPromptCharacters) {
            throw refused(where + ": got " + std::to_string(length) + " characters; expected at most " +
                          std::to_string(kMaxPromptCharacters) + ". Shorten it.");
        }
    }
}

std::vector<std::string> check_negative(const std::vector<std::string>& negative, std::size_t count) {
    if (negative.empty()) return std::vector<std::string>(count);
    check_prompts(negative, "negative_prompts", negative.size() > 1);
    if (negative.size() == 1) return std::vector<std::string>(count, negative[0]);
    if (negative.size() != count) {
        throw refused("negative_prompts: got " + std::to_string(negative.size()) + "; expected " + std::to_string(count) +
                      ", one for each prompt, or one string for all.");
    }
    return negative;
}

std::vector<std::uint64_t> check_seeds(const std::vector<std::uint64_t>& seeds, std::size_t count) {
    constexpr std::uint64_t kMaxSeed = std::numeric_limits<std::uint64_t>::max();
    if (seeds.size() != 1) {
        if (seeds.size() != count) {
            throw refused("seed: got a list of " + std::to_string(seeds.size()) + "; expected " + std::to_string(count) +
                          ", one for each prompt, or one integer.");
        }
        return seeds;
    }
    if (seeds[0] > kMaxSeed - (count - 1)) {
        const std::string first = std::to_string(seeds[0]);
        throw refused("seed: got " + first + " for " + std::to_string(count) + " prompts, which get " + first + ", " + first +
                      " + 1, …; expected at most " + std::to_string(kMaxSeed) + ".");
    }
    std::vector<std::uint64_t> out(count);
    for (std::size_t i = 0; i < count; ++i) out[i] = seeds[0] + i;
    return out;
}

double check_guidance(double guidance) {
    if (!(std::isfinite(guidance) && guidance >= 0 && guidance <= kMaxGuidance)) {
        throw refused("guidance: got " + repr(guidance) + "; expected 0 to 100 (1 and below: no guidance).");
    }
    return guidance;
}

long check_side(const std::string& name, std::optional<long> value, const ShapeRange& ranges) {
    if (!value) return ranges.opt_side;
    const long side = *value, low = ranges.min_side, high = ranges.max_side;
    if (side < low || side > high) {
        throw refused(name + ": got " + std::to_string(side) + " px; this bundle draws " + std::to_string(low) + " to " +
                      std::to_string(high) + " px. Use " + std::to_string(std::clamp(side, low, high)) +
                      ", or rebuild with another range of sizes.");
    }
    if (side % kPxPerLatent != 0) {
        const long below = side - side % kPxPerLatent;
        std::vector<std::string> near;
        for (const long each : {below, below + kPxPerLatent}) {
            if (low <= each && each <= high) near.push_back(std::to_string(each));
        }
        throw refused(name + ": got " + std::to_string(side) + " px; expected a multiple of " + std::to_string(kPxPerLatent) +
                      ". Use " + join(near, " or ") + ".");
    }
    return side;
}

Schedule check_schedule(const Request& request, const std::optional<Schedule>& given, const ScheduleInfo& info) {
    Recipe recipe;
    if (given) {
        recipe = given->recipe;
    } else {
        recipe.scheduler = request.scheduler.value_or(info.scheduler);
        recipe.num_steps = request.steps.value_or(info.num_inference_steps);
        recipe.flow_shift = info.flow_shift;
        recipe.max_timestep = info.max_timestep;
        recipe.intermediate_timestep = info.intermediate_timestep.value_or(kIntermediateTimestep);
    }
    recipe.timestep_scale = info.timestep_scale;
    Schedule schedule = make_schedule(recipe);
    const bool scm = info.scheduler == "scm";
    if ((recipe.scheduler == "scm") != scm) {
        std::vector<std::string> usable;
        for (const std::string& name : scheduler_names()) {
            if ((name == "scm") == scm) usable.push_back(name);
        }
        throw refused("scheduler: got " + repr(recipe.scheduler) + "; this model was trained for " + repr(info.scheduler) +
                      ". Use " + join(usable, " or ") + ".");
    }
    return schedule;
}

}  // namespace

std::vector<float> CheckedRequest::guidance_weights() const {
    if (guidance_embeds || guidance <= 1) return {1};
    return {static_cast<float>(1 - guidance), static_cast<float>(guidance)};
}

CheckedRequest check_request(const Manifest& manifest, const Request& request, const std::optional<Schedule>& schedule) {
    CheckedRequest out;
    check_prompts(request.prompts, "prompts", true);
    out.prompts = request.prompts;
    const std::size_t count = out.prompts.size();
    out.guidance = check_guidance(request.guidance.value_or(manifest.schedule.guidance_scale));
    out.negative_prompts = check_negative(request.negative_prompts, count);
    out.seeds = check_seeds(request.seeds, count);
    out.width = check_side("width", request.width, manifest.ranges);
    out.height = check_side("height", request.height, manifest.ranges);
    out.schedule = check_schedule(request, schedule, manifest.schedule);
    out.guidance_embeds = manifest.guidance_embeds;
    const bool given = std::any_of(out.negative_prompts.begin(), out.negative_prompts.end(),
                                   [](const std::string& text) { return !strip(text).empty(); });
    if (out.guidance_weights().size() == 1 && given) {
        const std::string why = manifest.guidance_embeds ? "this model has no negative prompts"
                                                         : "guidance " + repr(out.guidance) + " does not use them";
        const std::string remedy = manifest.guidance_embeds ? "Leave them out." : "Raise guidance above 1, or leave them out.";
        throw refused("negative_prompts: got " + repr(out.negative_prompts[0]) + ", and " + why + ". " + remedy);
    }
    return out;
}

}  // namespace sana
