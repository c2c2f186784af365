#include "picture_info.hpp"

#include <cstdio>

#include "python_text.hpp"

namespace sana {
namespace {

std::string json_string(std::string_view text) {
    static constexpr std::string_view kFrom = "\"\\\b\f\n\r\t", kTo = "\"\\bfnrt";
    std::string out = "\"";
    for (const char c : text) {
        if (const std::size_t at = kFrom.find(c); at != kFrom.npos) {
            out += {'\\', kTo[at]};
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char code[8];
            std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
            out += code;
        } else {
            out += c;
        }
    }
    return out + "\"";
}

std::string number_or_null(const std::optional<double>& value) { return value ? repr(*value) : "null"; }

}  // namespace

std::string picture_info(const CheckedRequest& request, std::size_t index, const Drawer& drawer) {
    const Recipe& recipe = request.schedule.recipe;
    const std::string schedule = "{\"scheduler\":" + json_string(recipe.scheduler) +
                                 ",\"num_steps\":" + std::to_string(*recipe.num_steps) +
                                 ",\"flow_shift\":" + repr(recipe.flow_shift) + ",\"spacing\":" + json_string(recipe.spacing) +
                                 ",\"max_timestep\":" + number_or_null(recipe.max_timestep) +
                                 ",\"intermediate_timestep\":" + number_or_null(recipe.intermediate_timestep) + "}";
    return "{\"format\":1,\"prompt\":" + json_string(request.prompts[index]) +
           ",\"negative_prompt\":" + json_string(request.negative_prompts[index]) +
           ",\"seed\":" + std::to_string(request.seeds[index]) + ",\"guidance\":" + repr(request.guidance) +
           ",\"width\":" + std::to_string(request.width) + ",\"height\":" + std::to_string(request.height) +
           ",\"schedule\":" + schedule + ",\"model\":" + json_string(drawer.model) +
           ",\"bundle_digest\":" + json_string(drawer.bundle_digest) + ",\"backend\":" + json_string(drawer.backend) +
           ",\"device\":" + json_string(drawer.device) +
           ",\"batch_size\":1,\"batch_index\":0,\"program\":\"libsana_runtime " SANA_VERSION "\"}";
}

}  // namespace sana
