#include "levels.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "each.hpp"

namespace sana {
namespace {

constexpr std::size_t kBlock = 1 << 16;  // pixels that a thread makes at a time

}  // namespace

std::vector<std::uint8_t> to_levels(const Tensor& images) {
    const std::vector<float>& values = images.floats();
    const auto bad = std::count_if(values.begin(), values.end(), [](float value) { return !std::isfinite(value); });
    if (bad != 0) throw not_finite(bad);
    const auto plane = static_cast<std::size_t>(images.shape[2] * images.shape[3]);
    const std::size_t blocks = (plane + kBlock - 1) / kBlock;
    std::vector<std::uint8_t> out(values.size());
    each(static_cast<std::size_t>(images.shape[0]) * blocks, picture_threads(), [&](std::size_t number) {
        const std::size_t start = number / blocks * 3 * plane;  // of the picture
        const std::size_t first = number % blocks * kBlock, end = std::min(first + kBlock, plane);
        for (std::size_t channel = 0; channel < 3; ++channel) {
            for (std::size_t i = first; i < end; ++i) {
                const float level = std::clamp(values[start + channel * plane + i] * 0.5f + 0.5f, 0.0f, 1.0f) * 255.0f;
                out[start + i * 3 + channel] = static_cast<std::uint8_t>(std::nearbyint(level));
            }
        }
    });
    return out;
}

Failure not_finite(std::int64_t count) {
    return {ErrorKind::kSana, "decoder: got " + std::to_string(count) +
                                  " pixels that are not finite numbers; expected none. A precision is too narrow for this model: "
                                  "rebuild with --precision bf16 or fp32."};
}

}  // namespace sana
