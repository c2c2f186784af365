// What a picture says about how it was drawn: the JSON that runtime.picture_info describes.
#pragma once

#include <string>

#include "request.hpp"

namespace sana {

struct Drawer {  // what drew it
    std::string model, bundle_digest, backend, device;
};

std::string picture_info(const CheckedRequest& request, std::size_t index, const Drawer& drawer);

}  // namespace sana
