// PNG files as save_png writes them, and as other programs write them again: 8 bits a channel, RGB or RGBA, not interlaced.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "sana/engine.hpp"

namespace sana {

// What the PNG says of how it was drawn: the last text "sana" before its pixels, from an iTXt, tEXt or zTXt chunk. `source` names
// the file in messages. Raises RequestError for data that is no PNG.
std::optional<std::string> png_info(std::string_view data, const std::string& source);

// The picture with its info. Raises RequestError for what is no PNG of that form, or without info; ManifestError for broken info.
Image decode_png(std::string_view data, const std::string& source);

}  // namespace sana
