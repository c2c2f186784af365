#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "failure.hpp"
#include "python_text.hpp"

namespace sana {
namespace {

using Levels = std::vector<double>;
using Table = std::vector<std::array<double, kCoefficients>>;

constexpr double kTrainTimesteps = 1000;
constexpr double kMaxTimestep = 1.57080;  // radians; Sprint's published start
constexpr double kKarrasRho = 7.0;

Levels linspace(double start, double stop, std::size_t count) {  // in NumPy's order of operations
    Levels out(count);
    const double step = count > 1 ? (stop - start) / static_cast<double>(count - 1) : 0;
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<double>(i) * step + start;
    if (count > 1) out.back() = stop;
    return out;
}

bool falls(const Levels& levels) {
    return std::adjacent_find(levels.begin(), levels.end(), [](double a, double b) { return !(b < a); }) == levels.end();
}

std::string list_repr(const Levels& levels) {
    std::vector<std::string> parts;
    for (const double each : levels) parts.push_back(repr(each));
    return "[" + join(parts) + "]";
}

std::string optional_repr(const std::optional<double>& value) { return value ? repr(*value) : "None"; }

void check_positive(const char* name, double value) {
    if (!(std::isfinite(value) && value > 0)) {
        throw Failure(ErrorKind::kSpec, std::string(name) + ": got " + repr(value) + "; expected a finite number above 0.");
    }
}

void check_times(const Levels& times, double highest) {
    if (times.empty() || times.size() > static_cast<std::size_t>(kMaxSteps)) {
        throw Failure(ErrorKind::kSpec, "spacing: got a list of shape (" + std::to_string(times.size()) + ",); expected 1 to " +
                                            std::to_string(kMaxSteps) + " numbers.");
    }
    const bool finite = std::all_of(times.begin(), times.end(), [](double each) { return std::isfinite(each); });
    if (!(finite && times.front() <= highest && times.back() > 0 && falls(times))) {
        throw Failure(ErrorKind::kSpec, "spacing: got " + list_repr(times) + "; expected numbers falling from at most " +
                                            repr(highest) + " to above 0 (the final 0 is added).");
    }
}

std::size_t check_steps(const Recipe& recipe) {
    const std::optional<long> given = recipe.num_steps ? recipe.num_steps
                                      : recipe.times   ? std::optional<long>(recipe.times->size())
                                                       : std::nullopt;
    const std::string shown = given ? std::to_string(*given) : "None";
    if (!given || *given < 1 || *given > kMaxSteps) {
        throw Failure(ErrorKind::kRequest,
                      "steps: got " + shown + "; expected an integer from 1 to " + std::to_string(kMaxSteps) + ".");
    }
    if (recipe.times && static_cast<std::size_t>(*given) != recipe.times->size()) {
        const std::string entries = std::to_string(recipe.times->size());
        throw Failure(ErrorKind::kRequest,
                      "steps: got " + shown + "; this schedule's list has " + entries + " entries. Ask for " + entries + " steps.");
    }
    return static_cast<std::size_t>(*given);
}

Levels flow_sigmas(const Recipe& recipe, std::size_t steps) {
    const auto shifted = [shift = recipe.flow_shift](double s) { return shift * s / (1.0 + (shift - 1.0) * s); };
    Levels sigmas;
    if (recipe.times) {
        sigmas = *recipe.times;
        for (double& s : sigmas) s = shifted(s);
        return sigmas;
    }
    if (recipe.scheduler == "flow_dpm_solver") {  // the noisiest level is 0.999 shifted, the grid's last point (0) is not a step
        const Levels grid = linspace(1.0, 1.0 / kTrainTimesteps, steps + 1);
        for (std::size_t i = steps; i > 0; --i) sigmas.push_back(shifted(1.0 - grid[i]));
    } else {  // diffusers shifts the lowest level when the scheduler is made, and again with the whole grid
        for (const double s : linspace(1.0, shifted(1.0 / kTrainTimesteps), steps)) sigmas.push_back(shifted(s));
    }
    const double first = sigmas.front(), last = sigmas.back();
    if (recipe.spacing == "exponential") {
        sigmas = linspace(std::log(first), std::log(last), steps);
        for (double& s : sigmas) s = std::exp(s);
    } else if (recipe.spacing == "karras") {
        const double high = std::pow(first, 1 / kKarrasRho), low = std::pow(last, 1 / kKarrasRho);
        sigmas = linspace(0.0, 1.0, steps);
        for (double& s : sigmas) s = std::pow(high + s * (low - high), kKarrasRho);
    }
    return sigmas;
}

Table euler(const Levels& s, const Levels& timesteps) {
    Table table;
    for (std::size_t i = 0; i + 1 < s.size(); ++i) table.push_back({timesteps[i], 1, 1, s[i + 1] - s[i], 0, 0, 1, -s[i]});
    return table;
}

Table dpm_solver(const Levels& sigmas, const Levels& timesteps) {
    Table table = euler(sigmas, timesteps);
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    Levels lambda;
    for (const double s : sigmas) lambda.push_back(s == 0 ? kInfinity : s == 1 ? -kInfinity : std::log((1.0 - s) / s));
    for (std::size_t i = 1; i + 1 < table.size(); ++i) {  // the first step has no previous prediction, the last ends at 0
        const double s = sigmas[i], after = sigmas[i + 1];
        const double h = lambda[i + 1] - lambda[i], h_before = lambda[i] - lambda[i - 1];  // infinite after s = 1: then b = 0
        const double b = 0.5 * (after / s - 1.0) * (h / h_before);
        table[i][2] = 1.0 - b;
        table[i][3] = (after - s) + b * s;
        table[i][4] = b;
    }
    return table;
}

Schedule frozen(Recipe recipe, std::vector<float> sigmas, const Table& table) {
    Schedule out{std::move(recipe), std::move(sigmas), {}};
    for (const auto& row : table) {
        auto& rounded = out.table.emplace_back();
        std::transform(row.begin(), row.end(), rounded.begin(), [](double value) { return static_cast<float>(value); });
    }
    return out;
}

Schedule flow(Recipe recipe, std::size_t steps) {
    const Levels sigmas = flow_sigmas(recipe, steps);
    std::vector<float> rounded(sigmas.begin(), sigmas.end());
    rounded.push_back(0);
    const Levels levels(rounded.begin(), rounded.end());
    if (!falls(levels)) {
        throw Failure(
            ErrorKind::kSpec,
            "flow_shift " + repr(recipe.flow_shift) + " with " + std::to_string(steps) +
                " steps: neighbouring noise levels are the same in float32. Use fewer steps or a flow_shift nearer to 1.");
    }
    Levels timesteps;
    if (recipe.scheduler == "flow_euler") {
        for (std::size_t i = 0; i < steps; ++i) timesteps.push_back(levels[i] * kTrainTimesteps * recipe.timestep_scale);
        return frozen(std::move(recipe), rounded, euler(levels, timesteps));
    }
    for (const double s : sigmas)
        timesteps.push_back(std::trunc(s * kTrainTimesteps) * recipe.timestep_scale);  // diffusers' integers
    return frozen(std::move(recipe), rounded, dpm_solver(levels, timesteps));
}

Levels scm_times(const Recipe& recipe, std::size_t steps) {
    if (recipe.times) {
        if (recipe.max_timestep) {
            throw Failure(ErrorKind::kSpec, "max_timestep: got " + repr(*recipe.max_timestep) +
                                                " next to a list of times; the list's first time is the start. Leave it out.");
        }
        Levels times = *recipe.times;
        times.push_back(0);
        return times;
    }
    const double start = recipe.max_timestep.value_or(kMaxTimestep);
    Levels times = linspace(start, 0.0, steps + 1);
    if (steps == 2 && recipe.intermediate_timestep) times[1] = *recipe.intermediate_timestep;
    if (!(0 < start && start <= kMaxTimestep && falls(times))) {
        throw Failure(ErrorKind::kSpec, "scm times: got max_timestep " + repr(start) + " and intermediate_timestep " +
                                            optional_repr(recipe.intermediate_timestep) + "; expected " + repr(kMaxTimestep) +
                                            " >= max_timestep > intermediate_timestep > 0 (radians).");
    }
    return times;
}

Schedule scm(Recipe recipe, std::size_t steps) {
    Levels t = scm_times(recipe, steps);
    for (double& each : t) each = static_cast<float>(each);  // the network saw float32 times
    Levels s;
    for (const double each : t) s.push_back(std::sin(each) / (std::sin(each) + std::cos(each)));  // flow time
    Table table;
    for (std::size_t i = 0; i < steps; ++i) {
        const double r = 1.0 / (std::sin(t[i]) + std::cos(t[i]));  // takes TrigFlow's unit variance to the flow's x
        const bool last = i + 1 == steps;                          // which returns x0
        const double c_x0 = last ? 1.0 : std::cos(t[i + 1]), c_noise = last ? 0.0 : std::sin(t[i + 1]);
        table.push_back({s[i], r, c_x0 * r, -c_x0 * s[i], 0, c_noise, r, -s[i]});
    }
    return frozen(std::move(recipe), {s.begin(), s.end()}, table);
}

}  // namespace

const std::vector<std::string>& scheduler_names() {
    static const std::vector<std::string> names = {"flow_euler", "flow_dpm_solver", "scm"};
    return names;
}

Schedule make_schedule(Recipe recipe) {
    static const std::vector<std::string> spacings = {"linear", "exponential", "karras"};
    const auto known = [](const std::vector<std::string>& words, const std::string& word) {
        return std::find(words.begin(), words.end(), word) != words.end();
    };
    if (!known(scheduler_names(), recipe.scheduler)) {
        throw Failure(ErrorKind::kRequest,
                      "scheduler: got " + repr(recipe.scheduler) + "; " + nearest(recipe.scheduler, scheduler_names(), 0.4) + ".");
    }
    const bool is_scm = recipe.scheduler == "scm";
    if (recipe.times) check_times(*recipe.times, is_scm ? kMaxTimestep : 1.0);
    const std::size_t steps = check_steps(recipe);
    if (!recipe.times && !known(spacings, recipe.spacing)) {
        throw Failure(ErrorKind::kSpec, "spacing: got " + repr(recipe.spacing) + "; " + nearest(recipe.spacing, spacings, 0.4) +
                                            ", or a falling list of numbers.");
    }
    check_positive("timestep_scale", recipe.timestep_scale);
    recipe.num_steps = static_cast<long>(steps);
    if (is_scm) {
        if (!recipe.times && recipe.spacing != "linear") {
            throw Failure(ErrorKind::kSpec,
                          "spacing: got " + repr(recipe.spacing) + "; scm takes 'linear' or a list of times in radians.");
        }
        return scm(std::move(recipe), steps);
    }
    check_positive("flow_shift", recipe.flow_shift);
    return flow(std::move(recipe), steps);
}

}  // namespace sana
