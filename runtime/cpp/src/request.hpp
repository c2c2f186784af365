// A request for pictures, checked against what the bundle can do. As runtime/request.py, with its messages.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "sana/engine.hpp"
#include "schedule.hpp"

namespace sana {

struct CheckedRequest {
    std::vector<std::string> prompts, negative_prompts;  // one each for each picture
    std::vector<std::uint64_t> seeds;
    double guidance = 0;
    long width = 0, height = 0;  // px
    Schedule schedule;
    bool guidance_embeds = false;  // the network takes the scale itself, so that one text is enough

    std::vector<float> guidance_weights() const;  // (k): of the velocities of negative prompt and prompt
};

// schedule: in place of the request's scheduler, from a file or a picture. Raises RequestError, and what make_schedule raises.
CheckedRequest check_request(const Manifest& manifest, const Request& request, const std::optional<Schedule>& schedule = {});

}  // namespace sana
