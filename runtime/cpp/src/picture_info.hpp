// What a picture says about how it was drawn: the JSON that runtime.picture_info describes.
#pragma once

#include <string>
#include <string_view>

#include "request.hpp"

namespace sana {

constexpr std::size_t kMaxInfoBytes = 4 << 20;  // two prompts of 100,000 characters, each escaped to its longest, and some more

struct Drawer {  // what drew it
    std::string model, bundle_digest, backend, device;
};

struct PictureInfo {
    std::string prompt, negative_prompt;
    std::uint64_t seed = 0;
    double guidance = 0;
    std::int64_t width = 0, height = 0;  // px
    Recipe recipe;                       // without what belongs to the model
    Drawer drawer;
    std::int64_t batch_size = 1, batch_index = 0;
    std::string program = "libsana_runtime " SANA_VERSION;
};

PictureInfo picture_info(const CheckedRequest& request, std::size_t index, const Drawer& drawer);
std::string json_of(const PictureInfo& info);

// Raises ManifestError, naming `source`, for text that is too long, not strict JSON, or not what the schema says.
PictureInfo parse_picture_info(std::string_view text, const std::string& source);

}  // namespace sana
