// A schedule is a table: what the denoiser graph must multiply with at every step. As runtime/schedule.py, which has the formulas.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace sana {

constexpr std::size_t kCoefficients = 8;  // timestep, c_in, c_x, c_v, c_previous, c_noise, p_x, p_v
constexpr std::size_t kNoiseColumn = 5;
constexpr long kMaxSteps = 1000;
constexpr double kIntermediateTimestep = 1.3;  // radians; Sprint's published middle of two steps

// What a schedule is computed from.
struct Recipe {
    std::string scheduler;
    std::optional<long> num_steps;  // may be left out with `times`
    double flow_shift = 3.0;
    std::string spacing = "linear";            // or exponential, karras
    std::optional<std::vector<double>> times;  // in place of a spacing: a falling list without the final 0
    double timestep_scale = 1.0;
    std::optional<double> max_timestep;                                   // radians, scm only
    std::optional<double> intermediate_timestep = kIntermediateTimestep;  // radians, scm only
};

struct Schedule {
    Recipe recipe;
    std::vector<float> sigmas;                            // (N + 1), falling to 0
    std::vector<std::array<float, kCoefficients>> table;  // a row a step

    bool needs_noise(std::size_t step) const { return table[step][kNoiseColumn] != 0; }
};

const std::vector<std::string>& scheduler_names();

// Raises RequestError for an unknown scheduler or a bad number of steps, SpecError for the rest.
Schedule make_schedule(Recipe recipe);

}  // namespace sana
