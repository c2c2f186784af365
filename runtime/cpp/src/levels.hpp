// A decoder's output as the bytes of pictures. As runtime/image.py.
#pragma once

#include <cstdint>
#include <vector>

#include "failure.hpp"
#include "session.hpp"

namespace sana {

// What decoders' engines give beside images: those bytes, (B, H, W, 3) uint8, and of each picture how many numbers are none, (B) int32.
constexpr const char *kLevels = "levels", *kNotFinite = "not_finite";

// images (B, 3, H, W), nominally -1 to 1 -> (B, H, W, 3): clamped, scaled to 0..255 and rounded half to even, in float32. Throws
// not_finite() if a number is none.
std::vector<std::uint8_t> to_levels(const Tensor& images);

Failure not_finite(std::int64_t count);  // what is thrown where so many numbers are none

}  // namespace sana
