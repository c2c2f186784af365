// Noise that is the same on every machine, to the last bit: docs/noise.md is the specification, runtime/noise.py its NumPy form.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace sana {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

// `count` standard normal numbers: the noise of one image, C order. stream: 0 is the initial noise, i + 1 the fresh noise of step
// i.
std::vector<float> normal(std::uint64_t seed, std::size_t count, std::uint32_t stream = 0);

}  // namespace sana
